"""What `make bench-exports` exports is what it makes by hand; its tables say what was measured."""

import asyncio
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import orjson
import pymongo
import pytest
from bson import ObjectId, json_util

from bench.exports import __main__ as bench
from bench.exports.__main__ import (
    BEGIN,
    END,
    Beside,
    Killed,
    beside_goals,
    beside_table,
    killed_goals,
    killed_table,
)
from bench.exports.plain import MODELS, NESTED, nested_of, rows_of
from bench.exports.working import (
    Exported,
    eta_errors,
    job_row,
    lines_of,
    make_person,
    put,
    same_rows,
)
from bench.operation import WrongAnswer
from bench.serving import Filled
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelState, Visibility
from modelharbor.execution.exporting import prepare_export
from modelharbor.schema import schema
from modelharbor.settings import Settings
from modelharbor.storage.blobs import open_storage
from tests.documents import START, insert_actor, insert_model, insert_version

pytestmark = pytest.mark.anyio


def filled(settings: Settings) -> Filled:
    return Filled(settings, settings.mongo_url, None, "6", ())


async def some(database: Database, count: int = 5) -> None:
    owner = await insert_actor("acme")
    for number in range(count):
        visibility = Visibility.PRIVATE if number == 1 else Visibility.PUBLIC
        at = START + timedelta(minutes=number // 2)
        model = await insert_model(owner, f"m{number}", visibility=visibility, created_at=at)
        for size in range(number):
            await insert_version(database, model, {"a": size, "b": 2})


@pytest.mark.parametrize(("document", "rows"), [(MODELS, rows_of), (NESTED, nested_of)])
async def test_by_hand_it_is_the_same(
    database: Database, settings: Settings, document: str, rows: Any
) -> None:
    await some(database)
    person = await make_person(database)
    variables: dict[str, Any] = {}
    query: dict[str, Any] = bench.visible(person)
    if document == NESTED:
        variables = await bench._first(database, person, 3)
        assert variables == {"filter": {"createdAt": {"lte": "2026-01-01T00:01:00.000Z"}}}
        query["created_at"] = {"$lte": START + timedelta(minutes=1)}
    export = prepare_export(schema, settings, document, variables)
    async with open_storage(settings) as storage:
        job = await put(database, filled(settings), person, document, variables)
        assert (await job_row(database, job["_id"]))["state"] == "QUEUED"
        context = await _context(database, settings, storage, person)
        exported = [
            orjson.dumps(row)
            async for batch in export.batches(lambda: context)
            for row in batch.rows
        ]
    with pymongo.MongoClient[Any](settings.mongo_url) as client:
        given = json_util.loads(json_util.dumps(query))
        by_hand = [orjson.dumps(row) for row in rows(client[settings.mongo_database], given)]
    assert len(exported) == (3 if document == NESTED else 4)
    assert exported == by_hand
    assert same_rows(exported[0], by_hand[0])
    assert not same_rows(exported[0], exported[1])


async def _context(database: Database, settings: Settings, storage: Any, person: Any) -> Any:
    from modelharbor.auth.links import DownloadLinks
    from modelharbor.cache.client import connect_cache
    from modelharbor.context import Context

    async with connect_cache(settings) as cache:
        return Context(
            database=database,
            cache=cache,
            viewer=person.viewer,
            links=DownloadLinks(b"k" * 32, "http://test"),
            settings=settings,
            storage=storage,
            request_id="test",
        )


async def test_the_file_is_read_by_its_lines(settings: Settings) -> None:
    job: Any = {"_id": ObjectId(), "checkpoint": {"pieces": [["0-1", 7], ["1-1", 3]]}}
    async with open_storage(settings) as storage:
        await storage.put(f"exports/{job['_id']}/0-1", b"{1}\n{2}")
        await storage.put(f"exports/{job['_id']}/1-1", b"34\n")
        assert [line async for line in lines_of(storage, job)] == [b"{1}", b"{2}34"]
        job["checkpoint"]["pieces"].pop()
        with pytest.raises(WrongAnswer, match="in the middle"):
            [line async for line in lines_of(storage, job)]


async def test_what_changes_beside_it_is_put_right_again(database: Database) -> None:
    await some(database)

    async def names() -> list[tuple[str, str]]:
        rows = await database.find("models", {}, sort={"_id": 1})
        return [(row["name"], row["state"]) for row in rows]

    before = await names()
    changing = asyncio.create_task(bench._change(database, Random(2)))
    while {*await names()} >= {*before} or len(await names()) == len(before):
        await asyncio.sleep(0.01)
    changing.cancel()
    assert ModelState.DELETED.value not in {state for _, state in await names()}
    await bench._restore(database)
    assert await names() == before


EXPORTED = Exported(
    {
        "result": {"rows": 1000, "bytes": 5000},
        "steps": [
            {"name": "count", "started_at": START, "finished_at": START},
            {"name": "write", "started_at": START, "finished_at": START + timedelta(seconds=2)},
        ],
        "finished_at": datetime.fromtimestamp(1000, UTC),
    },
    1.5,
    99.0,
)
PLAIN = {"rows": 1000, "seconds": 1.0, "cpu": 0.9, "mebibytes": 50.0}


def test_tables_say_what_was_measured() -> None:
    one = Beside("models, 1", EXPORTED, PLAIN)
    assert one.ratio == 0.5
    assert beside_table([one]).splitlines()[-1] == (
        "| models, 1 | 1,000 | 5,000 | 2.0 | 500 | 1.5 | 99 | 1,000 | 0.9 | 0.50 |"
    )
    assert [each.is_met for each in beside_goals([one])] == [False, True]
    better = replace(one, plain={**PLAIN, "seconds": 1.5})
    assert [each.is_met for each in beside_goals([better])] == [True, True]
    large = replace(one, title="nested, 1", ours=replace(EXPORTED, mebibytes=151.0))
    assert [each.is_met for each in beside_goals([large])] == [False]
    killed = Killed(20, 1000, 990, 0, 0, 500, 4_194_304)
    assert killed_table(killed).splitlines()[-1] == "| 20 | 1,000 | 990 | 0 | 0 | 500 | 4,194,304 |"
    assert [each.is_met for each in killed_goals(killed)] == [True]
    assert [each.is_met for each in killed_goals(replace(killed, twice=1))] == [False]
    assert [each.is_met for each in killed_goals(replace(killed, missing=1))] == [False]


def test_how_far_off_the_seconds_to_go_were() -> None:
    etas = [(980.0, 40.0, 1.0), (990.0, 60.0, 12.0), (995.0, 80.0, 5.0), (999.5, 99.0, 9.0)]
    assert list(eta_errors(EXPORTED.row, etas, 1.0)) == [0.2, 0.0]


def test_the_page_has_a_place_for_them() -> None:
    text = (Path(__file__).parents[2] / "docs" / "performance.md").read_text()
    assert text.index(BEGIN) < text.index(END)
