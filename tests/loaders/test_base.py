"""The DataLoader: where aiodataloader alone would answer wrong, or not at all."""

import asyncio
from contextvars import ContextVar
from typing import Any, cast

import pytest

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.errors import Unavailable
from modelharbor.loaders.base import Loader, Reads

pytestmark = pytest.mark.anyio

whose: ContextVar[str] = ContextVar("whose", default="nobody")


def reads() -> Reads:
    nothing = cast("Any", None)  # these loaders read nothing
    return Reads(
        database=nothing, cache=nothing, viewer=ANONYMOUS, links=DownloadLinks(b"", "http://test")
    )


class Doubling(Loader[int, int, str]):
    """Doubles; 13 fails, 99 takes for ever."""

    seen: list[tuple[list[int], str]]

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen = []

    async def batch_load(self, keys: list[int]) -> list[int | Exception]:
        self.seen.append((keys, whose.get()))
        if 99 in keys and len(self.seen) == 1:
            await asyncio.Event().wait()
        return [
            ValueError("unlucky") if key == 13 and len(self.seen) == 1 else key * 2 for key in keys
        ]


async def test_loads_of_one_tick_are_one_batch_and_counted() -> None:
    shared = reads()
    loader = shared.loader(Doubling, "x")
    found = await asyncio.gather(*[loader.load(key) for key in (1, 2, 1)])
    assert found == [2, 4, 2]
    assert [keys for keys, _ in cast("Doubling", loader).seen] == [[1, 2]]
    assert (shared.count.batches, shared.count.keys) == (1, 2)
    assert shared.loader(Doubling, "x") is loader
    assert shared.loader(Doubling, "y") is not loader


async def test_a_failed_key_is_asked_for_again() -> None:
    loader = reads().loader(Doubling, "x")
    good, bad = loader.load(1), loader.load(13)
    assert await good == 2
    with pytest.raises(ValueError, match="unlucky"):
        await bad
    assert await loader.load(13) == 26
    assert [keys for keys, _ in cast("Doubling", loader).seen] == [[1, 13], [13]]


async def test_a_cancelled_waiter_does_not_spoil_the_key() -> None:
    loader = reads().loader(Doubling, "x")

    async def wait() -> int:
        found: int = await loader.load(99)
        return found

    waiter = asyncio.create_task(wait())
    await asyncio.sleep(0.01)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    async with asyncio.timeout(5):
        assert await loader.load(99) == 198


class Cancelling(Loader[int, int, None]):
    async def batch_load(self, keys: list[int]) -> list[int]:
        raise asyncio.CancelledError


async def test_a_cancelled_batch_fails_its_waiters() -> None:
    loader = reads().loader(Cancelling, None)
    async with asyncio.timeout(5):
        results = await asyncio.gather(loader.load(1), loader.load(2), return_exceptions=True)
    assert [type(result) for result in results] == [Unavailable, Unavailable]


async def test_a_batch_runs_in_the_context_of_its_operation() -> None:
    token = whose.set("operation")
    loader = reads().loader(Doubling, "x")
    whose.reset(token)

    async def first_caller() -> int:
        whose.set("first caller")
        found: int = await loader.load(1)
        return found

    assert await asyncio.create_task(first_caller()) == 2
    assert cast("Doubling", loader).seen == [([1], "operation")]
