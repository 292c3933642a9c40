"""The collector runs on the server's schedule, and the interpreter's own is put back."""

import asyncio
import gc

import pytest

from modelharbor.observability.garbage import MIDDLE, NEVER, YOUNG, collecting

pytestmark = pytest.mark.anyio


async def test_what_lives_is_frozen_and_no_full_collection_comes_by_chance() -> None:
    before = gc.get_threshold()
    async with collecting():
        assert gc.get_threshold() == (YOUNG, MIDDLE, NEVER)
        assert gc.get_freeze_count() > 100_000  # modules and schema
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


async def test_garbage_that_grew_old_is_collected_in_time() -> None:
    class Knot:
        def __init__(self) -> None:
            self.me = self

        def __del__(self) -> None:
            gone.set()

    gone = asyncio.Event()
    async with collecting(seconds=0.01):
        Knot()
        async with asyncio.timeout(10):
            await gone.wait()
