"""One of several machines that train a stage: `python -m medforge.train.node s3://bucket/trainjobs/<id>`.

It fetches the job, starts torchrun with this machine's processes, and node 0 brings the result back. Which node this is
and where node 0 listens, Kubeflow's trainer says in the variables that torchrun reads: PET_NNODES, PET_NPROC_PER_NODE,
PET_NODE_RANK, PET_MASTER_ADDR, PET_MASTER_PORT.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from medforge.storage import connect
from medforge.train import passage
from medforge.train.launch import launch

_NEEDED = ("PET_NNODES", "PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT")


def run(url: str, folder: Path, environment: Mapping[str, str]) -> None:
    """Do this machine's part of the job at `url`, in `folder`.

    Raises ValueError when a variable is missing or the job cannot be trained, SystemExit(143) after SIGTERM. The first
    node's words are then in the store, for the step that waits.
    """
    if missing := [name for name in _NEEDED if not environment.get(name)]:
        raise ValueError(f"{', '.join(missing)} is not set: this is no pod of a TrainJob with a torch runtime")
    place = passage.Passage.of(url)
    with connect(create=False) as store:
        if place.is_done(store):
            return
        try:
            job = passage.receive(store, place, folder)
            if (nodes := int(environment["PET_NNODES"])) != job.parallel.nodes:
                raise ValueError(f"the TrainJob has {nodes} nodes, the run's parallel.nodes is {job.parallel.nodes}")
            launch(job)
            if environment["PET_NODE_RANK"] == "0":
                passage.deliver(store, place, job)
        except (ValueError, OSError, RuntimeError) as error:
            if not place.error(store):
                words = f"node {environment['PET_NODE_RANK']}: {error}"
                store.put(place.bucket, place.key("error.txt"), words.encode())
            raise


def main() -> int:
    """Run it as the command line says. Returns 0, or 1 with the reason."""
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory(prefix="medforge-node-") as folder:
            run(sys.argv[1], Path(folder), os.environ)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"node: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
