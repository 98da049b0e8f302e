"""Every sample goes through what training will do to it; what would break there is rejected here, with its reason."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medforge.config import DataConfig, ModelConfig
from medforge.dataset import Dataset, Reject, decode_image
from medforge.dataset_writer import DatasetWriter, refuse_overwrite
from medforge.files import list_files, sha256_file, write_json
from medforge.progress import Progress
from medforge.records import ImageRef, Sample
from medforge.validate import shards
from medforge.validate.checks import Checked, Repeats, check_sample
from medforge.validate.leakage import Holdings
from medforge.validate.leakage import report as leakage_report
from medforge.validate.shards import Task

if TYPE_CHECKING:
    from PIL.Image import Image

    from medforge.models.encode import Encoded, Seen

REPORT = "validation.json"
SHARED = "shared-with-test"
SOUND = (SHARED, "duplicate")  # nothing is wrong with these: they do not count for max_rejected
_CHUNK = 64
_IMAGES_A_WORKER = 1000
_EXAMPLES = 20
Settings = tuple[Path, Path, ModelConfig]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")


class WorkerKilledError(RuntimeError):
    """A worker process went away without an answer."""


def run(
    dataset: Path,
    model: Path,
    out: Path,
    data: DataConfig,
    model_config: ModelConfig,
    workers: int | None = None,
    checks: Sequence[Path] | None = None,
) -> dict[str, Any]:
    """Write the samples of `dataset` that training can use with the model in the folder `model` to `out`.

    Returns the report, which also stands in `out`/validation.json: counts, token and image statistics, leakage,
    conflicts, settings and digests. The result does not depend on `workers` (default: by the
    number of images and of processors), nor on whether the samples are checked here or were by the shards whose
    `checks` these are.

    Raises ValueError when more than `data.max_rejected` of the samples are broken (then `<out>.rejected.json` holds
    the report and every reject), or a split is left empty; WorkerKilledError when a worker process is killed.
    """
    refuse_overwrite(out)
    source = _open(dataset, model, workers)
    samples = [sample for split in source.splits() for sample in source.samples(split)]
    settings = _settings(model, data, model_config)
    if checks is None:
        tasks = _tasks(source)
        checked = _check(dataset, model, model_config, tasks, workers or _workers_for(samples))
    else:
        checked = shards.read(checks, source.digest, settings, _tasks(source))
    repeats = Repeats()
    kept, lengths, rejects = [], [], []
    for sample, result in zip(samples, checked, strict=True):
        problem = result.problems[0] if result.problems else repeats.add(sample)
        if problem:
            rejects.append((sample, _reject(sample, *problem)))
        else:
            kept.append(sample)
            lengths.append(result)
    held = Holdings.of(kept)
    leakage = leakage_report(kept, held, data.shared_images == "reject")
    if data.shared_images == "reject":
        shared = {s.id: what for s in kept if s.split != "test" and (what := held.shares(s, "test"))}
        detail = "its {} is also in the test split (data.shared_images is reject)"
        rejects += [(s, _reject(s, SHARED, detail.format(shared[s.id]))) for s in kept if s.id in shared]
        pairs = [(s, result) for s, result in zip(kept, lengths, strict=True) if s.id not in shared]
        kept, lengths = [s for s, _ in pairs], [result for _, result in pairs]
    report = {
        "schema_version": 1,
        "dataset_in": source.digest,
        "dataset_out": None,
        "counts": _counts(samples, kept, rejects),
        "tokens": _token_statistics(lengths),
        "images": _image_statistics(kept),
        "leakage": leakage,
        "conflicts": {"count": len(repeats.conflicts), "examples": repeats.conflicts[:_EXAMPLES]},
        "settings": settings,
    }
    failed = out.with_name(f"{out.name}.rejected.json")
    _refuse_too_many(samples, kept, rejects, report, data, failed)
    pixels = (model_config.min_pixels, model_config.max_pixels)
    about = source.manifest
    with DatasetWriter(
        out,
        about["source"],
        about["licence"],
        about["converter"]["name"],
        pixels,
        {REPORT: lambda manifest: report | {"dataset_out": manifest["root"]}},
    ) as writer:
        for reject in [*source.rejects(), *[reject for _, reject in rejects]]:
            writer.reject(reject)
        with Progress("writing the clean data set", len(kept), "sample") as progress:
            for sample in kept:
                writer.add(sample, [source.image_bytes(ref) for ref in sample.images])
                progress.advance()
    failed.unlink(missing_ok=True)
    return report | {"dataset_out": writer.manifest["root"]}


def run_shard(
    dataset: Path,
    model: Path,
    out: Path,
    data: DataConfig,
    model_config: ModelConfig,
    shard: int,
    workers: int | None = None,
) -> int:
    """Check the samples of shard number `shard` (from 0) of `data.shards`; the file `out` is for `run`'s `checks`.

    Returns how many samples were checked. Raises ValueError as `run` does for what is given.
    """
    if not 0 <= shard < data.shards:
        raise ValueError(f"shard {shard}: there are {data.shards} shards (data.shards), counted from 0")
    source = _open(dataset, model, workers)
    tasks = _tasks(source)[shard :: data.shards]
    samples = [sample for split, start, stop in tasks for sample in source.samples(split)[start:stop]]
    checked = list(_check(dataset, model, model_config, tasks, workers or _workers_for(samples)))
    shards.write(out, source.digest, _settings(model, data, model_config), (shard, data.shards), tasks, checked)
    return len(checked)


def _open(dataset: Path, model: Path, workers: int | None) -> Dataset:
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; at least 1 is needed")
    if not (model / "config.json").is_file():
        raise ValueError(f"{model}: has no config.json, so it is no model folder")
    return Dataset.open(dataset)


def _reject(sample: Sample, reason: str, detail: str) -> Reject:
    return Reject(sample.id, "validate", reason, f"{sample.split}: {detail}")


def _refuse_too_many(
    samples: Sequence[Sample],
    kept: Sequence[Sample],
    rejects: Sequence[tuple[Sample, Reject]],
    report: dict[str, Any],
    data: DataConfig,
    failed: Path,
) -> None:
    """ValueError, and the report and all rejects in `failed`, when too much was rejected or a split is left empty."""
    broken = [reject for _, reject in rejects if reject.reason not in SOUND]
    share = len(broken) / len(samples)
    empty = {s.split for s in samples} - {s.split for s in kept}
    if share <= data.max_rejected and not empty:
        return
    rows = [vars(reject) for _, reject in rejects]
    write_json(failed, {"report": report, "rejects": rows})
    told = broken if share > data.max_rejected else [reject for _, reject in rejects]
    reasons = Counter(reject.reason for reject in told).most_common()
    counts = ", ".join(f"{reason} {count}" for reason, count in reasons)
    worst = next(reject for reject in told if reject.reason == reasons[0][0])
    what = f"{len(broken)} of {len(samples)} samples ({share:.1%}) are broken, max_rejected is {data.max_rejected:.1%}"
    if empty and share <= data.max_rejected:
        what = f"no sample is left in {' and '.join(sorted(empty))}"
    raise ValueError(f"{what}: {counts}; such as {worst.id} ({worst.detail}); all of them are in {failed}")


# --- checking in parallel


def _tasks(source: Dataset) -> list[Task]:
    """All samples, in their order, as spans that are checked at once."""
    return [(split, *span) for split in source.splits() for span in _chunks(source.samples(split))]


def _check(dataset: Path, model: Path, config: ModelConfig, tasks: Sequence[Task], workers: int) -> Iterator[Checked]:
    """What `check_sample` says of every sample of `tasks`, in their order, whatever the number of workers."""
    total = sum(stop - start for _, start, stop in tasks)
    settings = (dataset, model, config)
    with Progress("validating", total, "sample") as progress:
        for results in _in_processes(settings, tasks, workers) if workers > 1 < len(tasks) else _here(settings, tasks):
            progress.advance(len(results))
            yield from results


def _chunks(samples: Sequence[Sample]) -> list[tuple[int, int]]:
    """Spans of about `_CHUNK` samples, cut where the image changes, so that an image is decoded once."""
    cuts = [0]
    for place in range(1, len(samples)):
        if place - cuts[-1] >= _CHUNK and samples[place].images != samples[place - 1].images:
            cuts.append(place)
    return list(zip(cuts, [*cuts[1:], len(samples)], strict=True))


def _here(settings: Settings, tasks: Sequence[Task]) -> Iterator[list[Checked]]:
    checker = _Checker(*settings)
    yield from map(checker.check, tasks)


def _in_processes(settings: Settings, tasks: Sequence[Task], workers: int) -> Iterator[list[Checked]]:
    from multiprocessing import get_context

    context = get_context("spawn")  # torch and its threads do not survive a fork
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_one_thread) as pool:
        waiting: list[Future[list[Checked]]] = []
        try:
            waiting += [pool.submit(_check_in_worker, settings, task) for task in tasks]
            for future in waiting:
                yield future.result()
        except BrokenProcessPool:
            raise WorkerKilledError(
                "a worker process was killed, most likely because memory ran out; "
                "use fewer workers or a smaller model.max_pixels"
            ) from None
        finally:
            for future in waiting:
                future.cancel()


def _one_thread() -> None:
    """One thread a worker: more would only fight with the other workers'."""
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _check_in_worker(settings: Settings, task: Task) -> list[Checked]:
    return _worker(settings).check(task)


