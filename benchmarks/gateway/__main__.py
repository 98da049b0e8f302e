"""What a request through the gateway costs: MedForge's against a plain proxy and LiteLLM's, on one machine, in one run.

    python -m benchmarks.gateway [--quick] [--only NAME]

All stand before the same upstream, a mock that answers at once, and are sent the same request with an image of 200 KB
by wrk. MedForge's gateway runs as it comes: it checks an API key and the image, counts, and writes an audit row to the
disk (fsync) before it answers; only its rate limits are raised. LiteLLM checks a key. The plain proxy (FastAPI and
httpx) checks and writes nothing. Each is one process; wrk, upstream and contender share the machine's cores.

Two rows more stand before an upstream that parses the request and decodes the image, as every model's server has to:
what is left of its throughput behind the gateway is what a predictor of no cost at all would keep.

Latency is that over one connection, less that of the upstream alone; throughput that over as many as MedForge's gateway
lets through at once by default, and, as httpx is slower the more connections its pool holds, over fewer and more too.
Repeats go round the contenders, so that a slow spell of the machine meets all of them; medians count.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from benchmarks.environments import machine, only_one, versions
from benchmarks.gateway import load, report, servers
from benchmarks.gateway.measure import QUICK, Bench, Work, measure
from benchmarks.gateway.servers import DIRECT, LITELLM, NAME, PACKAGES, PEERS, PLAIN, ROOT
from medforge.files import write_atomic, write_json

RESULTS = ROOT / "benchmarks" / "results" / "gateway.json"
CONTENDERS = (DIRECT, NAME, PLAIN, LITELLM)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and the last line, write the JSON file. Returns 1 when a row has an error."""
    options = parser().parse_args(arguments)
    work = work_of(options)
    wrk = load.find_wrk()
    cache = Path(options.cache).resolve()
    with only_one(cache / "gateway"):
        return compare(options, work, wrk, cache, sys.argv[1:] if arguments is None else arguments)


def compare(options: argparse.Namespace, work: Work, wrk: str, cache: Path, given: list[str]) -> int:
    """`main` with its options read: `given` is the command line as the JSON file tells it."""
    folder = cache / "gateway" / "runs"
    shutil.rmtree(folder, ignore_errors=True)
    image = load.picture()
    bench = Bench(wrk, folder / "body.json", folder, work)
    write_atomic(bench.body, load.payload(image))
    rows, starters, found = enter(options.only, cache)
    for repeat in range(work.repeats):
        print(f"repeat {repeat + 1} of {work.repeats}", file=sys.stderr, flush=True)
        for row in rows:
            if not row.error:
                measure(row, starters[row.contender], bench)

    about = {
        "benchmark": "gateway",
        "command": shlex.join(["python", "-m", "benchmarks.gateway", *given]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": found,
        "work": asdict(work) | {"image_bytes": len(image), "body_bytes": bench.body.stat().st_size},
    }
    whole = not (options.quick or options.only)
    path = Path(options.out) if options.out else RESULTS if whole else cache / "gateway" / "partial.json"
    write_json(path, report.document(rows, about, work.connections))
    print(report.table(rows, work.connections))
    print(f"written to {path}")
    print(report.headline(rows))
    return int(any(row.error for row in rows))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="a few seconds, to see that everything runs")
    made.add_argument("--only", choices=CONTENDERS[1:], help="one of them, and the upstream alone")
    made.add_argument("--seconds", type=int, help=f"length of a measurement ({Work.seconds})")
    made.add_argument("--connections", type=int, help=f"connections for throughput ({Work.connections})")
    made.add_argument("--repeats", type=int, help=f"rounds, of which the median counts ({Work.repeats})")
    made.add_argument("--cache", default=str(ROOT / ".medforge" / "bench"), help="environments and runs")
    made.add_argument("--out", help="the JSON file")
    return made


def work_of(options: argparse.Namespace) -> Work:
    """The work that the options ask for. Raises ValueError when it cannot be done."""
    given = {name: getattr(options, name) for name in ("seconds", "connections", "repeats")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value < 1:
            raise ValueError(f"--{name} {value}: at least 1 is needed")
    return replace(QUICK if options.quick else Work(), **given)


Starters = dict[str, servers.Starter | None]


def enter(only: str | None, cache: Path) -> tuple[list[report.Row], Starters, dict[str, dict[str, str | None]]]:
    """Who takes part, how it is started, and the versions. A peer that cannot be installed is a row with the reason."""
    rows = [report.Row(name) for name in CONTENDERS if only in (None, name) or name == DIRECT]
    rows += [report.Row(name, reads=True) for name in (DIRECT, NAME) if only in (None, NAME)]
    starters: Starters = {DIRECT: None, NAME: servers.gateway}
    found = {NAME: versions(Path(sys.executable), PACKAGES[NAME])}
    peers = {PLAIN: servers.plain, LITELLM: servers.litellm}
    for row in rows:
        if row.contender in PEERS:
            try:
                python = PEERS[row.contender].make(cache)
            except ValueError as error:
                row.error = str(error)
                continue
            starters[row.contender] = partial(peers[row.contender], python)
            found[row.contender] = versions(python, PACKAGES[row.contender])
    return rows, starters, found


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
