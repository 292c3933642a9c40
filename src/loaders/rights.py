"""Which of a viewer's principals stand in some model: all that answers about models may depend on.

Who has nothing private of their own thus shares the answers of everybody. That a principal stands
nowhere is known until a model comes that has it; that it stands somewhere, until principals change.
"""

import asyncio
from collections.abc import Collection
from contextvars import Context
from copy import copy
from dataclasses import dataclass
from typing import Final, Protocol

from bson import MinKey

from modelharbor.auth.viewer import OPERATOR, PUBLIC, Viewer
from modelharbor.cache.tags import Tag, added, changed, gone, of_principal
from modelharbor.db.base import Row
from modelharbor.db.connection import Database

MOST: Final = 20_000  # principals, and viewers, of whom something is known
_ANY_STATE: Final[Row] = {"state": {"$gte": MinKey()}}
"""Whatever it is: so the indexes that begin with it are of use, and three keys are looked at."""


class Fresh(Protocol):
    """What is asked of cache/freshness.py."""

    @property
    def position(self) -> int: ...

    @property
    def version(self) -> int: ...

    def is_current(self, position: int, tags: Collection[Tag]) -> bool: ...


@dataclass(frozen=True, slots=True)
class _Fact:
    stands: bool
    position: int
    tags: frozenset[Tag]


class Rights:
    """What one process knows."""

    def __init__(self, database: Database, freshness: Fresh, most: int = MOST) -> None:
        self._database, self._freshness, self._most = database, freshness, most
        self._facts: dict[str, _Fact] = {}
        self._known: dict[tuple[str, ...], tuple[str, int]] = {}
        self._looking: dict[str, asyncio.Task[_Fact]] = {}

    async def of(self, viewer: Viewer) -> str:
        """The principals that matter, joined by spaces; to be asked once what is kept may be used."""
        principals = viewer.principals
        if len(principals) == 1:
            return principals[0]
        version = self._freshness.version
        known = self._known.get(principals)
        if known is not None and known[1] == version:
            return known[0]
        facts = {each: self._current(each) for each in principals if each != PUBLIC}
        missing = [each for each, fact in facts.items() if fact is None]
        if missing:
            read = await asyncio.gather(*map(self._read, missing))
            facts.update(zip(missing, read, strict=True))
        found = [each for each, fact in facts.items() if fact is not None and fact.stands]
        text = " ".join([PUBLIC, *sorted(found)])
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[principals] = (text, version)
        return text

    async def are_all(self, viewer: Viewer, rights: str) -> bool:
        """Whether the principals that were left out of `rights` stand in no model now: what was read
        without them is then what the viewer may see."""
        left = sorted({*viewer.principals} - {*rights.split(" "), OPERATOR})
        if not left:
            return True
        query = {**_ANY_STATE, "principals": {"$in": left}}
        return not await self._database.find("models", query, projection={"_id": 1}, limit=1)

    def _current(self, principal: str) -> _Fact | None:
        fact = self._facts.get(principal)
        if fact is not None and self._freshness.is_current(fact.position, fact.tags):
            return fact
        return None

    async def _read(self, principal: str) -> _Fact:
        """One read for all who ask at the same time, as far as it is not too old for the later ones."""
        looking = self._looking.get(principal)
        if looking is not None:
            await asyncio.wait([looking])
            fact = self._current(principal)
            if fact is not None:
                return fact
        # In a context of its own: it belongs to no single operation.
        task = asyncio.get_running_loop().create_task(self._look(principal), context=Context())
        self._looking[principal] = task
        task.add_done_callback(lambda done: self._looked(principal, done))
        return await asyncio.shield(task)

    def _looked(self, principal: str, done: "asyncio.Task[_Fact]") -> None:
        if self._looking.get(principal) is done:
            del self._looking[principal]
        if not done.cancelled():
            done.exception()  # looked at, for all who asked may have gone

    async def _look(self, principal: str) -> _Fact:
        position = self._freshness.position
        rows = await self._database.find(
            "models", {**_ANY_STATE, "principals": principal}, projection={"_id": 1}, limit=1
        )
        within = of_principal(principal)
        # Of those that have it any may lose it; one that comes to have it is within it.
        told = (
            [changed("models", "principals")]
            if rows
            else [added("models", within), changed("models", "principals", within)]
        )
        fact = _Fact(bool(rows), position, frozenset([gone("models"), *told]))
        if self._freshness.is_current(position, fact.tags):
            if len(self._facts) >= self._most:
                self._facts.clear()
            self._facts[principal] = fact
        return fact


def narrowed(viewer: Viewer, rights: str) -> Viewer:
    """The same viewer, who sees as many models as everybody with these rights, whatever comes to be
    meanwhile: what is kept by `rights` is made for this one. For models only: of jobs and uploads
    other principals matter."""
    made = copy(viewer)
    known = vars(made)  # where `cached_property` keeps what it made
    known.pop("visible", None)
    known["principals"] = tuple(rights.split(" "))
    return made