@lru_cache(maxsize=1)
def _worker(settings: Settings) -> _Checker:
    """Built by the first task rather than when the process starts: there an error would only break the pool."""
    return _Checker(*settings)


class _Checker:
    """Data set and encoder, kept from one task to the next."""

    def __init__(self, dataset: Path, model: Path, config: ModelConfig) -> None:
        from medforge.models.encode import Encoder

        self.source = Dataset.open(dataset, verify=False)  # `run` verified it
        self.encoder = Encoder(model, config.min_pixels, config.max_pixels)
        self.max_length = config.max_length
        self.picture = lru_cache(maxsize=8)(self._picture)  # the samples of an image stand together
        self.seen: tuple[tuple[ImageRef, ...], Seen] | None = None

    def check(self, task: Task) -> list[Checked]:
        """What `check_sample` says of the samples of `task` = (split, start, stop)."""
        split, start, stop = task
        samples = self.source.samples(split)[start:stop]
        return [check_sample(sample, self._pictures, self._encode, self.max_length) for sample in samples]

    def _pictures(self, sample: Sample) -> list[Image]:
        return [self.picture(ref) for ref in sample.images]

    def _encode(self, sample: Sample, images: Sequence[Image]) -> Encoded:
        if self.seen is None or self.seen[0] != sample.images:
            self.seen = (sample.images, self.encoder.see(images))
        return self.encoder.encode(sample, self.seen[1])

    def _picture(self, ref: ImageRef) -> Image:
        return decode_image(self.source.image_bytes(ref))


