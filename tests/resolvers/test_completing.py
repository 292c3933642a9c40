"""Uploads end once: as files whose contents are kept once, or without leaving anything."""

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest
from bson import ObjectId

from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.uploads import UploadState
from modelharbor.errors import ErrorCode, Refused
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.resolvers import completing
from modelharbor.resolvers.blobs import announce_blobs
from modelharbor.resolvers.completing import (
    Arrived,
    Completions,
    complete,
    complete_all,
    discard,
    end,
    fail,
)
from modelharbor.resolvers.uploads import (
    UploadFile,
    abort_upload,
    complete_upload,
    expire_uploads,
)
from modelharbor.resolvers.versions import delete_version
from tests.documents import insert_version
from tests.resolvers.state import everything
from tests.resolvers.uploading import Site, body, digest_of, site

if TYPE_CHECKING:
    from modelharbor.storage.blobs import BlobStore

__all__ = ["site"]
pytestmark = pytest.mark.anyio
A, B = b"a" * 100, b"b" * 100


async def received(site: Site, contents: bytes = A, path: str = "file", **options: Any) -> Row:
    """An upload whose bytes are here, and whose hash nobody knows."""
    [row] = await site.create(
        UploadFile(path, len(contents), options.pop("sha256", None)), **options
    )
    receiver = site.receiver()
    await receiver.receive(site.viewer, row["_id"], 0, body(contents[:10]))
    row = await site.receiver().receive(site.viewer, row["_id"], 10, body(contents[10:]))
    assert row["state"] == "RECEIVED"
    return row


def key_of(row: Row) -> str:
    key: str = row["segments"][0]["key"]
    return key


async def completed(site: Site, row: Row, contents: bytes = A) -> Row:
    return await complete(site.database, site.storage, row, digest_of(contents), key_of(row))


async def test_finalised_twice_is_one_file(site: Site) -> None:
    row = await received(site)
    rows = await asyncio.gather(*(completed(site, row) for _ in range(5)))
    assert all(each == rows[0] for each in rows)
    assert (rows[0]["state"], rows[0]["sha256"]) == ("COMPLETED", digest_of(A))
    before = await everything(site.database)
    assert await completed(site, row) == rows[0]
    after = await everything(site.database)
    for each in (*before["blobs"], *after["blobs"]):
        del each["seen_at"]
    assert after == before
    assert await site.counters() == (1, 100, 1, 100)
    assert (await site.quota(), site.kept()) == ((0, 0), [f"{row['_id']}/1"])
    assert (await site.one("blobs"))["references"] == 1
    assert await site.states(row) == ["CREATED", "UPLOADING", "RECEIVED", "COMPLETED"]


async def test_equal_contents_are_kept_once(site: Site) -> None:
    rows = [await received(site, path=path) for path in ("a", "b", "c")]
    done = await asyncio.gather(*(completed(site, row) for row in rows))
    assert [row["state"] for row in done] == ["COMPLETED"] * 3
    blob = await site.one("blobs")
    assert (blob["references"], blob["stored"]) == (3, True)
    assert site.kept() == [blob["key"].removeprefix("incoming/")]
    assert await site.contents(digest_of(A)) == A
    assert await site.counters() == (3, 300, 3, 300)
    assert await site.database.count("files", {"sha256": digest_of(A)}) == 3


async def test_equal_contents_in_one_transaction_are_kept_once(site: Site) -> None:
    rows = [await received(site, path=path) for path in ("a", "b")]
    done = await complete_all(
        site.database,
        site.storage,
        [Arrived(row, digest_of(A), key_of(row)) for row in rows],
    )
    assert [row["state"] for row in done] == ["COMPLETED"] * 2
    assert (await site.one("blobs"))["references"] == 2
    assert site.kept() == [f"{rows[0]['_id']}/1"]
    assert await site.contents(digest_of(A)) == A


