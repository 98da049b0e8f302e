"""A process that works on jobs, to be killed: `python -m tests.integration.serving.job_process FOLDER URL`.

It writes the number of each item that it begins to FOLDER/begun.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from serving.gateway import api
from serving.gateway.images import Picture
from serving.gateway.jobs import store_of
from serving.gateway.parts import Context, Parts
from serving.gateway.worker import Worker
from tests.unit.gateway.keeping import answered, keeping


async def main(folder: Path, url: str) -> None:
    async def read(_: api.DiagnoseRequest) -> Sequence[Picture]:
        return []

    async def diagnose(
        parts: Parts, question: api.Question, _: Sequence[Picture], context: Context
    ) -> api.DiagnoseResponse:
        with (folder / "begun").open("a") as stream:
            stream.write(f"{context.request_id}\n")
        await asyncio.sleep(0.05)
        return answered(context.request_id, f"to {question.question}")

    with keeping(folder, database=url) as parts:
        await Worker(parts, store_of(parts), read, diagnose, lease=1.5, poll=0.05).start()
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
