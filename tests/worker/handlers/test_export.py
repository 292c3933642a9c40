"""EXPORT: the file has each row once, wherever its worker dies and whatever changes meanwhile."""

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import orjson
import pytest
from bson import ObjectId
from pymongo import ReturnDocument

from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import connect_cache
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.jobs import JobKind
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import Conflict, ErrorCode, Forbidden, Gone, NotFound, Refused
from modelharbor.execution import exporting
from modelharbor.exports.formats import Compression, ExportFormat
from modelharbor.inspection.fence import open_fence
from modelharbor.resolvers.exports import (
    Result,
    folder_of,
    put_export,
    read_result,
    remove_pieces,
    result_of,
)
from modelharbor.resolvers.jobs import cancel_job, retry_job
from modelharbor.schema.nodes import global_id
from modelharbor.storage.blobs import BlobStore, open_storage
from modelharbor.worker.handlers import export
from modelharbor.worker.handlers.checkpoints import Checkpoint
from modelharbor.worker.handlers.export import export_rows
from modelharbor.worker.handlers.garbage_collect import collect_garbage
from modelharbor.worker.interruptions import JobCancelled, LeaseLost
from modelharbor.worker.joining import join_pieces
from modelharbor.worker.processes import open_processes
from modelharbor.worker.reports import Reports
from modelharbor.worker.tools import Shared, Tools
from tests.documents import START, insert_actor, insert_model, insert_version, viewer_of
from tests.worker.handlers.conftest import Yard

