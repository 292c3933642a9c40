"""What stands between the loaders and the database: reads that fail on purpose, and reads that are kept.

Both engines group keys in their own way. So a failure follows from the loader, its arguments and the
key alone, and what was read is kept for each key.
"""

import asyncio
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cache
from hashlib import blake2b
from random import Random
from typing import Any, Final
from unittest.mock import patch

from pymongo.errors import AutoReconnect, ExecutionTimeout

from modelharbor.context import Context
from modelharbor.db.keyset import Filter
from modelharbor.errors import BadUserInput, Forbidden, Unavailable
from modelharbor.loaders.base import Loader

from .spots import Spot

KINDS: Final = (
    lambda: Unavailable("Injected: not there."),
    lambda: Forbidden("Injected: may not.", needs=["READ"]),
    lambda: BadUserInput("Injected: " + "long " * 100),
    lambda: AutoReconnect("injected"),
    lambda: ExecutionTimeout("injected", 50),
    lambda: RuntimeError("injected"),
    lambda: KeyError("injected"),
)
TURNS: Final = (0, 0, 0, 1, 2, 4, 8, 16, 32)  # of the event loop, by which a read may be late
MOST_KEPT: Final = 50_000


def stable(value: Any) -> str:
    """A text for a key or for arguments that is the same in every process."""
    if isinstance(value, Filter):
        return value.raw.hex()
    if is_dataclass(value) and not isinstance(value, type):
        inner = ",".join(stable(getattr(value, each.name)) for each in fields(value))
        return f"{type(value).__name__}({inner})"
    if isinstance(value, frozenset):
        return "{" + ",".join(sorted(map(stable, value))) + "}"
    if isinstance(value, tuple | list):
        return "[" + ",".join(map(stable, value)) + "]"
    return repr(value)


@dataclass(frozen=True)
class Failures:
    """Which reads fail, as a pure function of a seed."""

    seed: int

    def of_batch(self, loader: Loader[Any, Any, Any]) -> Exception | None:
        return self._drawn(0.05 if self.seed % 2 else 0.0, loader, "")

    def of_key(self, loader: Loader[Any, Any, Any], key: Any) -> Exception | None:
        return self._drawn(0.0 if self.seed % 4 == 1 else 0.06, loader, stable(key))

    def _drawn(self, share: float, loader: Loader[Any, Any, Any], key: str) -> Exception | None:
        if not share:
            return None
        text = f"{self.seed}/{type(loader).__name__}/{stable(loader.arguments)}/{key}"
        digest = blake2b(text.encode(), digest_size=8).digest()
        if int.from_bytes(digest[:4], "big") >= share * 2**32:
            return None
        return KINDS[digest[4] % len(KINDS)]()


@cache
def reads_by_others(loader: type[Loader[Any, Any, Any]]) -> bool:
    """Whether other loaders have a part in its answers, with their failures and damage."""
    sources = [inspect.getsource(each) for each in loader.__mro__[: loader.__mro__.index(Loader)]]
    return any("reads.loader(" in each or "with_holders(" in each for each in sources)


class Kept:
    """Answers of loaders by key, so that most cases need no database.

    What is kept is answered without waiting: the order in which reads end is then always the same.
    """

    def __init__(self) -> None:
        self.found: dict[Any, Any] = {}

    async def load(self, scope: Any, loader: Any, keys: list[Any], read: Any) -> dict[Any, Any]:
        place = (scope, type(loader), loader.arguments, loader.fields)
        if len(self.found) > MOST_KEPT:
            self.found.clear()
        known = self.found.setdefault(place, {})
        missing = [key for key in keys if key not in known]
        if missing:
            for key, value in zip(missing, await read(missing), strict=True):
                known[key] = value
        return {key: known[key] for key in keys}


@dataclass
class Seen:
    """What one run met."""

    shapes: set[str] = field(default_factory=set)


@dataclass(kw_only=True)
class FuzzContext(Context):
    """A context whose loaders go through `guarded`."""

    failures: Failures | None
    kept: Kept | None
    scope: str
    seen: Seen
    spot: Spot | None
    delays: Random | None
    """Where reads are to end in another order than they began."""
    exists: frozenset[Any]
    """All ids of the data set: a row that is there but is not answered is forbidden or deleted."""


async def guarded(loader: Any, context: FuzzContext, read: Any, keys: list[Any]) -> Sequence[Any]:
    """`batch_load` of a loader, with failures put in and answers kept."""
    if context.delays is not None:
        for _ in range(context.delays.choice(TURNS)):
            await asyncio.sleep(0)
    failures = context.failures
    answers: dict[Any, Any] = {}
    wanted = keys
    if failures is not None:
        failed = failures.of_batch(loader)
        if failed is not None:
            context.seen.shapes.add("batch failure")
            raise failed
        for key in keys:
            error = failures.of_key(loader, key)
            if error is not None:
                answers[key] = error
        if answers:
            context.seen.shapes.add("key failure")
            wanted = [key for key in keys if key not in answers]
    if wanted:
        if context.kept is None:
            answers.update(zip(wanted, await read(wanted), strict=True))
        else:
            scope: Any = context.scope
            kind: Any = type(loader)
            if reads_by_others(kind):
                scope = (context.scope, failures, context.spot)
            answers.update(await context.kept.load(scope, loader, wanted, read))
    for key in wanted:
        if answers[key] is None:
            context.seen.shapes.add(
                "forbidden object" if key in context.exists else "missing relation"
            )
    if context.spot is not None:
        return [context.spot.damaged(answers[key]) for key in keys]
    return [answers[key] for key in keys]


def guard(loader: Any, reads: Any) -> None:
    if isinstance(reads, FuzzContext):
        read = loader.batch_load

        async def batch_load(keys: list[Any]) -> Sequence[Any]:
            return await guarded(loader, reads, read, keys)

        loader.batch_load = batch_load


@contextmanager
def intercepted() -> Iterator[None]:
    """Loaders made for a FuzzContext are guarded while this is open."""
    begin, of_batch = Loader.__init__, Loader.of_batch

    def begun(self: Any, reads: Any, *arguments: Any, **named: Any) -> None:
        begin(self, reads, *arguments, **named)
        guard(self, reads)

    def made(cls: Any, reads: Any, *arguments: Any, **named: Any) -> Any:
        found = of_batch.__func__(cls, reads, *arguments, **named)  # type: ignore[attr-defined]  # a method has it
        guard(found, reads)
        return found

    with (
        patch.object(Loader, "__init__", begun),
        patch.object(Loader, "of_batch", classmethod(made)),
    ):
        yield
