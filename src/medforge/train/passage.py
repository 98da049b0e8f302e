"""How a stage's inputs and outputs pass between the step that asks for several machines and those machines.

trainjobs/inputs/<digest>/        the base, the data set, the adapters before: each sent once
trainjobs/<id>/job.json           the stage; the id is the digest of all that decides its result
trainjobs/<id>/checkpoints/       where the run names no place for them
trainjobs/<id>/out/, logs/        what node 0 made; done.json is written last
trainjobs/<id>/error.txt          what a node said before it failed
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medforge.dataset import Dataset
from medforge.files import canonical_json, sha256_json, tree_digest
from medforge.storage import Store, parse_url
from medforge.train.job import Job

ROOT = "trainjobs"
_FOLDERS = ("base", "dataset", "adapters")


@dataclass(frozen=True)
class Passage:
    """The place of one stage in the object store."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, url: str) -> Passage:
        """The place that `url` names."""
        return cls(*parse_url(url))

    @property
    def url(self) -> str:
        """s3://bucket/prefix."""
        return f"s3://{self.bucket}/{self.prefix}"

    @property
    def id(self) -> str:
        """The digest of all that decides the stage's result."""
        return self.prefix.rsplit("/", 1)[-1]

    def key(self, name: str) -> str:
        """The key of an object of this place."""
        return f"{self.prefix}/{name}"

    def is_done(self, store: Store) -> bool:
        """Whether the stage's result stands here."""
        return store.exists(self.bucket, self.key("done.json"))

    def error(self, store: Store) -> str:
        """What the first node that failed said; empty without one."""
        key = self.key("error.txt")
        return store.get(self.bucket, key).decode() if store.exists(self.bucket, key) else ""


def send(store: Store, bucket: str, job: Job) -> Passage:
    """Bring the job with its inputs to the store; what stands there already is not sent again. Returns its place."""
    identity = job.identity(Dataset.open(job.dataset, verify=False).digest)
    given = {name: getattr(job, name) for name in _FOLDERS}
    digests = {name: tree_digest(path) for name, path in given.items() if path}
    # the stage's own folders are each node's; another number of machines goes on from the same checkpoints
    passage = Passage(bucket, f"{ROOT}/{sha256_json([identity, digests])[:32]}")
    store.ensure_bucket(bucket)
    for name, digest in digests.items():
        store.upload_folder(given[name], bucket, f"{ROOT}/inputs/{digest}")
    kept = job.checkpoints
    if not kept.url:
        kept = kept.model_copy(update={"url": f"{passage.url}/checkpoints"})
    told = {
        "inputs": digests,
        "stage": job.stage.model_dump(mode="json"),
        "model": job.model.model_dump(mode="json"),
        "parallel": job.parallel.model_dump(mode="json"),
        "checkpoints": kept.model_dump(mode="json"),
        "seed": job.seed,
    }
    store.remove(bucket, passage.key("error.txt"))
    store.put(bucket, passage.key("job.json"), canonical_json(told))
    return passage


def receive(store: Store, passage: Passage, folder: Path) -> Job:
    """The job with its inputs, in `folder` of this machine."""
    told = store.get_json(passage.bucket, passage.key("job.json"))
    inputs = told.pop("inputs")
    for name, digest in inputs.items():
        store.download_folder(passage.bucket, f"{ROOT}/inputs/{digest}", folder / name)
    places = {name: folder / name if name in inputs else None for name in _FOLDERS}
    places |= {name: folder / name for name in ("out", "work", "logs", "features")}
    return Job.model_validate(told | places)


def deliver(store: Store, passage: Passage, job: Job) -> None:
    """Bring node 0's result to the store; what an attempt before left there by half gives way."""
    for name, folder in (("out", job.out), ("logs", job.logs)):
        for entry in store.list(passage.bucket, passage.key(f"{name}/")):
            store.remove(passage.bucket, entry.key)
        store.upload_folder(folder, passage.bucket, passage.key(name))
    store.put(passage.bucket, passage.key("done.json"), canonical_json({"out": tree_digest(job.out)}))


def collect(store: Store, passage: Passage, job: Job) -> None:
    """Fetch the result to the job's own folders. ValueError if it is not what node 0 made."""
    done = store.get_json(passage.bucket, passage.key("done.json"))
    store.download_folder(passage.bucket, passage.key("out"), job.out)
    store.download_folder(passage.bucket, passage.key("logs"), job.logs)
    if tree_digest(job.out) != done["out"]:
        raise ValueError(f"{passage.url}/out: is not what node 0 made; remove {passage.url}/done.json and try again")
