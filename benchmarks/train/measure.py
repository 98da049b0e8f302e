"""Running one framework at one setting, at both lengths, and taking down its time, memory and losses."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environments import Ran, run
from benchmarks.train import medforge_side, peers
from benchmarks.train.report import Result
from benchmarks.train.work import Dtype, Run, Work

TIMEOUT = 3 * 3600.0


@dataclass(frozen=True)
class Place:
    """The model, the samples by their number, and the folder that runs go to."""

    model: Path
    data: dict[int, Path]
    runs: Path


@dataclass(frozen=True)
class Contender:
    """A framework at a setting: how a run of it is started, and where it left its adapter and its loss."""

    framework: str
    setting: str
    command: Callable[[Run], Sequence[str]]
    adapter: Callable[[Run], Path]
    logged_loss: Callable[[Run], float]


def medforge() -> Contender:
    """MedForge as it comes out of the box."""
    side = medforge_side
    return Contender(side.NAME, peers.DEFAULT, side.command, side.adapter, side.logged_loss)


def contenders(peer: peers.Peer, python: Path) -> list[Contender]:
    """A peer at each of its settings, in the environment of `python`."""

    def at(setting: str) -> Contender:
        return Contender(
            peer.name, setting, lambda run: peer.command(python, run, setting), peers.adapter, peers.logged_loss
        )

    return [at(setting) for setting in peer.settings]


def measure(contender: Contender, place: Place, work: Work, dtype: Dtype, repeats: int) -> tuple[Result, Path | None]:
    """Run at both lengths, `repeats` times. Returns the row and the adapter of the last long run, None on an error."""
    result = Result(contender.framework, contender.setting, dtype)
    adapter = None
    for _ in range(repeats):
        for length, samples in (("short", work.short), ("long", work.long)):
            out = place.runs / f"{contender.framework}-{contender.setting}-{dtype}-{length}"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            one = Run(work, dtype, place.model, place.data[samples], out)
            ran = run(contender.command(one), out / "log.txt", _environment(out, work), TIMEOUT)
            if ran.code:
                result.error = reason(ran)
                return result, None
            result.seconds[length].append(ran.seconds)
            print(f"  {out.name}: {ran.seconds:.1f} s, {ran.peak_bytes / 2**30:.2f} GiB", file=sys.stderr, flush=True)
        try:
            adapter, result.logged_loss = contender.adapter(one), contender.logged_loss(one)
        except ValueError as error:
            result.error = str(error)
            return result, None
        result.peak_bytes.append(ran.peak_bytes)
    return result, adapter


def _environment(out: Path, work: Work) -> dict[str, str]:
    """No accelerator, no hub, the same threads for all, and a cache that is as empty in each run."""
    caches = {name: str(out / "cache") for name in ("HF_HOME", "MODELSCOPE_CACHE")}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(work.threads))
    return caches | threads | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def reason(ran: Ran) -> str:
    """Why a command failed: the last line of its output that names an error, and where the whole output is."""
    if ran.code == -9:
        return f"killed, for want of memory or after {TIMEOUT / 3600:.0f} hours; see {ran.log}"
    lines = ran.tail(200).splitlines()
    named = [line for line in lines if re.match(r"\s*[\w.]*(Error|Exception|Exit)\b", line)]
    return f"exit code {ran.code}: {(named or lines or ['no output'])[-1].strip()}; see {ran.log}"
