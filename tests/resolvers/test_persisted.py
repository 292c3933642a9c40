"""Published operations: all of a manifest or nothing, ids that keep their texts, counts that add up."""

import asyncio
from datetime import timedelta
from hashlib import sha256
from typing import Any

import pytest
from pymongo.errors import AutoReconnect

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.errors import ErrorCode
from modelharbor.observability.commands import counted
from modelharbor.resolvers.manifests import BadManifest
from modelharbor.resolvers.persisted import (
    Difference,
    Publication,
    Published,
    UsageCounter,
    compare,
    counting_usage,
    last_sequence,
    list_published,
    publish,
    published_text,
    retire,
    retire_unused,
)
from tests.explaining import Captured, explained
from tests.resolvers.state import everything, refused

pytestmark = pytest.mark.anyio


def publication(id: str, text: str = "", name: str | None = None, **values: Any) -> Publication:
    text = text or f"query {id} {{ __typename }}"
    digest = sha256(text.encode()).hexdigest()
    return Publication(id, text, digest, name or id, "query", ["Query.models"], **values)


def done(**ids: list[str]) -> Published:
    return Published(**{"new": [], "again": [], "repriced": [], "same": [], **ids})


async def rows(database: Database) -> dict[tuple[str, str], Row]:
    found = await database.data["persisted_documents"].find().to_list()
    return {(row["client"], row["document_id"]): row for row in found}


async def test_what_is_published_stands_there_whole(database: Database) -> None:
    before = utc_now()
    a = publication("a")
    assert await publish(database, " web ", [a, publication("b")], {"a": 500}) == done(
        new=["a", "b"]
    )
    found = await rows(database)
    assert list(found) == [("web", "a"), ("web", "b")]
    row = found["web", "a"]
    assert before <= row.pop("published_at") <= utc_now()
    assert row == {
        "_id": row["_id"],
        "document_id": "a",
        "client": "web",
        "text": a.text,
        "sha256": a.sha256,
        "name": "a",
        "kind": "query",
        "fields": ["Query.models"],
        "price": 500,
        "retired_at": None,
        "sequence": 1,
    }
    assert await published_text(database, row["_id"]) == a.text
    assert await last_sequence(database) == 1


async def test_again_it_changes_nothing(database: Database) -> None:
    both = [publication("a"), publication("b")]
    await publish(database, "web", both, {"a": 5})
    before = await rows(database)
    assert await publish(database, "web", both, {}) == done(same=["a", "b"])
    assert await publish(database, "web", both, {"a": 5}) == done(same=["a", "b"])
    assert await rows(database) == before


async def test_a_price_stays_until_it_is_set_anew(database: Database) -> None:
    both = [publication("a"), publication("b")]
    await publish(database, "web", both, {"a": 5})
    assert await publish(database, "web", both, {"a": 7}) == done(repriced=["a"], same=["b"])
    assert (await rows(database))["web", "a"]["price"] == 7
    assert await publish(database, "web", both, {"a": None}) == done(repriced=["a"], same=["b"])
    assert (await rows(database))["web", "a"]["price"] is None
    async with refused(database, ErrorCode.BAD_INPUT):
        await publish(database, "web", both, {"c": 5})


async def test_a_dry_run_says_the_same_and_does_nothing(database: Database) -> None:
    await publish(database, "web", [publication("a")], {})
    before = await everything(database)
    both = [publication("a"), publication("b")]
    assert await publish(database, "web", both, {}, is_dry_run=True) == done(new=["b"], same=["a"])
    with pytest.raises(BadManifest):
        await publish(database, "app", [publication("a", "{ other }")], {}, is_dry_run=True)
    assert await everything(database) == before


