"""Several processes for one stage: torchrun on this machine, one process a device.

On several machines, each does this, and torchrun's own variables (PET_…) say which machine it is: see `node`.

python -m medforge.train.launch JOB.json N [--standalone]   starts torchrun (called by `launch`)
python -m medforge.train.launch JOB.json                    is what each process runs
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from medforge.files import write_atomic
from medforge.lifetime import end_with_parent
from medforge.train.job import Job

_TAIL = 2000  # characters of a failed process's error that are told


def launch(job: Job) -> None:
    """Train the stage in `job.parallel.processes` processes and wait for them. SIGTERM is passed on.

    Raises ValueError with the first process's own words when the stage fails, SystemExit(143) when it was stopped.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    path = job.work / "job.json"
    error = job.work / "error.txt"
    error.unlink(missing_ok=True)
    write_atomic(path, job.model_dump_json())
    place = ["--standalone"] if job.parallel.nodes == 1 else []
    command = [sys.executable, "-m", "medforge.train.launch", str(path), str(job.parallel.processes), *place]
    threads = max(1, (os.cpu_count() or 1) // job.parallel.processes)
    environment = {"OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "6000"} | os.environ
    with subprocess.Popen(command, env=environment) as child:  # noqa: S603  our own module and paths
        before = _forward(child)
        try:
            code = child.wait()
        finally:
            if before is not None:
                signal.signal(signal.SIGTERM, before)
    if error.is_file():
        raise ValueError(error.read_text(encoding="utf-8"))
    if code in (143, -signal.SIGTERM):
        raise SystemExit(143)
    if code:
        raise RuntimeError(
            f"stage {job.stage.name!r}: the training processes ended with {code}; see their output above"
        )


def _forward(child: subprocess.Popen[bytes]) -> Any:
    import threading

    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))


def _agent(path: Path, processes: int, place: list[str]) -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main

    end_with_parent()
    try:
        main([*place, "--nproc-per-node", str(processes), "-m", "medforge.train.launch", str(path)])
    except SignalException as error:  # it has passed the signal on and waited; Python would end with 1
        raise SystemExit(128 + error.sigval) from None


def _process(path: Path) -> None:
    """One process. The first error of any of them is written where `launch` finds it."""
    from medforge.train.stage import train

    end_with_parent()
    job = Job.model_validate_json(path.read_text(encoding="utf-8"))
    try:
        train(job)
    except (ValueError, OSError) as error:
        try:
            with (job.work / "error.txt").open("x", encoding="utf-8") as stream:
                stream.write(str(error)[-_TAIL:])
        except FileExistsError:
            pass  # another process was first
        raise SystemExit(1) from None


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _agent(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    else:
        _process(Path(sys.argv[1]))
