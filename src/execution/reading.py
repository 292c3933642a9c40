"""One run of a plan: its reads, and what they found, for graphql-core to make an answer of where the
plan cannot; and what an answer is kept by."""

import asyncio
import logging
from collections.abc import Coroutine, Hashable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, TypeVar

from bson import ObjectId
from graphql.execution.values import VariableValues

from modelharbor.cache.entries import Access
from modelharbor.cache.tags import Tag
from modelharbor.context import Context
from modelharbor.db.base import Row
from modelharbor.loaders.base import ROOT, Loader

from .failures import expected
from .plan import Step, Unplanned

T = TypeVar("T")
log = logging.getLogger(__name__)
Recorded = dict[tuple[type[Loader[Any, Any, Any]], Hashable], dict[Any, Any]]


@dataclass(frozen=True, slots=True)
class Read:
    """What an answer was made of."""

    tags: frozenset[Tag]
    access: Access
    position: int
    """Cluster time of before the first read: all changes up to it are in the answer."""
    age: float = 0.0
    """Seconds that the oldest part of it has been kept elsewhere: it may be kept so much shorter."""


class _Refused(dict[Any, Any]):
    """What was found with arguments that are refused: a failure, whatever is looked up."""

    def get(self, key: Any, default: Any = None) -> Any:
        return _FAILURE


_FAILURE: Final = Unplanned()
REFUSED: Final = _Refused()


class Run:
    """What the function of a plan is called with."""

    __slots__ = ("_found", "_steps", "_tasks", "context", "given", "top", "values", "viewer")

    def __init__(
        self,
        steps: Mapping[int, Step],
        context: Context,
        values: VariableValues,
        given: Mapping[str, Any],
        top: Row | None = None,
    ) -> None:
        """`top`: what the root fields read; the event of a subscription."""
        self.top: Row = {} if top is None else top
        self._steps, self.context, self.viewer = steps, context, context.viewer
        self.values, self.given = values, given
        self._found: list[tuple[Step, Loader[Any, Any, Any], list[Any], Mapping[Any, Any]]] = []
        self._tasks: list[asyncio.Task[Any]] = []

    async def read(self, number: int, keys: list[Any]) -> Mapping[Any, Any]:
        """What was found, or the exception, by key; one that is missing is None."""
        if not keys:
            return {}
        step = self._steps[number]
        arguments = None
        if step.binder is not None:
            try:
                arguments = step.binder(self.values, self.given)
            except Exception:
                return REFUSED
        return await self._batch(step, arguments, keys)

    async def read_by_arguments(self, number: int) -> Mapping[Any, Any]:
        """The same where the arguments make the one key; the answer stands at ROOT."""
        step = self._steps[number]
        assert step.binder is not None
        try:
            key = step.binder(self.values, self.given)
        except Exception:
            return REFUSED
        if key is None:
            return {}
        found = await self._batch(step, None, [key])
        return {ROOT: found.get(key)}

    def begin(self, read: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(read)
        self._tasks.append(task)
        return task

    def end(self) -> None:
        """Whatever still runs is not wanted any more."""
        for task in self._tasks:
            task.cancel()

    async def _batch(self, step: Step, arguments: Hashable, keys: list[Any]) -> Mapping[Any, Any]:
        context = self.context
        context.count.batches += 1
        context.count.keys += len(keys)
        loader = step.loader.of_batch(context, arguments, step.reads)
        found: Mapping[Any, Any]
        try:
            if context.lanes is None:
                found = await loader.found(keys)
            else:
                found = await context.lanes.load(loader, keys)
        except Exception as error:
            if expected(error) is None:
                raise  # the plan's own mistake, perhaps: graphql-core reads it anew
            found = dict.fromkeys(keys, error)
        self._found.append((step, loader, keys, found))
        return found

    def what_was_read(self, position: int) -> Read | None:
        """Of an answer of the plan; None where a loader cannot tell."""
        tags: set[Tag] = set()
        access, age = Access.ANYBODY, 0.0
        try:
            for _, loader, keys, found in self._found:
                told = loader.tags(keys, found)
                if told is None:
                    return None
                tags.update(told)
                if access is not Access.VIEWER:
                    access = max(access, loader.access(keys, found), key=_by_value)
                age = max(age, loader.age(keys, found))
        except Exception:
            log.exception("answer.not_told")
            return None
        return Read(frozenset(tags), access, position, age)

    def viewed(self) -> tuple[ObjectId, ...]:
        """The models that an answer of the plan shows by their own field, each once."""
        found: dict[ObjectId, None] = {}
        for step, _, keys, rows in self._found:
            if shows := step.loader.shows:
                found.update((row[shows], None) for key in keys if (row := rows.get(key)))
        return tuple(found)

    def replayed(self) -> Context:
        """A context for graphql-core, whose loaders know what was found.

        Read anew, whole, are rows that were read with different names at different places, and such
        of which parts of an embedded document were read: where it is none, that cannot be told.
        """
        recorded: Recorded = {}
        names: dict[Any, set[frozenset[str]]] = {}
        for step, loader, keys, found in self._found:
            identity = (step.loader, loader.arguments)
            names.setdefault(identity, set()).add(step.reads)
            there = recorded.setdefault(identity, {})
            there.update((key, found.get(key)) for key in keys)
        for identity, different in names.items():
            if len(different) > 1 or any("." in name for reads in different for name in reads):
                del recorded[identity]
        values = {name: getattr(self.context, name) for name in _SHARED}
        return _Replayed(**values, live=self.context, recorded=recorded)


def viewed_in(context: Context, data: Mapping[str, Any]) -> tuple[ObjectId, ...]:
    """The same of an answer that graphql-core has made."""
    found: dict[ObjectId, None] = {}
    for name, shows, row in context.shown:
        if data.get(name) is not None:
            found[row.result()[shows]] = None
    return tuple(found)


_by_value = attrgetter("value")
_SHARED = (
    "database",
    "cache",
    "viewer",
    "links",
    "quota_bytes",
    "export_link_minutes",
    "max_analytics_buckets",
    "max_analytics_models",
    "lanes",
    "count",
    "settings",
    "storage",
    "request_id",
    "spending",
    "caches",
    "shown",
)


@dataclass(kw_only=True)
class _Replayed(Context):
    """Fields get loaders that know what was found; what those read by others themselves is read anew,
    for the rows found hold no more names than the plan's fields read."""

    live: Context
    recorded: Recorded

    def loader(self, loader: Any, arguments: Any) -> Any:
        found = self._loaders.get((loader, arguments))
        if found is None:
            found = self._loaders[loader, arguments] = loader(self.live, arguments)
            found.recorded = self.recorded.get((loader, arguments), {})
        return found
