"""Work that ends with its client."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.gateway.context import ClientGone, while_connected


class Client:
    """`receive` of a client that hangs up when it is told to; `asked` says whether anybody listened for that."""

    def __init__(self) -> None:
        self.asked, self.left = 0, asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        await self.left.wait()
        return {"type": "http.disconnect"}


def test_work_that_is_done_at_once_is_not_watched() -> None:
    async def test() -> None:
        client = Client()

        async def work() -> str:
            await asyncio.sleep(0)
            return "done"

        assert await while_connected(client.receive, work()) == "done"
        client.left.set()
        await asyncio.sleep(0.2)  # whoever watched on would cancel this
        assert client.asked == 0

    asyncio.run(test())


@pytest.mark.parametrize("leaves_after", [0.0, 0.2])
def test_work_is_cancelled_whenever_the_client_leaves(leaves_after: float) -> None:
    async def test() -> None:
        client, cancelled = Client(), asyncio.Event()

        async def work() -> None:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                cancelled.set()
                raise

        asyncio.get_running_loop().call_later(leaves_after, client.left.set)
        with pytest.raises(ClientGone):
            await while_connected(client.receive, work())
        assert cancelled.is_set()

    asyncio.run(asyncio.wait_for(test(), 10))


def test_a_cancellation_from_elsewhere_is_not_the_clients() -> None:
    async def test() -> None:
        task = asyncio.create_task(while_connected(Client().receive, asyncio.sleep(30)))
        await asyncio.sleep(0.2)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(test())