pytestmark = pytest.mark.anyio
NAMES: Final = "{ models { nodes { name } } }"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven rows a batch, and each batch a piece."""
    monkeypatch.setattr(exporting, "MOST_ROWS", 7)
    monkeypatch.setattr(export, "PIECE_SECONDS", 0.0)


async def fill(owner: ActorDocument, count: int, start: int = 0, **values: Any) -> list[str]:
    models = [
        await insert_model(
            owner,
            f"model-{number:04}",
            **{"created_at": START + timedelta(seconds=number // 3), **values},
        )
        for number in range(start, start + count)
    ]
    return [model.name for model in models]


async def put(yard: Yard, viewer: Viewer, query: str = NAMES, **given: Any) -> Row:
    values: Row = {
        "variables": {},
        "format": ExportFormat.JSONL,
        "compression": Compression.NONE,
        "base_url": "http://test",
        **given,
    }
    return await put_export(yard.database, viewer, yard.settings, query=query, **values)


async def found(yard: Yard, job: Row, viewer: Viewer | None = None) -> Result:
    return await result_of(yard.database, job["_id"], job["result"]["fileName"], viewer)


async def contents(yard: Yard, job: Row, start: int = 0, end: int | None = None) -> bytes:
    result = await found(yard, job)
    end = result.size_bytes if end is None else end
    async with open_storage(yard.settings) as storage:
        parts = await read_result(storage, result.pieces, start, end)
        return b"".join([part async for part in parts])


def lines(data: bytes) -> list[Any]:
    return [orjson.loads(line) for line in data.splitlines()]


def stored(yard: Yard, job: Row) -> list[str]:
    folder: Path = yard.settings.data_path / "blobs" / folder_of(job["_id"])
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


async def test_rows_become_a_file(yard: Yard, small: None) -> None:
    ada = await insert_actor("ada")
    names = await fill(ada, 30)

    job = await yard.run(await put(yard, viewer_of(ada)))

    assert (job["state"], job["error"]) == ("SUCCEEDED", None)
    data = await contents(yard, job)
    assert lines(data) == [{"name": name} for name in names]
    result = dict(job["result"])
    assert result.pop("expiresAt") > utc_now().isoformat()
    assert result == {
        "fileName": f"models-{job['created_at']:%Y%m%d-%H%M%S}.jsonl",
        "mediaType": "application/x-ndjson",
        "format": "JSONL",
        "compression": "NONE",
        "rows": 30,
        "bytes": len(data),
        "truncated": 0,
        "faults": 0,
    }
    assert [(step["name"], step["state"]) for step in job["steps"]] == [
        ("count", "SUCCEEDED"),
        ("write", "SUCCEEDED"),
    ]
    progress = job["progress"]
    assert (progress["current"], progress["total"], progress["unit"]) == (30, 30, "rows")
    assert progress["message"] == f"{len(data)} bytes written"
    # In pieces, which any part of the file goes across.
    assert len(stored(yard, job)) == len(job["checkpoint"]["pieces"]) == 5
    for _ in range(20):
        start = random.randrange(len(data))
        end = random.randrange(start, len(data) + 1)
        assert await contents(yard, job, start, end) == data[start:end]


async def test_nothing_is_a_file_too(yard: Yard) -> None:
    ada = await insert_actor("ada")
    for format, expected in ((ExportFormat.JSONL, b""), (ExportFormat.CSV, b"name\r\n")):
        job = await yard.run(await put(yard, viewer_of(ada), format=format))
        assert (job["state"], job["result"]["rows"]) == ("SUCCEEDED", 0)
        assert await contents(yard, job) == expected


async def test_parquet_is_one_file_in_the_end(yard: Yard, small: None) -> None:
    pyarrow = pytest.importorskip("pyarrow.parquet")
    ada = await insert_actor("ada")
    names = await fill(ada, 30)

    job = await yard.run(await put(yard, viewer_of(ada), format=ExportFormat.PARQUET))

    assert (job["state"], job["error"]) == ("SUCCEEDED", None)
    assert stored(yard, job) == [f"whole-{job['token']}"]
    path = yard.settings.data_path / "blobs" / folder_of(job["_id"]) / stored(yard, job)[0]
    assert pyarrow.read_table(path).to_pylist() == [{"name": name} for name in names]
    assert job["result"]["bytes"] == path.stat().st_size
    assert [step["name"] for step in job["steps"]] == ["count", "write", "join"]


class Killed(Exception):
    """Stands for a process that is killed: nothing that the handler would do after it happens."""


class Attempts:
    """At one job, one after the other, each under a claim of its own; without a worker around."""

    def __init__(self, yard: Yard, shared: Shared, job: Row) -> None:
        self.yard, self.shared, self.job = yard, shared, job

    async def claim(self) -> tuple[Row, Tools]:
        job = await self.yard.database.data["jobs"].find_one_and_update(
            {"_id": self.job["_id"]},
            {"$set": {"state": "RUNNING", "worker": "test"}, "$inc": {"token": 1, "attempt": 1}},
            return_document=ReturnDocument.AFTER,
        )
        assert job is not None
        return job, Tools(self.shared, job, None, Reports(self.yard.database, job))

    async def run(self) -> Row:
        """To its end; the job as it is then."""
        job, tools = await self.claim()
        result = await export_rows(job, tools)
        await self.yard.database.data["jobs"].update_one(
            {"_id": job["_id"]},
            {"$set": {"state": "SUCCEEDED", "result": result, "finished_at": utc_now()}},
        )
        return await self.yard.hall.job(job["_id"])


@pytest.fixture
async def shared(yard: Yard) -> AsyncIterator[Shared]:
    async with (
        connect_cache(yard.settings) as cache,
        open_storage(yard.settings) as storage,
        open_processes(1) as processes,
        open_fence(yard.settings) as fence,
    ):
        yield Shared(yard.database, yard.settings, storage, cache, processes, fence)


@contextmanager
def killed_at(monkeypatch: pytest.MonkeyPatch, at: int) -> Iterator[list[str]]:
    """Before or after the so many-th write of the handler, to the store or to the database."""
    seen: list[str] = []
    put, advance, apart = BlobStore.put, Checkpoint.advance, Tools.apart

    def see(what: str) -> None:
        seen.append(what)
        if len(seen) > at:
            raise Killed

    async def put_or_die(self: BlobStore, key: str, data: Any) -> None:
        see("before a piece")
        await put(self, key, data)
        see("after a piece")

    async def advance_or_die(self: Checkpoint, work: Any) -> None:
        see("before its name")
        await advance(self, work)
        see("after its name")

    async def apart_or_die(self: Tools, function: Any, *arguments: Any) -> Any:
        if function is not join_pieces:
            return await apart(self, function, *arguments)
        see("before the whole")  # which another process puts
        made = await apart(self, function, *arguments)
        see("after the whole")
        return made

    with monkeypatch.context() as patch:
        patch.setattr(BlobStore, "put", put_or_die)
        patch.setattr(Tools, "apart", apart_or_die)
        patch.setattr(Checkpoint, "advance", advance_or_die)
        yield seen


FORMATS: Final = [
    (ExportFormat.JSONL, Compression.NONE),
    (ExportFormat.CSV, Compression.ZSTD),
    (ExportFormat.PARQUET, Compression.ZSTD),
]


@pytest.mark.parametrize(("format", "compression"), FORMATS)
async def test_it_goes_on_from_the_last_piece_wherever_it_is_killed(
    yard: Yard,
    shared: Shared,
    small: None,
    monkeypatch: pytest.MonkeyPatch,
    format: ExportFormat,
    compression: Compression,
) -> None:
    if format is ExportFormat.PARQUET:
        pytest.importorskip("pyarrow")
    ada = await insert_actor("ada")
    names = await fill(ada, 24)
    yard.settings = yard.settings.model_copy(update={"max_exports": 1000})
    given: Row = {"format": format, "compression": compression}
    job = await put(yard, viewer_of(ada), **given)
    whole = await contents(yard, await Attempts(yard, shared, job).run())
    began: list[int] = []

    for at in range(100):
        attempts = Attempts(yard, shared, await put(yard, viewer_of(ada), **given))
        with killed_at(monkeypatch, at) as seen:
            try:
                await attempts.run()
                break  # there are no more places
            except Killed:
                pass
        row = await yard.hall.job(attempts.job["_id"])
        began.append(row["checkpoint"]["rows"] if row["checkpoint"] else 0)
        with killed_at(monkeypatch, 1000) as seen:
            ended = await attempts.run()

        assert ended["result"]["rows"] == len(names), at
        assert await contents(yard, ended) == whole, at
        # Nothing is left of what was put and never named; nothing was done twice but one piece.
        assert stored(yard, ended) == sorted(name for name, _ in ended["checkpoint"]["pieces"]), at
        if format is not ExportFormat.PARQUET:
            rest = len(ended["checkpoint"]["pieces"]) - began[-1] // 7
            assert seen.count("after a piece") == max(rest, 0) - (began[-1] == len(names)), at

    # Four places for each of four pieces, and two for the end.
    assert began[:18] == [*[0] * 3, *[7] * 4, *[14] * 4, *[21] * 4, *[24] * 3]
    assert len(began) == (18 if format is not ExportFormat.PARQUET else 22)


async def test_rows_are_of_one_version_over_all_attempts(
    yard: Yard, shared: Shared, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What leads to it moves between two attempts: the second one does not go on with another's rows."""
    ada = await insert_actor("ada")
    model = await insert_model(ada, "m")
    files = {f"{number:02}.bin": number for number in range(20)}
    await insert_version(yard.database, model, files)
    query = '{ model(owner: "ada", name: "m") { latestVersion { files { nodes { path } } } } }'
    attempts = Attempts(yard, shared, await put(yard, viewer_of(ada), query))
    with killed_at(monkeypatch, 4), pytest.raises(Killed):
        await attempts.run()
    row = await yard.hall.job(attempts.job["_id"])
    assert row["checkpoint"]["rows"] == 7
    await insert_version(yard.database, model, files)
    with pytest.raises(Conflict):
        await attempts.run()


