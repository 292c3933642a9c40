"""Reads of many operations that wait for the database at the same time go as one.

No cache: a read goes to the database after all who take part in it have asked. While enough reads of
one kind are under way, those that come meanwhile wait for each other, and form the next one. Of one
kind are reads by the same loader with equal arguments and stored names, for viewers with equal
rights; what comes out is shared, and only ever read.
"""

import asyncio
from collections.abc import Callable, Hashable, Mapping
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Any, Final

from pymongo.errors import ConnectionFailure, ExecutionTimeout

from modelharbor.observability.commands import CommandCount, counted

from .base import Loader, Sharing

UNDER_WAY: Final = 1
"""Reads of one kind at the same time, before others wait: measured in docs/performance.md."""


@dataclass(slots=True, eq=False)
class _Waiting:
    loader: Loader[Any, Any, Any]
    keys: list[Any]
    answer: "asyncio.Future[Mapping[Any, Any]]"
    count: CommandCount | None


@dataclass(slots=True, eq=False)
class _Lane:
    under_way: int = 0
    waiting: list[_Waiting] = field(default_factory=list)


class _Kind:
    """What reads have in common; hashed once."""

    __slots__ = ("_hash", "parts")

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.parts = parts
        self._hash = hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Kind) and self.parts == other.parts)


class Lanes:
    """The kinds of reads that are under way in one process."""

    def __init__(
        self, under_way: int = UNDER_WAY, merged: Callable[[int], None] = lambda reads: None
    ) -> None:
        """`merged` is told how many reads went with another one."""
        self.under_way, self.merged = under_way, merged
        self._lanes: dict[_Kind, _Lane] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def load(self, loader: Loader[Any, Any, Any], keys: list[Any]) -> Mapping[Any, Any]:
        """The answers of `loader.batch_load(keys)` by key; there may be other keys among them."""
        rights: Hashable = None
        if loader.sharing is Sharing.NEVER:
            return await loader.found(keys)
        if loader.sharing is Sharing.EQUAL_RIGHTS:
            rights = loader.reads.viewer.principals
        kind = _Kind((type(loader), loader.arguments, loader.fields, rights))
        lane = self._lanes.get(kind)
        if lane is None:
            lane = self._lanes[kind] = _Lane()
        if lane.under_way >= self.under_way:
            answer = asyncio.get_running_loop().create_future()
            lane.waiting.append(_Waiting(loader, keys, answer, counted.get()))
            found: Mapping[Any, Any] = await answer
            return found
        lane.under_way += 1
        try:
            return await loader.found(keys)
        finally:
            self._ended(kind, lane)

    def _ended(self, kind: _Kind, lane: _Lane) -> None:
        lane.under_way -= 1
        lane.waiting = [each for each in lane.waiting if not each.answer.done()]
        if not lane.waiting:
            if not lane.under_way:
                self._lanes.pop(kind, None)
            return
        taken, keys = 0, 0
        for each in lane.waiting:
            keys += len(each.keys)
            if taken and keys > each.loader.most_keys:
                break
            taken += 1
        together, lane.waiting = lane.waiting[:taken], lane.waiting[taken:]
        lane.under_way += 1
        # A context of its own: the read belongs to no single operation.
        task = asyncio.get_running_loop().create_task(
            self._read(kind, lane, together), context=Context()
        )
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _read(self, kind: _Kind, lane: _Lane, together: list[_Waiting]) -> None:
        try:
            if len(together) > 1:
                self.merged(len(together) - 1)
            await _answer(together)
        finally:
            self._ended(kind, lane)


async def _answer(together: list[_Waiting]) -> None:
    """One read for all of them; each alone where that fails, so that one's keys fail only itself."""
    count = CommandCount()
    token = counted.set(count)
    keys = list(dict.fromkeys(key for each in together for key in each.keys))
    first = together[0].loader
    # Without what its operation has read before: the others may have asked after a change.
    loader = first.of_batch(replace(first.reads, _loaders={}), first.arguments, first.fields)
    try:
        found = dict(zip(keys, await loader.batch_load(keys), strict=True))
    except Exception as error:
        left = [each for each in together if not each.answer.done()]
        if _is_of_keys(error) and any(each.keys != keys for each in left):
            await asyncio.gather(*[_answer([each]) for each in left])
            return
        for each in together:
            if not each.answer.done():
                each.answer.set_exception(error)
    except asyncio.CancelledError:  # the process ends
        for each in together:
            each.answer.cancel()
        raise
    else:
        for each in together:
            if not each.answer.done():
                each.answer.set_result(found)
    finally:
        counted.reset(token)
        # An operation may wait for it at several places.
        for waiting in {id(each.count): each.count for each in together}.values():
            if waiting is not None:
                waiting.add(count)


def _is_of_keys(error: Exception) -> bool:
    """Whether without some of the keys it might not have happened: not when MongoDB is gone or slow."""
    return not isinstance(error, ConnectionFailure | ExecutionTimeout)