@pytest.mark.parametrize("client", ["web", "app"])
async def test_an_id_keeps_its_text_as_long_as_it_is_published(
    database: Database, client: str
) -> None:
    await publish(database, "web", [publication("a"), publication("b")], {})
    before = await everything(database)
    changed = [publication("new"), publication("a", "{ a }"), publication("b", "{ b }")]
    with pytest.raises(BadManifest) as caught:
        await publish(database, client, changed, {})
    whose = "" if client == "web" else " by web"
    assert [str(each) for each in caught.value.troubles] == [
        f"{id} ({id}): published{whose} with another text: retire that, or choose another id [CONFLICT]"
        for id in ("a", "b")
    ]
    assert await everything(database) == before
    await retire(database, ["a", "b"])
    assert await publish(database, client, changed, {}) == done(
        new=["new"] if client == "web" else ["new", "a", "b"],
        again=["a", "b"] if client == "web" else [],
    )
    assert (await rows(database))[client, "a"]["text"] == "{ a }"


async def test_two_clients_may_share_an_id(database: Database) -> None:
    await publish(database, "web", [publication("a")], {})
    assert await publish(database, "app", [publication("a")], {"a": 3}) == done(new=["a"])
    assert await retire(database, ["a"], "web") == ["a"]
    found = await rows(database)
    assert found["web", "a"]["retired_at"] is not None
    assert found["app", "a"]["retired_at"] is None
    async with refused(database, ErrorCode.NOT_FOUND):
        await retire(database, ["a"], "web")
    assert await retire(database, ["a"]) == ["a"]


async def test_many_who_publish_at_once_are_numbered_in_their_order(database: Database) -> None:
    async def one(number: int) -> Published:
        return await publish(database, "web", [publication(f"a{number}"), publication("b")], {})

    answers = await asyncio.gather(*map(one, range(8)))
    assert sum("b" in answer.new for answer in answers) == 1
    found = await rows(database)
    assert len(found) == 9
    assert {row["sequence"] for (_, id), row in found.items() if id != "b"} == set(range(1, 9))
    assert await last_sequence(database) == 8


async def test_a_manifest_as_large_as_one_may_be(database: Database) -> None:
    many = [publication(f"a{number}") for number in range(10_000)]
    assert len((await publish(database, "web", many, {})).new) == 10_000
    assert len((await publish(database, "web", many, {})).same) == 10_000
    assert len(await retire_unused(database, "web", None)) == 10_000


@pytest.mark.parametrize("client", ["", "a\nb", "a" * 201])
async def test_a_client_has_a_name(database: Database, client: str) -> None:
    async with refused(database, ErrorCode.BAD_INPUT, "client"):
        await publish(database, client, [publication("a")], {})


async def test_a_manifest_beside_what_is_published(database: Database) -> None:
    await publish(database, "web", [publication(id) for id in "abc"], {})
    await publish(database, "app", [publication("d")], {})
    await retire(database, ["c"])
    assert await compare(database, "web", ["b", "c", "d"]) == Difference(["c", "d"], ["b"], ["a"])


async def used(database: Database, id: str, days_ago: int, calls: int) -> None:
    moment = utc_now() - timedelta(days=days_ago)
    day = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    row = {"document_id": id, "day": day, "calls": calls, "last_used_at": moment}
    await database.data["persisted_usage"].insert_one(row)


async def test_the_list_has_calls_and_the_last_use(database: Database) -> None:
    await publish(database, "web", [publication(id) for id in "abc"], {})
    await publish(database, "app", [publication("a")], {})
    await retire(database, ["c"])
    for days_ago, calls in ((0, 1), (6, 10), (7, 100)):
        await used(database, "a", days_ago, calls)
    listed = await list_published(database, days=7, limit=10)
    assert [(row["client"], row["document_id"], row["calls"]) for row in listed] == [
        ("app", "a", 11),
        ("web", "a", 11),
        ("web", "b", 0),
    ]
    assert [row["last_used_at"] is None for row in listed] == [False, False, True]
    assert [row["calls"] for row in await list_published(database, client="web", limit=1)] == [111]


async def test_the_list_tells_who_selects_a_field(database: Database) -> None:
    def selecting(id: str, *fields: str) -> Publication:
        made = publication(id)
        return Publication(id, made.text, made.sha256, id, "query", list(fields))

    some = [selecting("a", "Model.name", "Query.model"), selecting("b", "Node.name")]
    await publish(database, "web", [*some, selecting("c", "Model.id")], {})

    async def who(*fields: str) -> list[str]:
        found = await list_published(database, fields=fields, limit=10)
        return [row["document_id"] for row in found]

    assert await who("Model.name", "Node.name") == ["a", "b"]
    assert await who("Model.name") == ["a"]
    assert await who("Model.summary") == []
    await retire(database, ["a"])
    assert await who("Model.name") == []


