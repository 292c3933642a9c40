"""`cacheStats`: what the caches of the process did, for operators alone, by both engines."""

from dataclasses import replace
from typing import Any

import pytest

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.observability.metrics import Metrics
from tests.asking import Asker
from tests.documents import insert_actor, viewer_of

pytestmark = pytest.mark.anyio
ALL = "{ cacheStats { layer hits misses hitRatio entries bytes invalidations } }"


async def operator(database: Database) -> Viewer:
    person = viewer_of(await insert_actor("operator", is_operator=True))
    return replace(person, scopes=frozenset(Permission))


def used() -> Metrics:
    metrics = Metrics()
    metrics.answers.hits, metrics.answers.misses = 3, 1
    metrics.answers.sizes = lambda: (2, 2**40)
    metrics.shared_answers.invalidations = 7
    return metrics


async def test_an_operator_reads_what_each_layer_did(ask: Asker, database: Database) -> None:
    viewer = await operator(database)
    ask = replace(ask, caches=used().caches)
    none = {"hits": "0", "misses": "0", "hitRatio": 0.0, "entries": "0", "bytes": "0"}
    expected: list[dict[str, Any]] = [
        {
            "layer": "l1",
            "hits": "3",
            "misses": "1",
            "hitRatio": 0.75,
            "entries": "2",
            "bytes": str(2**40),
            "invalidations": "0",
        },
        {"layer": "l2", **none, "invalidations": "7"},
        {"layer": "sessions", **none, "invalidations": "0"},
    ]
    for each in (ask, ask.by_core):
        answer = await each(ALL, viewer)
        assert (answer.data, answer.errors, answer.commands) == ({"cacheStats": expected}, [], [])
    assert (await ask(ALL, viewer)).fallback is None


async def test_nobody_else_does(ask: Asker, database: Database) -> None:
    """Neither being one without the scope OPERATE, nor the scope without being one."""
    viewer = await operator(database)
    person = viewer_of(await insert_actor("person"))
    ask = replace(ask, caches=used().caches)
    for each, code in (
        (ANONYMOUS, "UNAUTHENTICATED"),
        (person, "FORBIDDEN"),
        (replace(person, scopes=frozenset(Permission)), "FORBIDDEN"),
        (replace(viewer, scopes=viewer.scopes - {Permission.OPERATE}), "FORBIDDEN"),
    ):
        for asker in (ask, ask.by_core):
            answer = await asker(ALL, each)
            assert (answer.data, [found for _, found in answer.errors]) == (None, [code])
