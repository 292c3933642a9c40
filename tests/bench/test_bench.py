"""What `make bench` asks is valid and answered in full; its table says what was measured."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from graphql import parse, validate
from starlette.testclient import TestClient

from bench.measure import Measured
from bench.operation import (
    COST,
    NAMES,
    Ask,
    Checked,
    Operation,
    WrongAnswer,
    check,
    draw,
    load_operations,
)
from bench.report import BEGIN, END, Result, table, write
from bench.serving import fill
from modelharbor.app import create_app
from modelharbor.cache.client import connect_cache
from modelharbor.db.connection import connect
from modelharbor.dev.demo import SEEDS
from modelharbor.dev.engines import Engines
from modelharbor.schema import core
from modelharbor.settings import Settings

MODELS = 1_000
OPERATION = Operation("page", "A page", "{ models { nodes { id } } }", ({},), ("models", "nodes"))
MEASURED = Measured(
    connections=200,
    requests_per_second=1234.4,
    p50=1.04,
    p95=20.06,
    p99=1300.0,
    refused=0,
    broken=0,
    wrong=0,
    cpu_micros=812.3,
    mongo_cpu_micros=None,
    resident_mebibytes=93.6,
)


@pytest.fixture(scope="module")
def filled(engines: Engines, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    """A database of its own with demo models."""
    settings = Settings(
        mongo_url=engines.mongo_url,
        mongo_database=f"test_bench_{uuid4().hex[:8]}",
        redis_url=engines.redis_url,
        data_path=tmp_path_factory.mktemp("bench"),
        response_cache=False,  # as it is measured
    )

    async def drop() -> None:
        async with connect(settings) as database:
            await database.client.drop_database(settings.mongo_database)

    asyncio.run(fill(settings, MODELS))
    yield settings
    asyncio.run(drop())


@pytest.fixture
def ask(filled: Settings) -> Iterator[Ask]:
    """Over HTTP, with nothing cached."""

    async def forget() -> None:
        async with connect_cache(filled) as cache:
            await cache.redis.flushdb()

    asyncio.run(forget())
    with TestClient(create_app(filled)) as client:

        def post(body: dict[str, Any]) -> dict[str, Any]:
            found: dict[str, Any] = client.post("/graphql", json=body, headers=COST).json()
            return found

        yield post


def test_operations_are_answered_in_full(ask: Ask) -> None:
    operations = load_operations(draw(ask))
    assert [operation.name for operation in operations] == list(NAMES)
    found = {}
    for operation in operations:
        assert validate(core, parse(operation.document)) == []
        checked = check(ask, operation)
        found[operation.name] = (checked.commands, checked.commands_again)
    assert found == {
        "model": (1, 1),
        "page": (4, 4),
        "filtered": (2, 2),
        "facets": (5, 1),  # the counts are cached
        "search": (1, 1),
    }


def test_places_and_names_are_drawn_from_the_data(ask: Ask) -> None:
    model, page, *_ = load_operations(draw(ask))
    assert len(page.variables) == len({found["after"] for found in page.variables})
    assert len(model.variables) == len(page.variables) > MODELS / 2
    last = ask(page.bodies()[-1])["data"]["models"]
    assert len(last["nodes"]) == 20


def test_the_same_models_are_loaded_once(filled: Settings) -> None:
    async def loaded_at() -> Any:
        async with connect(filled) as database:
            row = await database.data[SEEDS].find_one({})
        assert row is not None
        return row["at"]

    before = asyncio.run(loaded_at())
    asyncio.run(fill(filled, MODELS))
    assert asyncio.run(loaded_at()) == before


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"data": None, "errors": [{"message": "Gone."}]}, "page: Gone."),
        ({"data": {"models": {"nodes": []}}}, "page: nothing at models.nodes"),
    ],
)
def test_an_answer_that_is_not_whole_is_not_measured(answer: dict[str, Any], message: str) -> None:
    with pytest.raises(WrongAnswer, match=f"^{message}$"):
        OPERATION.check(answer)
    OPERATION.check({"data": {"models": {"nodes": [{"id": "a"}]}}})


def test_a_line_of_the_table() -> None:
    lines = table([Result(OPERATION, Checked(5, 1, 2.5), [MEASURED])]).splitlines()
    assert len(lines) == 3
    assert lines[2] == (
        "| A page | 200 | 1,234 | 1.0 | 20.1 | 1,300.0 | 0 | 812 | - | 94 | 5; 1 from the cache |"
    )
    failed = replace(MEASURED, refused=1, broken=2, wrong=3, cpu_micros=None)
    lines = table([Result(OPERATION, Checked(4, 4, 2.5), [failed])]).splitlines()
    assert lines[2] == (
        "| A page | 200 | 1,234 | 1.0 | 20.1 | 1,300.0 "
        "| 1 refused, 2 broken, 3 with GraphQL errors | - | - | 94 | 4 |"
    )


def test_the_table_goes_between_its_marks(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text(f"Before\n{BEGIN}\nold\n{END}\nafter\n")
    write(document, "new")
    assert document.read_text() == f"Before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    document.write_text("no place\n")
    with pytest.raises(ValueError, match="no place for the table"):
        write(document, "new")
    assert document.read_text() == "no place\n"