async def test_only_what_is_long_published_and_not_used_is_retired(database: Database) -> None:
    await publish(database, "web", [publication(id) for id in "abcde"], {})
    await publish(database, "app", [publication("f")], {})
    old = {"$set": {"published_at": utc_now() - timedelta(days=40)}}
    await database.data["persisted_documents"].update_many({"document_id": {"$ne": "e"}}, old)
    await used(database, "a", 1, 1)
    await used(database, "b", 29, 1)
    await used(database, "c", 31, 1)
    assert sorted(await retire_unused(database, "web", 30)) == ["c", "d"]
    assert await retire_unused(database, "web", 30) == []
    assert sorted(await retire_unused(database, "web", None)) == ["a", "b", "e"]
    assert [row["document_id"] for row in await list_published(database, limit=10)] == ["f"]


async def test_retiring_what_is_not_there_retires_nothing(database: Database) -> None:
    await publish(database, "web", [publication("a")], {})
    async with refused(database, ErrorCode.NOT_FOUND):
        await retire(database, ["a", "b"])


async def counts(database: Database) -> dict[str, int]:
    found = await database.data["persisted_usage"].find().to_list()
    assert len({(row["document_id"], row["day"]) for row in found}) == len(found)
    return {row["document_id"]: row["calls"] for row in found}


async def test_counts_of_many_processes_add_up(database: Database) -> None:
    counters = [UsageCounter(database) for _ in range(5)]
    for number, counter in enumerate(counters):
        for id in ("a", "a", f"b{number}"):
            counter.count(id)
    await asyncio.gather(*(counter.flush() for counter in counters))
    await counters[0].flush()
    assert await counts(database) == {"a": 10, **{f"b{number}": 1 for number in range(5)}}
    (row,) = await database.data["persisted_usage"].find({"document_id": "a"}).to_list()
    assert row["day"] <= row["last_used_at"] <= utc_now()
    assert row["last_used_at"] - row["day"] < timedelta(days=1)


async def test_the_rest_is_written_at_the_end(database: Database) -> None:
    async with counting_usage(database) as counter:
        await asyncio.sleep(0.1)
        for _ in range(3):
            counter.count("a")
        assert await counts(database) == {}
    assert await counts(database) == {"a": 3}


async def test_a_failed_flush_loses_nothing_and_counts_nothing_twice(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = UsageCounter(database)
    counter.count("a")
    with monkeypatch.context() as broken:

        async def fail(self: UsageCounter, *arguments: Any) -> None:
            counter.count("a")  # another comes while the flush runs
            raise AutoReconnect("gone")

        broken.setattr(UsageCounter, "_add", fail)
        with pytest.raises(AutoReconnect):
            await counter.flush()
    assert await counts(database) == {}
    await counter.flush()
    assert await counts(database) == {"a": 2}


async def test_every_read_is_an_index_scan(database: Database) -> None:
    many = [publication(f"a{number}") for number in range(300)]
    await publish(database, "web", many, {})
    await publish(database, "app", [publication("b")], {})
    await used(database, "b", 0, 1)
    captured = Captured()
    token = counted.set(captured)
    try:
        await list_published(database, client="app", fields=["Model.name"], limit=10)
        await list_published(database, fields=["Model.name"], limit=10)
        await list_published(database, limit=10)
        await compare(database, "app", ["b"])
        await retire_unused(database, "app", 5)
        await retire(database, ["b"])
    finally:
        counted.reset(token)
    reads = [each for each in captured.commands if each[0] in {"find", "aggregate"}]
    assert {name for name, _ in reads} == {"find", "aggregate"}
    for name, command in reads:
        if command[name] == "log":
            continue
        stages = [stage.get("stage") for stage in await explained(database, command)]
        assert "IXSCAN" in stages, (command, stages)
        assert "COLLSCAN" not in stages, command
