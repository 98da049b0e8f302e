"""Measuring one contender once: its server is started, warmed up, loaded over one connection and over many, stopped."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.gateway import load, servers
from benchmarks.gateway.report import Row


@dataclass(frozen=True)
class Work:
    """What all contenders are given. Times are in seconds."""

    seconds: int = 20
    warm_up: int = 3
    connections: int = 32  # as many requests as MedForge's gateway lets through at once, by default
    levels: tuple[int, ...] = (4, 16, 64)  # other numbers of connections, at which only throughput is measured
    repeats: int = 3


QUICK = Work(seconds=2, warm_up=1, levels=(4,), repeats=1)


@dataclass(frozen=True)
class Bench:
    """The tools of a run: wrk, the body's file, the folder of the servers' logs and data."""

    wrk: str
    body: Path
    folder: Path
    work: Work


def measure(row: Row, launch: servers.Starter | None, bench: Bench) -> None:
    """Add one repeat to the row. `launch` starts its server; None measures the upstream itself.

    The upstream is started anew too, so that no contender meets one that another has left in a worse state. What goes
    wrong becomes the row's error.
    """
    body = bench.body.read_bytes()
    try:
        with ExitStack() as stack:
            upstream = stack.enter_context(
                servers.running(
                    "upstream",
                    servers.reading if row.reads else servers.upstream,
                    "",
                    bench.folder / f"{row.label}-upstream",
                    body,
                )
            )
            server = upstream
            if launch:
                base = upstream.url.removesuffix(servers.CHAT) + "/v1"
                folder = bench.folder / row.label
                server = stack.enter_context(servers.running(row.contender, launch, base, folder, body))
            _repeat(row, server, bench, own=launch is not None)
            servers.check(row.contender, server, body)
    except (ValueError, OSError, psutil.Error) as error:
        row.error = str(error)


def _repeat(row: Row, server: servers.Server, bench: Bench, own: bool) -> None:
    work = bench.work

    def load_it(connections: int, seconds: int) -> load.Sent:
        return load.send(bench.wrk, server.url, bench.body, server.headers, connections, seconds)

    load_it(work.connections, work.warm_up)
    alone = load_it(1, work.seconds)
    before = processor_seconds(server.process.pid)
    crowd = load_it(work.connections, work.seconds)
    used = processor_seconds(server.process.pid) - before
    row.p50_ms.append(alone.p50_ms)
    row.p99_ms.append(alone.p99_ms)
    row.per_second.append(crowd.per_second)
    row.crowd_p99_ms.append(crowd.p99_ms)
    row.cpu_ms.append(1e3 * used / crowd.requests)
    for count in () if row.reads else sorted(set(work.levels) - {work.connections}):
        row.levels.setdefault(count, []).append(load_it(count, work.seconds).per_second)
    if own:
        row.memory_bytes.append(memory(server.process.pid))
    print(f"  {row.label}: {alone.p50_ms:.2f} ms, {crowd.per_second:.0f} requests/s", file=sys.stderr, flush=True)


def processor_seconds(pid: int) -> float:
    """Processor time of a process and of those that it started and that still run, in seconds."""
    return sum(sum(one.cpu_times()[:2]) for one in _tree(pid))


def memory(pid: int) -> int:
    """Resident memory of a process and of those that it started, in bytes."""
    return sum(one.memory_info().rss for one in _tree(pid))


def _tree(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]
