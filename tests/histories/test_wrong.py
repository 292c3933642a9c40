"""Wrong caches are convicted: without this, a history without a verdict would say nothing."""

import asyncio
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .checker import Kind
from .run import History, Load, history, lines, stage
from .wrong import Kept, WrongCache

pytestmark = pytest.mark.anyio
SECONDS = 2.0
LOAD = Load(readers=4, writers=2, by_socket=0)
WRONG: dict[str, tuple[dict[str, Any], Load, Kind]] = {
    "for 300 ms": ({}, LOAD, Kind.STALE),
    "until a mutation of its own": ({"seconds": 9, "forgets": True}, LOAD, Kind.STALE),
    "until a mutation": (
        {"seconds": 9, "forgets": True, "hears": True},
        Load(readers=4, writers=0, by_socket=0),
        Kind.OUTSIDE,
    ),
    "for whoever asks": (
        {"seconds": 9, "forgets": True, "hears": True, "mixes": True},
        Load(readers=4, writers=1, direct=0, by_socket=0),
        Kind.HIDDEN,
    ),
}


def convicts(kind: Kind, made: History) -> bool:
    return kind in made.judged().kinds


async def test_wrong_caches_are_convicted(tmp_path: Path) -> None:
    async with stage(tmp_path, servers=1, response_cache=False) as staged:
        [server] = staged.processes
        for number, (name, (options, load, expected)) in enumerate(WRONG.items()):
            kept = Kept()
            caches = [WrongCache(each, lambda: server.port, kept, **options) for each in "AB"]
            async with AsyncExitStack() as stack:
                for cache in caches:
                    await stack.enter_async_context(cache.running())
                async with asyncio.timeout(120):
                    found = await history(
                        staged.database,
                        caches,
                        SECONDS,
                        number,
                        load,
                        enough=partial(convicts, expected),
                        looks=False,
                    )
            judged = found.judged()
            assert expected in judged.kinds, "\n".join([name, *lines(judged, found.log, SECONDS)])
            for collection in await staged.database.data.list_collection_names():
                if collection != "migrations":
                    await staged.database.data[collection].delete_many({})
