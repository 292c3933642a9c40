"""When an operation has last written: what others must have heard of before it is acknowledged."""

from collections.abc import AsyncIterator
from typing import Any

import pytest
from bson import ObjectId
from pymongo.errors import BulkWriteError

from modelharbor.db.connection import Database
from modelharbor.db.files import FileDocument
from modelharbor.observability.commands import CommandCount, WriteCount, counted

pytestmark = pytest.mark.anyio


@pytest.fixture
async def count() -> AsyncIterator[CommandCount]:
    made = CommandCount()
    token = counted.set(made)
    yield made
    counted.reset(token)


async def time_of(database: Database, key: ObjectId) -> int:
    """Of the last change of a version, as the change stream has it."""
    entry = await database.client["local"]["oplog.rs"].find_one(
        {"$or": [{"o._id": key}, {"o2._id": key}, {"o.applyOps.o._id": key}]},
        sort=[("$natural", -1)],
    )
    assert entry is not None
    time: int = entry["ts"].time << 32 | entry["ts"].inc
    return time


async def test_each_write_has_the_time_of_its_change(
    database: Database, count: CommandCount
) -> None:
    versions, key = database.data["versions"], ObjectId()
    await versions.insert_one({"_id": key, "model_id": key, "number": 1})
    assert count.wrote == await time_of(database, key)
    await versions.update_one({"_id": key}, {"$set": {"label": "a"}})
    assert count.wrote == await time_of(database, key)
    await versions.find_one_and_update({"_id": key}, {"$set": {"label": "b"}})
    assert count.wrote == await time_of(database, key)
    await versions.update_one({"_id": ObjectId()}, {"$set": {"model_id": 1}}, upsert=True)
    later = count.wrote
    assert later is not None
    assert later > await time_of(database, key)
    await versions.delete_one({"_id": key})
    assert count.wrote == await time_of(database, key)
    assert count.wrote > later
    assert count._sent == {}


async def test_what_changes_nothing_that_is_followed_is_no_write(
    database: Database, count: CommandCount
) -> None:
    versions, key = database.data["versions"], ObjectId()
    await versions.update_one({"_id": key}, {"$set": {"label": "a"}})
    await versions.delete_one({"_id": key})
    await versions.find_one_and_delete({"_id": key})
    await versions.find_one({"_id": key})
    await database.find("versions", {"_id": key})
    await database.data["jobs"].insert_one({"_id": key})
    assert count.wrote is None
    await versions.insert_one({"_id": key, "model_id": key, "number": 1, "label": "a"})
    before = count.wrote
    await versions.update_one({"_id": key}, {"$set": {"label": "a"}})
    assert count.wrote == before
    assert len(count.names) == 8


async def test_a_transaction_has_the_time_of_its_commit(
    database: Database, count: CommandCount
) -> None:
    key = ObjectId()
    seen: list[int | None] = []

    async def work(session: Any) -> None:
        row = {"_id": key, "version_id": key, "path": "p"}
        await database.data["files"].insert_one(row, session=session)
        await database.data["jobs"].insert_one({"_id": key}, session=session)
        seen.append(count.wrote)

    await database.transaction(work)
    assert seen == [None]
    assert count.wrote == await time_of(database, key)


async def test_a_transaction_that_wrote_nothing_or_was_given_up_has_none(
    database: Database, count: CommandCount
) -> None:
    async def elsewhere(session: Any) -> None:
        await database.data["jobs"].insert_one({"_id": ObjectId()}, session=session)

    await database.transaction(elsewhere)

    async def failing(session: Any) -> None:
        row = {"version_id": 1, "path": "p"}
        await database.data["files"].insert_one(row, session=session)
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        await database.transaction(failing)
    assert count.wrote is None
    assert count._sent == {}


async def test_part_of_a_bulk_is_a_write(database: Database, count: CommandCount) -> None:
    key = ObjectId()
    row = {"_id": key, "model_id": key, "number": 1}
    with pytest.raises(BulkWriteError):
        await database.data["versions"].insert_many([row, row])
    assert count.wrote == await time_of(database, key)


async def test_documents_write_as_well(database: Database, count: CommandCount) -> None:
    file = FileDocument(
        version_id=ObjectId(), model_id=ObjectId(), path="p", size_bytes=1, sha256="a" * 64
    )
    await file.insert()
    assert count.wrote == await time_of(database, file.id)


def test_what_was_done_together_counts_the_later_one() -> None:
    one, other = CommandCount(), CommandCount(wrote=5)
    one.add(other)
    assert one.wrote == 5
    one.add(CommandCount(wrote=3))
    one.add(CommandCount())
    assert one.wrote == 5


async def test_long_work_keeps_no_names_and_few_transactions(database: Database) -> None:
    made = WriteCount()
    token = counted.set(made)
    try:
        for number in range(40):
            row = {"_id": (key := ObjectId()), "model_id": key, "number": number}

            async def work(session: Any, row: dict[str, Any] = row) -> None:
                await database.data["versions"].insert_one(row, session=session)

            await database.transaction(work)
        assert made.wrote == await time_of(database, key)
    finally:
        counted.reset(token)
    assert made.names == []
    assert (len(made._sent), len(made._open), len(made._committed)) == (0, 0, 16)