def _workers_for(samples: Sequence[Sample]) -> int:
    """One a processor, but none with less than `_IMAGES_A_WORKER`: a process takes seconds to start."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    images = len({sample.images for sample in samples})
    return max(1, min(processors, images // _IMAGES_A_WORKER))


# --- the report


def _counts(
    samples: Sequence[Sample], kept: Sequence[Sample], rejects: Sequence[tuple[Sample, Reject]]
) -> dict[str, Any]:
    by_split: dict[str, Counter[str]] = defaultdict(Counter)
    for sample, reject in rejects:
        by_split[sample.split][reject.reason] += 1
    return {
        "in": dict(Counter(sample.split for sample in samples)),
        "kept": dict(Counter(sample.split for sample in kept)),
        "rejected": dict(sorted(Counter(reject.reason for _, reject in rejects).items())),
        "rejected_by_split": {split: dict(sorted(counts.items())) for split, counts in sorted(by_split.items())},
    }


def _token_statistics(results: Sequence[Checked]) -> dict[str, Any]:
    return {
        "length": statistics([r.length for r in results if r.length is not None]),
        "image": statistics([r.image_tokens for r in results if r.image_tokens is not None]),
        "answer": statistics([r.answer_tokens for r in results if r.answer_tokens is not None]),
    }


def _image_statistics(samples: Sequence[Sample]) -> dict[str, Any]:
    refs = {ref.sha256: ref for sample in samples for ref in sample.images}.values()
    return {
        "count": len(refs),
        "width": statistics([ref.width for ref in refs]),
        "height": statistics([ref.height for ref in refs]),
        "pixels": statistics([ref.width * ref.height for ref in refs]),
    }


def statistics(values: Sequence[int]) -> dict[str, int] | None:
    """min, median, p95 and max by nearest rank (each is one of the values); None without values."""
    if not values:
        return None
    ordered = sorted(values)
    percents = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: ordered[max(-(-percent * len(ordered) // 100) - 1, 0)] for name, percent in percents.items()}


def _settings(model: Path, data: DataConfig, config: ModelConfig) -> dict[str, Any]:
    """The settings that decide, and the SHA-256 of the model's small files: tokenizer, processor, template."""
    files = [name for name in list_files(model) if not name.endswith((*_WEIGHTS, ".index.json"))]
    return {
        "min_pixels": config.min_pixels,
        "max_pixels": config.max_pixels,
        "max_length": config.max_length,
        "shared_images": data.shared_images,
        "max_rejected": data.max_rejected,
        "processor": {name: sha256_file(model / name) for name in files},
    }
