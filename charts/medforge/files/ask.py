"""`helm test`: is the gateway ready, and does it answer a question about a grey image? Says so, and exits 0 or 1."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import time
import urllib.error
import urllib.request

TRIES, PAUSE, SECONDS = 12, 5.0, 150.0


def call(path: str, body: dict[str, object] | None = None, key: str = "") -> tuple[int, dict[str, object]]:
    """Status and JSON of an answer of the gateway at MEDFORGE_URL; status 0 where there was none."""
    headers = {"content-type": "application/json", **({"authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["MEDFORGE_URL"] + path, data, headers)  # noqa: S310  our own Service
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # noqa: S310
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError as error:
        return 0, {"error": str(error)}


def main() -> int:
    """Ask. Returns 0 if all was as it should be."""
    for _ in range(TRIES):
        status, told = call("/readyz")
        if status == 200:
            break
        time.sleep(PAUSE)
    print(f"/readyz: {status} {json.dumps(told)}")
    if status != 200:
        return 1
    key = os.environ.get("MEDFORGE_API_KEY", "")
    if not key:
        print("no question was asked: tests.apiKeySecret is empty")
        return 0

    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (64, 64), 127).save(stream, "PNG")
    images = [{"data": base64.b64encode(stream.getvalue()).decode()}]
    status, told = call("/v1/diagnose", {"task": "ask", "question": "What is shown?", "images": images}, key)
    print(f"/v1/diagnose: {status} {json.dumps(told)}")
    return 0 if status == 200 and told.get("decision") in ("answered", "abstained") else 1


if __name__ == "__main__":
    sys.exit(main())