async def test_what_gets_on_is_suspected_no_more(
    yard: Yard, shared: Shared, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often its workers die, each time somewhere else."""
    ada = await insert_actor("ada")
    await fill(ada, 30)
    attempts = Attempts(yard, shared, await put(yard, viewer_of(ada)))
    deaths = []
    for at in (1, 2, 3, 100):  # before the name of a piece, after it, and at its end
        await yard.database.data["jobs"].update_one(
            {"_id": attempts.job["_id"]}, {"$set": {"deaths": 2}}
        )
        with killed_at(monkeypatch, at), suppress(Killed):
            await attempts.run()
        deaths.append((await yard.hall.job(attempts.job["_id"]))["deaths"])
    assert deaths == [2, 2, 0, 0]


async def test_two_workers_at_once_do_not_mix(yard: Yard, shared: Shared, small: None) -> None:
    ada = await insert_actor("ada")
    names = await fill(ada, 30)
    attempts = Attempts(yard, shared, await put(yard, viewer_of(ada)))
    first = await attempts.claim()
    second = await attempts.claim()  # the lease of the first one has run out, and it does not know

    with pytest.raises(LeaseLost):
        await export_rows(*first)
    result = await export_rows(*second)

    assert result["rows"] == 30
    row = await yard.hall.job(attempts.job["_id"])
    assert {name.partition("-")[2] for name, _ in row["checkpoint"]["pieces"]} == {"2"}
    row = {**row, "state": "SUCCEEDED", "result": result}
    await yard.database.data["jobs"].replace_one({"_id": row["_id"]}, row)
    assert lines(await contents(yard, row)) == [{"name": name} for name in names]


async def test_each_row_comes_once_whatever_changes_meanwhile(yard: Yard, small: None) -> None:
    ada = await insert_actor("ada")
    names = await fill(ada, 60)
    job = await put(yard, viewer_of(ada))
    models = yard.database.data["models"]
    gone = set(names[::9])

    async def exporting_amid_changes(job: Row, tools: Tools) -> Row:
        async def change() -> None:
            for number, name in enumerate(sorted(gone, reverse=True)):
                await models.delete_one({"name": name})
                await fill(ada, 2, 100 + 2 * number, created_at=START + timedelta(seconds=number))
                await models.update_many({}, {"$set": {"stats.trending_score": number}})

        changing = asyncio.create_task(change())
        result = await export_rows(job, tools)
        await changing
        return result

    ended = await yard.run(job, {JobKind.EXPORT: exporting_amid_changes})

    assert ended["state"] == "SUCCEEDED"
    seen = [row["name"] for row in lines(await contents(yard, ended))]
    assert len(seen) == len(set(seen)) == ended["result"]["rows"]
    throughout = [name for name in names if name not in gone]
    assert [name for name in seen if name in set(throughout)] == throughout


async def test_each_person_gets_what_they_may_see(yard: Yard) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    ada, eve = await insert_actor("ada"), await insert_actor("eve")
    await MembershipDocument(organization_id=acme.id, user_id=ada.id, role=Role.VIEWER).insert()
    theirs = await fill(acme, 5, visibility=Visibility.PRIVATE)
    inside = await fill(eve, 5, 10, visibility=Visibility.INTERNAL)
    own = await fill(eve, 5, 20, visibility=Visibility.PRIVATE)
    for who, expected in ((ada, [*theirs, *inside]), (eve, [*inside, *own])):
        job = await yard.run(await put(yard, viewer_of(who)))
        assert [row["name"] for row in lines(await contents(yard, job))] == expected


async def test_rights_that_end_meanwhile_end_the_export(yard: Yard, small: None) -> None:
    acme, ada = await insert_actor("acme", ActorKind.ORGANIZATION), await insert_actor("ada")
    member = MembershipDocument(organization_id=acme.id, user_id=ada.id, role=Role.VIEWER)
    await member.insert()
    await fill(acme, 60, visibility=Visibility.PRIVATE)
    job = await put(yard, viewer_of(ada))

    async def leaving(job: Row, tools: Tools) -> Row:
        put = tools.storage.put

        async def leave(key: str, data: bytes) -> None:
            await put(key, data)
            await member.delete()

        tools.storage.put = leave  # type: ignore[method-assign, assignment]  # this worker's alone
        return await export_rows(job, tools)

    ended = await yard.run(job, {JobKind.EXPORT: leaving})

    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "FORBIDDEN")
    assert ended["result"] is None
    with pytest.raises(NotFound):
        await result_of(yard.database, job["_id"], "any", None)
    # Anew it is an export of what she may see now.
    await retry_job(yard.database, viewer_of(ada), job_id=job["_id"])
    ended = await yard.run(await yard.hall.job(job["_id"]))
    assert (ended["state"], ended["result"]["rows"]) == ("SUCCEEDED", 0)
    assert stored(yard, ended) == []


async def test_a_result_is_for_who_asked_with_the_rights_of_then(yard: Yard) -> None:
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    ada, eve = await insert_actor("ada"), await insert_actor("eve")
    member = MembershipDocument(organization_id=acme.id, user_id=ada.id, role=Role.VIEWER)
    await member.insert()
    await fill(acme, 5, visibility=Visibility.PRIVATE)
    job = await yard.run(await put(yard, viewer_of(ada)))
    roles = {acme.id: Role.VIEWER}
    assert (await found(yard, job)).size_bytes == job["result"]["bytes"]
    await found(yard, job, viewer_of(ada, roles))
    with pytest.raises(NotFound):
        await found(yard, job, viewer_of(eve, roles))
    with pytest.raises(NotFound):
        await result_of(yard.database, job["_id"], "other.jsonl", None)
    with pytest.raises(Forbidden):  # by a token that reads nothing
        await found(yard, job, replace(viewer_of(ada, roles), scopes=frozenset()))

    await member.delete()
    for viewer in (None, viewer_of(ada)):
        with pytest.raises(Forbidden, match="export it again"):
            await found(yard, job, viewer)
    await member.insert()
    await found(yard, job)
    await ada.delete()
    with pytest.raises(Forbidden):
        await found(yard, job)


async def test_one_who_is_gone_exports_nothing(yard: Yard) -> None:
    ada = await insert_actor("ada")
    await fill(ada, 5)
    job = await put(yard, viewer_of(ada))
    await ada.delete()
    ended = await yard.run(job)
    assert (ended["state"], ended["error"]["code"]) == ("FAILED", "FORBIDDEN")
    assert stored(yard, job) == []


async def test_a_cancelled_one_leaves_nothing(
    yard: Yard, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    ada = await insert_actor("ada")
    names = await fill(ada, 60)
    job = await put(yard, viewer_of(ada))
    were: list[int] = []

    async def cancelled(job: Row, tools: Tools) -> Row:
        put = tools.storage.put

        async def cancel(key: str, data: bytes) -> None:
            await put(key, data)
            were.append(len(stored(yard, job)))
            if len(were) == 3:
                await cancel_job(yard.database, viewer_of(ada), job_id=job["_id"])
                await tools._reports.write()

        tools.storage.put = cancel  # type: ignore[method-assign, assignment]  # this worker's alone
        return await export_rows(job, tools)

    ended = await yard.run(job, {JobKind.EXPORT: cancelled})
    assert (ended["state"], were) == ("CANCELLED", [1, 2, 3])
    assert stored(yard, job) == []

    await retry_job(yard.database, viewer_of(ada), job_id=job["_id"])
    ended = await yard.run(await yard.hall.job(job["_id"]))
    assert [row["name"] for row in lines(await contents(yard, ended))] == names


async def test_what_joins_pieces_hears_of_the_end_of_the_job(
    yard: Yard, shared: Shared, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    monkeypatch.setattr(export, "CHECK_SECONDS", 0.01)
    ada = await insert_actor("ada")
    await fill(ada, 24)
    attempts = Attempts(yard, shared, await put(yard, viewer_of(ada), format=ExportFormat.PARQUET))
    job, tools = await attempts.claim()
    apart, begun = tools.apart, asyncio.Event()

    async def long(function: Any, *arguments: Any) -> Any:
        if function is join_pieces:
            begun.set()
            await asyncio.Event().wait()
        return await apart(function, *arguments)

    monkeypatch.setattr(tools, "apart", long)
    working = asyncio.create_task(export_rows(job, tools))
    async with asyncio.timeout(60):
        await begun.wait()
        assert stored(yard, job)
        # As it is left by a process that is killed while it puts the whole; listings do not show it.
        folder = yard.settings.data_path / "blobs" / folder_of(job["_id"])
        (folder / f"whole-{job['token']}#1").write_bytes(b"half")
        tools._reports.cancel()
        with pytest.raises(JobCancelled):
            await working
    assert not folder.exists()


async def test_what_is_put_by_a_later_claim_stays(yard: Yard, shared: Shared) -> None:
    job_id = ObjectId()
    folder = yard.settings.data_path / "blobs" / folder_of(job_id)
    folder.mkdir(parents=True)
    for name in ("whole-1#1", "whole-2#7", "whole-3#1", "0-2", "0-3"):
        (folder / name).write_bytes(b"half")
    await remove_pieces(shared.storage, job_id, up_to=2)
    assert {each.name for each in folder.iterdir()} == {"whole-3#1", "0-3"}


async def test_what_cannot_be_answered_is_told_in_the_log(yard: Yard) -> None:
    ada = await insert_actor("ada")
    names = await fill(ada, 10)
    await yard.database.data["models"].update_one(
        {"name": names[4]}, {"$set": {"owner_login": None}}
    )
    query = "{ models { nodes { name fullName owner { login } } } }"
    await yard.database.data["models"].update_one({"name": names[6]}, {"$unset": {"owner_id": 1}})

    ended = await yard.run(await put(yard, viewer_of(ada), query))

    assert (ended["state"], ended["result"]["faults"], ended["result"]["rows"]) == (
        "SUCCEEDED",
        1,
        9,
    )
    row = await yard.database.data["models"].find_one({"name": names[6]})
    assert row is not None
    [(level, message)] = await yard.log(ended)
    assert (level, message.partition(":")[0]) == ("WARNING", global_id("Model", row["_id"]))


async def test_how_many_one_may_have(yard: Yard) -> None:
    ada, eve = await insert_actor("ada"), await insert_actor("eve")
    key = {"idempotency_key": "same"}
    first = await put(yard, viewer_of(ada), **key)
    for _ in range(yard.settings.max_exports - 1):
        await put(yard, viewer_of(ada))
    with pytest.raises(Refused) as refused:
        await put(yard, viewer_of(ada))
    assert refused.value.code is ErrorCode.QUOTA_EXCEEDED
    assert await yard.database.count("jobs", {}) == yard.settings.max_exports
    # The same again is no other one; others have their own.
    assert (await put(yard, viewer_of(ada), **key))["_id"] == first["_id"]
    await put(yard, viewer_of(eve))
    with pytest.raises(Refused) as refused:
        await put(yard, viewer_of(ada), "{ jobs { nodes { id } } }", **key)
    assert refused.value.code is ErrorCode.CONFLICT
    await yard.run(first)
    await put(yard, viewer_of(ada))
    nobody = replace(viewer_of(ada), scopes=frozenset({Permission.DOWNLOAD}))
    with pytest.raises(Refused) as refused:
        await put(yard, nobody)
    assert refused.value.code is ErrorCode.FORBIDDEN


async def test_old_results_go(yard: Yard, shared: Shared, small: None) -> None:
    ada = await insert_actor("ada")
    await fill(ada, 20)
    viewer = viewer_of(ada)
    old, new, failed = [await yard.run(await put(yard, viewer)) for _ in range(3)]
    jobs = yard.database.data["jobs"]
    past = utc_now() - timedelta(days=8)
    await jobs.update_one({"_id": old["_id"]}, {"$set": {"finished_at": past}})
    await jobs.update_one({"_id": failed["_id"]}, {"$set": {"state": "FAILED"}})
    lost = ObjectId()
    await shared.storage.put(f"{folder_of(lost)}/0-1", b"x")
    waiting = await put(yard, viewer)
    await shared.storage.put(f"{folder_of(waiting['_id'])}/0-1", b"x")

    async def collect(**given: Any) -> Row:
        collecting = await yard.hall.put(JobKind.GARBAGE_COLLECT, input=given)
        ended = await Yard(yard.hall, worker_concurrency=1).run(
            collecting, {JobKind.GARBAGE_COLLECT: collect_garbage}
        )
        assert ended["error"] is None
        result: Row = ended["result"]
        return result

    assert (await collect(dry_run=True))["exports"] == 1
    assert len(stored(yard, old)) == 3
    assert (await collect())["exports"] == 1

    assert stored(yard, old) == stored(yard, failed) == stored(yard, {"_id": lost}) == []
    assert len(stored(yard, new)) == 3
    assert stored(yard, waiting) == ["0-1"]
    folders = yard.settings.data_path / "blobs" / "exports"
    assert sorted(path.name for path in folders.iterdir()) == sorted(
        str(each["_id"]) for each in (new, waiting)
    )
    old = await yard.hall.job(old["_id"])
    assert (old["checkpoint"], old["result"]["isRemoved"]) == (None, True)
    with pytest.raises(Gone, match="was kept until"):
        await found(yard, old)
    await found(yard, new)
    assert (await collect())["exports"] == 0


async def test_a_result_is_gone_at_its_time(yard: Yard) -> None:
    ada = await insert_actor("ada")
    await fill(ada, 1)
    job = await Yard(yard.hall, export_days=1e-6).run(await put(yard, viewer_of(ada)))
    await asyncio.sleep(1)  # it is said in whole seconds
    with pytest.raises(Gone):
        await found(yard, job)