async def test_each_of_many_has_its_own_answer(site: Site) -> None:
    """What fails does not hold up what is right beside it."""
    wrong = await received(site, path="wrong", sha256=digest_of(B))
    right = await received(site, path="right")
    ended = await received(site, path="ended")
    await fail(site.database, site.storage, ended, ErrorCode.NOT_STORED, "no")
    taken = await received(site, path="taken")
    await site.database.data["uploads"].update_one({"_id": taken["_id"]}, {"$inc": {"token": 1}})
    completions = Completions(site.database, site.storage)
    rows = await asyncio.gather(
        *(
            completions.complete(Arrived(row, digest_of(A), key_of(row)))
            for row in (wrong, right, ended, taken)
        )
    )
    await completions.close()
    assert [row["state"] for row in rows] == ["FAILED", "COMPLETED", "FAILED", "RECEIVED"]
    assert rows[0]["error"]["code"] == "CHECKSUM_MISMATCH"
    assert rows[2]["error"]["code"] == "NOT_STORED"
    for row in rows:
        assert row == await site.row(row)
    assert await site.counters() == (1, 100, 1, 100)
    assert await site.quota() == (100, 1)
    assert site.kept() == sorted([f"{right['_id']}/1", f"{taken['_id']}/1"])


async def test_completions_of_several_versions_and_owners(site: Site) -> None:
    version = await insert_version(site.database, site.model, {}, status="DRAFT")
    rows = [
        await received(site, bytes([number]) * 20, f"{number}", version_id=version_id)
        for number, version_id in enumerate((site.version.id, version.id, site.version.id))
    ]
    completions = Completions(site.database, site.storage)
    done = await asyncio.gather(
        *(
            completions.complete(Arrived(row, digest_of(bytes([number]) * 20), key_of(row)))
            for number, row in enumerate(rows)
        )
    )
    assert [row["state"] for row in done] == ["COMPLETED"] * 3
    files = await site.database.find("files", {}, sort={"path": 1})
    assert [file["version_id"] for file in files] == [row["version_id"] for row in rows]


async def test_a_failure_is_told_to_all_who_wait(site: Site, monkeypatch: Any) -> None:
    row = await received(site)
    completions = Completions(site.database, site.storage)

    async def broken(*_: object) -> list[Row]:
        raise OSError("no")

    with monkeypatch.context() as patch:
        patch.setattr(completing, "complete_all", broken)
        answers = await asyncio.gather(
            *(completions.complete(Arrived(row, digest_of(A), key_of(row))) for _ in range(3)),
            return_exceptions=True,
        )
    assert [str(each) for each in answers] == ["no"] * 3
    done = await completions.complete(Arrived(row, digest_of(A), key_of(row)))
    assert done["state"] == "COMPLETED"


async def test_another_file_has_its_place_by_now(site: Site) -> None:
    first, second = await received(site, path="a"), await received(site, B, path="b")
    await completed(site, first)
    for row, state in ((second, "FAILED"),):
        await site.database.data["uploads"].update_one(
            {"_id": row["_id"]}, {"$set": {"path": "a", "path_key": "a"}}
        )
        done = await completed(site, row, B)
        assert (done["state"], done["error"]["code"]) == (state, "ALREADY_EXISTS")
    assert await site.counters() == (1, 100, 1, 100)


async def test_the_same_file_is_there_by_now(site: Site) -> None:
    first, second = await received(site, path="a"), await received(site, path="b")
    done = await completed(site, first)
    await site.database.data["uploads"].update_one(
        {"_id": second["_id"]}, {"$set": {"path": "a", "path_key": "a"}}
    )
    again = await completed(site, second)
    assert (again["state"], again["file_id"]) == ("COMPLETED", done["file_id"])
    assert await site.counters() == (1, 100, 1, 100)
    assert (await site.one("blobs"))["references"] == 1


async def test_one_whose_version_is_published_is_waited_for(site: Site) -> None:
    row = await received(site)
    await site.database.data["versions"].update_one({}, {"$set": {"status": "PROCESSING"}})
    assert (await completed(site, row))["state"] == "COMPLETED"
    assert await site.counters() == (1, 100, 1, 100)


@pytest.mark.parametrize("what", ["version", "model"])
async def test_of_what_was_deleted_meanwhile_nothing_is_left(site: Site, what: str) -> None:
    row = await received(site)
    if what == "version":
        await delete_version(site.database, site.viewer, version_id=site.version.id)
    else:
        await site.database.data["models"].update_one({}, {"$set": {"state": "DELETED"}})
    done = await completed(site, row)
    assert (done["state"], done["error"]["code"]) == ("FAILED", "NOT_FOUND")
    assert (site.kept(), await site.quota()) == ([], (0, 0))
    assert await site.database.count("files", {}) == 0


