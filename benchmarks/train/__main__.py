"""Training speed: MedForge against LLaMA-Factory and ms-swift on one machine, in one run.

    python -m benchmarks.train [--quick] [--only NAME] [--dtype float32]

All train the same model (built from a seed) on the same samples of VQA-RAD (generated ones where it is missing), with
the same LoRA, optimizer, batch and precision, one after the other, on the CPU and the same number of threads.

Throughput is a slope. Each setting is run as a whole process on few samples and on many, with equally many epochs,
and the samples that the long run has more are divided by the time that it takes longer. So everything that grows with
the data counts, for all alike: reading and decoding images, tokenising in advance, filling a cache, training,
writing checkpoints. What does not grow (imports, loading the model) cancels out. No framework's own clock is relied on.

Peak memory is the training process's resident set. The loss is computed by one judge from the adapters (loss.py).
"""

from __future__ import annotations

import argparse
import multiprocessing
import shlex
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.environments import machine, only_one, versions
from benchmarks.train import data, measure, medforge_side, report
from benchmarks.train.loss import losses
from benchmarks.train.model import QWEN, Shape, build
from benchmarks.train.peers import PEERS
from benchmarks.train.work import DTYPES, QUICK, Dtype, Work
from medforge.files import write_json

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "train.json"
OWN_PACKAGES = ("medforge", "torch", "transformers", "peft")


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table and the headline, write the JSON file. Returns 1 when a row has an error."""
    options = parser().parse_args(arguments)
    work = work_of(options)
    cache = Path(options.cache).resolve()
    with only_one(cache / "train"):
        return compare(options, work, cache, sys.argv[1:] if arguments is None else arguments)


def compare(options: argparse.Namespace, work: Work, cache: Path, given: list[str]) -> int:
    """`main` with its options read: `given` is the command line as the JSON file tells it."""
    place = prepare(cache / "train", Path(options.vqa_rad), work, QWEN if options.qwen_vocabulary else Shape())
    dtypes: tuple[Dtype, ...] = (options.dtype,) if options.dtype else DTYPES
    entered, found_versions, results = enter(options.only, dtypes, cache)

    adapters: list[tuple[report.Result, Path]] = []
    for dtype in dtypes:
        for contender in entered:
            print(f"{contender.framework} {contender.setting} {dtype}", file=sys.stderr, flush=True)
            result, adapter = measure.measure(contender, place[0], work, dtype, options.repeats)
            results.append(result)
            if adapter:
                adapters.append((result, adapter))
    base = judge(place[0], work, adapters)

    about = {
        "benchmark": "train",
        "command": shlex.join(["python", "-m", "benchmarks.train", *given]),
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine() | {"threads": work.threads},
        "versions": found_versions,
        **place[1],
        "loss_before_training": base,
    }
    whole = not (options.quick or options.only or options.dtype)
    path = Path(options.out) if options.out else RESULTS if whole else cache / "train" / "partial.json"
    write_json(path, report.document(results, work, about))
    print(report.table(results, work))
    print(f"loss before training {base:.4f}; written to {path}")
    print(report.headline(results, work))
    return int(any(result.error for result in results))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.train", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="a few samples, to see that everything runs")
    made.add_argument("--only", choices=(medforge_side.NAME, *(peer.name for peer in PEERS)), help="one framework")
    made.add_argument("--dtype", choices=DTYPES, help="one precision")
    made.add_argument("--samples", type=int, help=f"samples of the long run ({Work.long})")
    made.add_argument("--epochs", type=int, help=f"passes over them ({Work.epochs})")
    made.add_argument("--repeats", type=int, default=1, help="runs of each length, of which the median counts")
    made.add_argument("--threads", type=int, help=f"threads of a process ({Work.threads})")
    made.add_argument("--qwen-vocabulary", action="store_true", help="a model with Qwen's own 151,936 tokens")
    made.add_argument("--vqa-rad", default=str(ROOT.parent / "shared" / "data" / "vqa_rad"), help="folder of VQA-RAD")
    made.add_argument("--cache", default=str(ROOT / ".medforge" / "bench"), help="environments, model and runs")
    made.add_argument("--out", help="the JSON file")
    return made


def work_of(options: argparse.Namespace) -> Work:
    """The work that the options ask for. Raises ValueError when it cannot be done."""
    given = {"long": options.samples, "epochs": options.epochs, "threads": options.threads}
    for name, value in (("--repeats", options.repeats), ("--epochs", options.epochs), ("--threads", options.threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: at least 1 is needed")
    return replace(QUICK if options.quick else Work(), **{name: n for name, n in given.items() if n is not None})


def prepare(folder: Path, vqa_rad: Path, work: Work, shape: Shape) -> tuple[measure.Place, dict[str, Any]]:
    """Write the samples of both lengths and the model. Returns where they are, and what they are for the JSON file."""
    dataset = data.prepare(vqa_rad, folder / "dataset")
    train = dataset.samples("train")
    by_length = {length: folder / f"samples-{length}" for length in (work.short, work.long)}
    images = {}
    for length, out in by_length.items():
        chosen = data.choose_images(train, length, work.seed)
        images[length] = len({ref.sha256 for sample in chosen for ref in sample.images})
        data.write(dataset, chosen, out)
    texts = [turn.text for sample in train for turn in sample.turns] + ["system\nuser\nassistant\n"] * 50
    model = alone(build, folder / "model", texts, shape, work.max_pixels, work.seed)
    shutil.rmtree(folder / "runs", ignore_errors=True)
    about = {"model": model, "data": {"source": dataset.manifest["source"], "images": images}}
    return measure.Place(folder / "model", by_length, folder / "runs"), about


def enter(
    only: str | None, dtypes: tuple[Dtype, ...], cache: Path
) -> tuple[list[measure.Contender], dict[str, dict[str, str | None]], list[report.Result]]:
    """Who takes part, their versions, and a row with the reason for each peer that could not be installed."""
    entered, found, failed = [], {}, []
    if only in (None, medforge_side.NAME):
        entered.append(measure.medforge())
        found[medforge_side.NAME] = versions(Path(sys.executable), OWN_PACKAGES)
    for peer in PEERS:
        if only not in (None, peer.name):
            continue
        try:
            python = peer.environment.make(cache)
        except ValueError as error:
            failed += [report.Result(peer.name, "all", dtype, error=str(error)) for dtype in dtypes]
            continue
        entered += measure.contenders(peer, python)
        found[peer.name] = versions(python, peer.packages)
    return entered, found, failed


def judge(place: measure.Place, work: Work, adapters: list[tuple[report.Result, Path]]) -> float:
    """Give each row its loss, or the reason why there is none. Returns the loss before training."""
    paths: list[Path | None] = [None, *(path for _, path in adapters)]
    base, *found = alone(losses, place.model, place.data[work.long], paths, work)
    assert isinstance(base, float)
    for (result, _), loss in zip(adapters, found, strict=True):
        if isinstance(loss, str):
            result.error = loss
        else:
            result.loss = loss
    return base


def alone(function: Callable[..., T], *arguments: Any) -> T:
    """`function` in a process of its own: torch's memory in this one would count as every run's (environments.Ran)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
