"""`medforge ask IMAGE "question"`: ask a running gateway from a terminal."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

KEY, URL = "MEDFORGE_API_KEY", "MEDFORGE_URL"
_SECONDS = 180.0


def add(commands: Any) -> None:
    """Declare `ask`."""
    ask = commands.add_parser("ask", help="ask a gateway about an image: `make serve` starts one")
    ask.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="PNG, JPEG, TIFF or DICOM; of one study")
    ask.add_argument("question", metavar="QUESTION", help="the question, or with --finding/--locate the finding")
    ask.add_argument("--finding", action="store_true", help="affirm or deny a finding")
    ask.add_argument("--locate", action="store_true", help="locate a finding")
    ask.add_argument("--language", choices=("en", "zh"), default="en")
    ask.add_argument("--frame", type=int, help="frame of a multi-frame file, from 0")
    ask.add_argument(
        "--url", default=os.environ.get(URL, "http://127.0.0.1:8080"), help=f"gateway ({URL}; %(default)s)"
    )
    ask.add_argument("--key", default="", help=f"API key ({KEY}; else the one that `make serve` made)")
    ask.add_argument(
        "--root", type=Path, default=Path(".medforge"), help="where `make serve` keeps its key (%(default)s)"
    )
    ask.add_argument("--json", action="store_true", help="print the gateway's whole answer")
    ask.set_defaults(run=_ask)


def _ask(arguments: argparse.Namespace) -> int:
    import urllib3

    if arguments.finding and arguments.locate:
        raise ValueError("--finding and --locate exclude each other")
    task = "finding" if arguments.finding else "locate" if arguments.locate else "ask"
    fields: list[tuple[str, Any]] = [("task", task), ("language", arguments.language)]
    fields.append(("question" if task == "ask" else "finding", arguments.question))
    if arguments.frame is not None:
        fields.append(("frame", str(arguments.frame)))
    for path in arguments.images:
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        fields.append(("image", (path.name, path.read_bytes(), "application/octet-stream")))
    url = f"{arguments.url.rstrip('/')}/v1/diagnose"
    headers = {"Authorization": f"Bearer {_key(arguments)}", "Accept": "application/json"}
    try:
        answer = urllib3.request("POST", url, fields=fields, headers=headers, timeout=_SECONDS, retries=False)
    except urllib3.exceptions.HTTPError as error:
        raise ValueError(f"{url}: no answer ({type(error).__name__}); is the gateway running? `make serve`") from None
    try:
        document = json.loads(answer.data)
    except ValueError:
        raise ValueError(f"{url}: answered {answer.status} with something that is no JSON; is it a gateway?") from None
    if answer.status != 200:
        told = document.get("error", {})
        raise ValueError(
            f"{answer.status} {told.get('code')}: {told.get('message')} (request {told.get('request_id')})"
        )
    print(json.dumps(document, indent=2, ensure_ascii=False) if arguments.json else _words(document))
    return 0


def _key(arguments: argparse.Namespace) -> str:
    file = arguments.root / "gateway" / "key"
    key = arguments.key or os.environ.get(KEY) or (file.read_text().strip() if file.is_file() else "")
    if not key:
        raise ValueError(f"no API key: give --key, set {KEY}, or let `make serve` make one")
    return str(key)


def _words(answer: dict[str, Any]) -> str:
    """The answer as a reader wants it: what was said, where, how sure, and by which release."""
    lines = [answer["answer"] if answer["decision"] == "answered" else f"abstained: {answer['reason_text']}"]
    if finding := answer.get("finding"):
        sure = "" if finding["probability"] is None else f" (probability {finding['probability']:.2f})"
        lines.append(f"{finding['name']}: {'present' if finding['present'] else 'absent'}{sure}")
    for region in answer["regions"]:
        lines.append(f"region:     image {region['image']}, pixels {region['pixels']} {region['label']}".rstrip())
    for name in ("match", "confidence"):
        if score := answer.get(name):
            lines.append(f"{name + ':':<11} {score['value']:.2f} (at least {score['threshold']:.2f})")
    release = answer["release"]
    lines.append(f"release:    {(release['digest'] or 'unknown')[:12]} {release['version'] or release['model']}")
    return "\n".join([*lines, answer["disclaimer"]])