async def test_contents_that_the_store_lost_are_kept_anew(site: Site) -> None:
    first = await completed(site, await received(site, path="a"))
    blob = await site.one("blobs")
    await site.storage.delete(blob["key"])
    second = await received(site, path="b")
    await completed(site, second)
    blob = await site.one("blobs")
    assert (blob["key"], blob["stored"], blob["references"]) == (key_of(second), True, 2)
    assert await site.contents(first["sha256"]) == A


async def test_what_is_unknown_has_ended(site: Site) -> None:
    row = await received(site)
    await site.database.data["uploads"].delete_one({"_id": row["_id"]})
    assert (await completed(site, row))["is_open"] is False
    assert (await fail(site.database, site.storage, row, ErrorCode.INTERNAL, "no"))["_id"] == row[
        "_id"
    ]


async def test_whatever_comes_first_it_is_given_back_once(site: Site) -> None:
    """Complete, abort, expire, fail, at the same moment; many times."""

    async def attempt(number: int) -> set[str]:
        row = await received(site, bytes([number]) * 50, f"{number}")
        later = utc_now() + timedelta(days=2)
        await asyncio.gather(
            completed(site, row, bytes([number]) * 50),
            abort_upload(site.database, site.storage, site.viewer, upload_id=row["_id"]),
            end(site.database, site.storage, row, UploadState.EXPIRED),
            fail(site.database, site.storage, row, ErrorCode.INTERNAL, "no"),
            expire_uploads(site.database, site.storage, later),
            complete_upload(
                site.database,
                site.storage,
                site.viewer,
                upload_id=row["_id"],
                sha256=digest_of(bytes([number]) * 50),
            ),
            return_exceptions=True,
        )
        states = await site.states(row)
        assert states[:3] == ["CREATED", "UPLOADING", "RECEIVED"]
        assert len(states) == 4
        return {states[3]}

    ended = [await attempt(number) for number in range(8)]
    assert await site.quota() == (0, 0)
    files = await site.database.find("files", {})
    assert ended.count({"COMPLETED"}) == len(files) == len(site.kept())
    for file in files:
        assert len(await site.contents(file["sha256"])) == 50
    assert await site.counters() == (len(files), 50 * len(files)) * 2


async def test_what_cannot_be_removed_is_left_to_the_sweeper(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(key: str) -> None:
        raise OSError("no")

    monkeypatch.setattr(site.storage.incoming, "delete", broken)
    await discard(site.storage, ["incoming/x/1"])
    assert "upload.left key=incoming/x/1" in caplog.text


async def test_contents_that_are_being_removed_are_not_used(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked between the announcement and the transaction: nothing is written, it can be tried again."""
    row = await received(site)

    async def announced(*arguments: Any) -> dict[str, Row]:
        found = await announce_blobs(*arguments)
        await site.database.data["blobs"].update_one({}, {"$set": {"deleting_at": utc_now()}})
        return found

    with monkeypatch.context() as patch:
        patch.setattr(completing, "announce_blobs", announced)
        with pytest.raises(Refused) as caught:
            await completed(site, row)
    assert caught.value.code is ErrorCode.CONFLICT
    assert (await site.row(row))["state"] == "RECEIVED"
    await site.database.data["blobs"].delete_many({})
    assert (await completed(site, row))["state"] == "COMPLETED"


async def test_each_request_is_told_of_what_is_written_for_it(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that complete together, and those that come while others are being written."""

    async def complete_all(
        database: Database, storage: object, arrived: list[Arrived]
    ) -> list[Row]:
        await asyncio.sleep(0.02)
        row = {"_id": (key := ObjectId()), "model_id": key, "number": 1}
        await database.data["versions"].insert_one(row)
        return [each.upload for each in arrived]

    monkeypatch.setattr(completing, "complete_all", complete_all)
    owner_id, first, second = ObjectId(), ObjectId(), ObjectId()
    completions = Completions(database, cast("BlobStore", None))

    async def request(version_id: ObjectId) -> int | None:
        count = CommandCount()
        token = counted.set(count)
        upload = {"owner_id": owner_id, "version_id": version_id}
        try:
            await completions.complete(Arrived(upload, "d", "k"))
        finally:
            counted.reset(token)
        return count.wrote

    tasks = [asyncio.create_task(request(each)) for each in (first, second, second)]
    one, two, three = await asyncio.gather(*tasks)
    assert one is not None
    assert two == three
    assert two is not None
    assert two > one
    await completions.close()
