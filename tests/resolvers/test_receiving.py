"""Bytes come in, from one holder at a time, and nothing that came is lost or mixed."""

import asyncio
import errno
import os
import random
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from hashlib import sha1, sha256
from typing import Any

import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect

from modelharbor.db.actors import Role
from modelharbor.db.base import Row, utc_now
from modelharbor.db.tokens import Permission
from modelharbor.db.uploads import Segment
from modelharbor.errors import (
    BadRequest,
    ChecksumMismatch,
    Conflict,
    Gone,
    HarborError,
    InsufficientStorage,
    Locked,
    NotFound,
    PayloadTooLarge,
    RequestTimeout,
    Unavailable,
    UploadPaused,
)
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.resolvers import intake, receiving
from modelharbor.resolvers.completing import VERIFY_ATTEMPTS, complete
from modelharbor.resolvers.intake import Holding
from modelharbor.resolvers.receiving import Checksum, Receiver
from modelharbor.resolvers.uploads import (
    UploadFile,
    abort_upload,
    complete_upload,
    pause_upload,
)
from modelharbor.storage.blobs import open_storage
from modelharbor.storage.chunks import ChunkIncoming
from tests.resolvers.uploading import Site, Stalling, body, digest_of, site

__all__ = ["site"]
pytestmark = pytest.mark.anyio
MEBIBYTE = 1024 * 1024
SOME = bytes(range(250)) * 4  # 1,000 bytes


async def create(site: Site, size: int = len(SOME), path: str = "file", **options: Any) -> ObjectId:
    [row] = await site.create(UploadFile(path, size, options.pop("sha256", None)), **options)
    upload_id: ObjectId = row["_id"]
    return upload_id


async def send(
    site: Site, upload_id: ObjectId, offset: int, contents: bytes, **options: Any
) -> Row:
    receiver: Receiver = options.pop("receiver", None) or site.receiver()
    viewer = options.pop("viewer", site.viewer)
    return await receiver.receive(viewer, upload_id, offset, body(contents), **options)


async def verified(site: Site, upload_id: ObjectId) -> Row:
    """As the job does it."""
    row = await site.row(upload_id)
    segments = [Segment(**each) for each in row["segments"]]
    incoming = site.storage.incoming
    key = incoming.final_key(segments)
    if key is None:
        key = f"incoming/{upload_id}/whole"
        digest = await incoming.compose(segments, key)
    else:
        digest = await incoming.digest(key, row["size_bytes"])
    return await complete(site.database, site.storage, row, digest, key)


async def let_lease_run_out(site: Site, upload_id: ObjectId) -> None:
    await site.database.data["uploads"].update_one(
        {"_id": upload_id}, {"$set": {"held_until": utc_now() - timedelta(seconds=1)}}
    )


# In order ---------------------------------------------------------------------------------------


async def test_a_file_comes_whole(site: Site) -> None:
    upload_id = await create(site, sha256=digest_of(SOME))
    row = await send(site, upload_id, 0, SOME)
    assert row == await site.row(upload_id)
    file = await site.one("files")
    assert row == row | {
        "state": "COMPLETED",
        "is_open": False,
        "received_bytes": 1000,
        "sha256": digest_of(SOME),
        "holder": None,
        "file_id": file["_id"],
        "job_id": (await site.one("jobs"))["_id"],
        "error": None,
        "segments": [],
    }
    assert (file["path"], file["sha256"], file["size_bytes"]) == ("file", digest_of(SOME), 1000)
    assert await site.contents(digest_of(SOME)) == SOME
    blob = await site.one("blobs")
    assert (blob["key"], blob["references"]) == (f"incoming/{upload_id}/1", 1)
    assert await site.counters() == (1, 1000, 1, 1000)
    assert await site.quota() == (0, 0)
    assert await site.states(row) == ["CREATED", "COMPLETED"]


async def test_a_file_comes_in_several_requests(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver()
    for start in range(0, 1000, 300):
        row = await send(site, upload_id, start, SOME[start : start + 300], receiver=receiver)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
    assert site.kept() == [f"{upload_id}/1"]
    assert await site.contents(digest_of(SOME)) == SOME
    assert await site.states(row) == ["CREATED", "UPLOADING", "COMPLETED"]


async def test_another_process_goes_on_and_a_job_reads_it_again(site: Site) -> None:
    upload_id = await create(site)
    row = await send(site, upload_id, 0, SOME[:300])
    assert (row["received_bytes"], row["holder"], row["held_until"]) == (300, None, None)
    row = await send(site, upload_id, 300, SOME[300:])
    assert (row["state"], row["received_bytes"], row["is_open"]) == ("RECEIVED", 1000, True)
    assert row["segments"] == [{"key": f"incoming/{upload_id}/1", "size_bytes": 1000}]
    job = await site.one("jobs")
    assert (job["kind"], row["job_id"]) == ("VERIFY_FILE", job["_id"])
    assert job["input"] == {"upload_id": upload_id, "version_id": site.version.id}
    assert await site.quota() == (1000, 1)
    assert await send(site, upload_id, 1000, b"") == row
    row = await verified(site, upload_id)
    assert (row["state"], row["job_id"]) == ("COMPLETED", job["_id"])
    assert await site.database.data["jobs"].count_documents({}) == 1
    assert await site.contents(digest_of(SOME)) == SOME
    assert await site.quota() == (0, 0)
    assert await site.states(row) == ["CREATED", "UPLOADING", "RECEIVED", "COMPLETED"]


async def test_progress_is_counted_while_bytes_come(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "FLUSH_BYTES", 2 * MEBIBYTE)
    contents = os.urandom(5 * MEBIBYTE)
    upload_id, stalling = await create(site, len(contents)), Stalling(contents[:-1], contents[-1:])
    receiving = asyncio.create_task(
        site.receiver().receive(site.viewer, upload_id, 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    while (row := await site.row(upload_id))["received_bytes"] < len(contents) - 1:
        await asyncio.sleep(0.01)
    assert (row["state"], row["rate"] > 0, row["holder"] is not None) == ("UPLOADING", True, True)
    assert row["held_until"] > utc_now()
    assert row["sequence"] >= 1
    stalling.goes_on.set()
    row = await receiving
    assert (row["state"], row["rate"]) == ("COMPLETED", None)
    assert await site.contents(digest_of(contents)) == contents


@pytest.mark.parametrize("has_all", [True, False])
async def test_nothing_turns_while_it_waits(
    site: Site, monkeypatch: pytest.MonkeyPatch, has_all: bool
) -> None:
    """Neither for a flush that takes long, nor for the end behind the last byte."""
    monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.02)
    turns, advance, wait = 0, Holding.advance, intake.Intake._wait
    begun, goes_on = asyncio.Event(), asyncio.Event()

    async def slow(self: Holding, written: int, **given: Any) -> Row:
        begun.set()
        await goes_on.wait()
        return await advance(self, written, **given)

    async def counted(self: intake.Intake, *given: Any) -> None:
        nonlocal turns
        turns += 1
        await wait(self, *given)

    monkeypatch.setattr(Holding, "advance", slow)
    monkeypatch.setattr(intake.Intake, "_wait", counted)
    stalling = Stalling(SOME if has_all else SOME[:300], b"" if has_all else SOME[300:])
    upload_id = await create(site)

    async def pieces() -> AsyncIterator[bytes]:
        async for piece in stalling:
            yield piece[:-1]
            if not has_all:
                await begun.wait()
            yield piece[-1:]

    receiving = asyncio.create_task(site.receiver().receive(site.viewer, upload_id, 0, pieces()))
    await stalling.is_asked.wait()
    await asyncio.sleep(0.1)  # five times as long as bytes wait
    assert turns < 10
    goes_on.set()
    stalling.goes_on.set()
    assert (await receiving)["state"] == "COMPLETED"


async def test_few_commands_receive_a_small_file(site: Site) -> None:
    """Most of them for all that complete at the same time."""
    receiver = site.receiver()
    rows = await site.create(*(UploadFile(f"{number}", 10) for number in range(40)))
    count = CommandCount()
    counted.set(count)
    done = await asyncio.gather(
        *(
            receiver.receive(site.viewer, row["_id"], 0, body(b"%010d" % number))
            for number, row in enumerate(rows)
        )
    )
    assert {row["state"] for row in done} == {"COMPLETED"}
    assert await site.counters() == (40, 400, 40, 400)
    assert await site.quota() == (0, 0)
    assert count.names.count("findAndModify uploads") == 40
    assert len(count.names) < 40 + 5 * 20


# Who may ----------------------------------------------------------------------------------------


async def test_others_do_not_find_it(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver()
    for viewer in (
        site.company.stranger,
        site.company.member(Role.DOWNLOADER),
        replace(site.viewer, scopes=frozenset({Permission.READ})),
    ):
        with pytest.raises(NotFound):
            await receiver.status(viewer, upload_id)
        with pytest.raises(NotFound):
            await send(site, upload_id, 0, SOME, viewer=viewer)
        with pytest.raises(NotFound):
            await receiver.terminate(viewer, upload_id)
    with pytest.raises(NotFound):
        await receiver.status(site.viewer, ObjectId())
    assert (await site.row(upload_id))["token"] == 0
    row = await send(site, upload_id, 0, SOME, viewer=site.company.member(Role.CONTRIBUTOR))
    assert row["state"] == "COMPLETED"


async def test_who_may_no_longer_write_adds_no_file(site: Site) -> None:
    contributor = site.company.member(Role.CONTRIBUTOR)
    upload_id = await create(site, viewer=contributor)
    lost = replace(contributor, roles={})
    with pytest.raises(HarborError, match="permission WRITE") as caught:
        await send(site, upload_id, 0, SOME, viewer=lost)
    assert caught.value.code == "FORBIDDEN"
    row = await site.row(upload_id)
    assert (row["state"], row["error"]["code"]) == ("FAILED", "FORBIDDEN")
    assert (site.kept(), await site.quota()) == ([], (0, 0))
    assert await site.counters() == (0, 0, 0, 0)


# Wrong bytes ------------------------------------------------------------------------------------


async def test_the_wrong_offset_is_refused(site: Site) -> None:
    upload_id = await create(site)
    await send(site, upload_id, 0, SOME[:300])
    for offset in (0, 299, 301, 1000):
        with pytest.raises(Conflict, match="goes on at 300"):
            await send(site, upload_id, offset, SOME[300:])
    assert (await site.row(upload_id))["received_bytes"] == 300


async def test_more_bytes_than_the_file_has_are_refused(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver()
    await send(site, upload_id, 0, SOME[:300], receiver=receiver)
    for more in (b"x", SOME * 100):
        with pytest.raises(PayloadTooLarge):
            await send(site, upload_id, 300, SOME[300:] + more, receiver=receiver)
        row = await site.row(upload_id)
        assert (row["received_bytes"], row["holder"]) == (300, None)
    row = await send(site, upload_id, 300, SOME[300:], receiver=receiver)
    assert row["state"] == "COMPLETED"
    with pytest.raises(Conflict):
        await send(site, upload_id, 0, SOME)


async def test_other_contents_than_announced_fail(site: Site) -> None:
    upload_id = await create(site, sha256=digest_of(b"other"))
    with pytest.raises(ChecksumMismatch, match=digest_of(b"other")):
        await send(site, upload_id, 0, SOME)
    row = await site.row(upload_id)
    assert (row["state"], row["error"]["code"]) == ("FAILED", "CHECKSUM_MISMATCH")
    assert (site.kept(), await site.quota()) == ([], (0, 0))
    assert await site.database.count("files", {}) == 0
    assert await site.database.count("blobs", {}) == 0
    for act in (site.receiver().status, site.receiver().terminate):
        with pytest.raises(Gone, match="FAILED"):
            await act(site.viewer, upload_id)
    assert await site.states(row) == ["CREATED", "FAILED"]


@pytest.mark.parametrize("algorithm", ["sha1", "sha256"])
async def test_bytes_are_kept_once_their_checksum_holds(site: Site, algorithm: str) -> None:
    upload_id, receiver = await create(site), site.receiver()
    hasher = {"sha1": sha1, "sha256": sha256}[algorithm]

    def checksum(contents: bytes) -> Checksum:
        return Checksum(algorithm, hasher(contents).digest())

    first, rest = SOME[:300], SOME[300:]
    for offset, right, row_of in ((0, first, 300), (300, rest, 1000)):
        with pytest.raises(ChecksumMismatch):
            await send(
                *(site, upload_id, offset, b"x" * len(right)),
                receiver=receiver,
                checksum=checksum(right),
            )
        row = await site.row(upload_id)
        assert (row["received_bytes"], row["holder"]) == (offset, None)
        row = await send(
            site, upload_id, offset, right, receiver=receiver, checksum=checksum(right)
        )
        assert row["received_bytes"] == row_of
    assert row["state"] == "COMPLETED"
    assert await site.contents(digest_of(SOME)) == SOME


async def test_a_long_request_counts_nothing_before_its_checksum_holds(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "FLUSH_BYTES", MEBIBYTE)
    contents = os.urandom(4 * MEBIBYTE)
    upload_id = await create(site, len(contents) + 1)
    stalling = Stalling(contents, b"x")
    receiving = asyncio.create_task(
        site.receiver(upload_lease_seconds=0.3).receive(
            *(site.viewer, upload_id, 0, aiter(stalling)),
            checksum=Checksum("sha1", sha1(contents).digest()),
        )
    )
    await stalling.is_asked.wait()
    before = (await site.row(upload_id))["held_until"]
    while (row := await site.row(upload_id))["held_until"] == before:  # it is renewed meanwhile
        await asyncio.sleep(0.01)
    assert row["received_bytes"] == 0
    stalling.goes_on.set()
    with pytest.raises(ChecksumMismatch):
        await receiving
    assert (await site.row(upload_id))["received_bytes"] == 0
    assert site.kept() == []


# Clients that go --------------------------------------------------------------------------------


class GoneAway(Exception):
    pass


async def test_what_came_of_a_client_that_vanished_is_kept(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver()
    stalling = Stalling(SOME[:300], failure=GoneAway())
    stalling.goes_on.set()
    with pytest.raises(GoneAway):
        await receiver.receive(site.viewer, upload_id, 0, aiter(stalling))
    row = await site.row(upload_id)
    assert (row["received_bytes"], row["state"], row["holder"]) == (300, "UPLOADING", None)
    row = await send(site, upload_id, 300, SOME[300:], receiver=receiver)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))


async def test_what_came_before_the_task_was_cancelled_is_kept(site: Site) -> None:
    upload_id, stalling = await create(site), Stalling(SOME[:300])
    receiver = site.receiver()
    receiving = asyncio.create_task(receiver.receive(site.viewer, upload_id, 0, aiter(stalling)))
    await stalling.is_asked.wait()
    for _ in range(3):
        receiving.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await receiving
    row = await site.row(upload_id)
    assert (row["received_bytes"], row["state"], row["holder"]) == (300, "UPLOADING", None)
    row = await send(site, upload_id, 300, SOME[300:], receiver=receiver)
    assert row["state"] == "COMPLETED"


async def test_a_file_of_a_client_that_vanished_behind_the_last_byte_is_complete(
    site: Site,
) -> None:
    upload_id, stalling = await create(site), Stalling(SOME, failure=GoneAway())
    stalling.goes_on.set()
    with pytest.raises(GoneAway):
        await site.receiver().receive(site.viewer, upload_id, 0, aiter(stalling))
    assert (await site.row(upload_id))["state"] == "COMPLETED"


async def test_a_client_that_sends_nothing_is_ended(site: Site) -> None:
    upload_id, stalling = await create(site), Stalling(SOME[:300])
    with pytest.raises(RequestTimeout):
        await site.receiver(upload_idle_seconds=0.1).receive(
            site.viewer, upload_id, 0, aiter(stalling)
        )
    row = await site.row(upload_id)
    assert (row["received_bytes"], row["holder"]) == (300, None)


async def test_a_slow_client_is_no_idle_one(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.05)

    async def slowly() -> AsyncIterator[bytes]:
        for start in range(0, 1000, 100):
            await asyncio.sleep(0.05)
            yield SOME[start : start + 100]

    upload_id = await create(site)
    receiver = site.receiver(upload_idle_seconds=0.3, upload_lease_seconds=0.2)
    row = await receiver.receive(site.viewer, upload_id, 0, slowly())
    assert row["state"] == "COMPLETED"
    assert row["sequence"] > 3  # it was counted meanwhile


# One at a time ----------------------------------------------------------------------------------


async def test_a_second_client_finds_it_locked(site: Site) -> None:
    upload_id, stalling = await create(site), Stalling(SOME[:300], SOME[300:])
    receiving = asyncio.create_task(
        site.receiver().receive(site.viewer, upload_id, 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    with pytest.raises((Locked, Conflict)):
        await send(site, upload_id, 0, SOME)
    stalling.goes_on.set()
    assert (await receiving)["state"] == "COMPLETED"
    assert await site.contents(digest_of(SOME)) == SOME


async def test_of_fifty_at_once_one_wins(site: Site) -> None:
    upload_id = await create(site)
    receivers = [site.receiver() for _ in range(3)]
    many = [bytes([number]) * 1000 for number in range(50)]
    answers = await asyncio.gather(
        *(
            send(site, upload_id, 0, contents, receiver=receivers[number % 3])
            for number, contents in enumerate(many)
        ),
        return_exceptions=True,
    )
    won = [each for each in answers if isinstance(each, dict) and each["sha256"]]
    refusals = [each for each in answers if isinstance(each, BaseException)]
    assert (len(won), len(refusals)) == (1, 49)
    assert {type(each) for each in refusals} <= {Locked, Conflict}
    row = await site.row(upload_id)
    winner = many[[isinstance(each, dict) for each in answers].index(True)]
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(winner))
    assert await site.contents(row["sha256"]) == winner
    assert await site.counters() == (1, 1000, 1, 1000)
    assert site.kept() == [f"{upload_id}/1"]


async def test_who_takes_over_from_a_dead_process_begins_a_segment(site: Site) -> None:
    upload_id = await create(site)
    await send(site, upload_id, 0, SOME[:300])
    await site.database.data["uploads"].update_one(
        {"_id": upload_id},
        {"$set": {"holder": "dead", "held_until": utc_now() + timedelta(seconds=60)}},
    )
    with pytest.raises(Locked):
        await send(site, upload_id, 300, SOME[300:])
    await let_lease_run_out(site, upload_id)
    row = await send(site, upload_id, 300, SOME[300:])
    assert row["segments"] == [
        {"key": f"incoming/{upload_id}/1", "size_bytes": 300},
        {"key": f"incoming/{upload_id}/2", "size_bytes": 700},
    ]
    row = await verified(site, upload_id)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
    assert site.kept() == [f"{upload_id}/whole"]
    assert await site.contents(digest_of(SOME)) == SOME


@pytest.mark.parametrize("is_broken", [True, False])
async def test_who_stood_still_is_gone_on_with_by_none_of_those_who_follow(
    site: Site, monkeypatch: pytest.MonkeyPatch, is_broken: bool
) -> None:
    """Who took over may have written nothing: those after it keep away from the segment all the same."""
    monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.02)
    upload_id, stalling = await create(site), Stalling(SOME[:300], b"x" * 700)
    receiving = asyncio.create_task(
        site.receiver().receive(site.viewer, upload_id, 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    while (await site.row(upload_id))["received_bytes"] < 300:
        await asyncio.sleep(0.01)
    await let_lease_run_out(site, upload_id)
    if is_broken:
        wrong = Checksum("sha1", bytes(20))
        with pytest.raises(ChecksumMismatch):
            await send(site, upload_id, 300, b"wrong", checksum=wrong)
    else:
        await send(site, upload_id, 300, b"", length=0)
    await send(site, upload_id, 300, b"", length=0)
    assert (await send(site, upload_id, 300, SOME[300:600]))["received_bytes"] == 600
    stalling.goes_on.set()
    with pytest.raises(Conflict, match="taken this upload over"):
        await receiving
    await send(site, upload_id, 600, SOME[600:])
    row = await verified(site, upload_id)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
    assert await site.contents(digest_of(SOME)) == SOME
    assert site.kept() == [f"{upload_id}/whole"]


@pytest.mark.parametrize("is_recorded", [True, False])
async def test_who_stood_still_and_was_taken_over_stops(
    site: Site, monkeypatch: pytest.MonkeyPatch, is_recorded: bool
) -> None:
    """Its late bytes come among no others."""
    monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.02 if is_recorded else 60)
    upload_id, stalling = await create(site), Stalling(SOME[:300], b"x" * 700)
    receiving = asyncio.create_task(
        site.receiver().receive(site.viewer, upload_id, 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    while is_recorded and (await site.row(upload_id))["received_bytes"] < 300:
        await asyncio.sleep(0.01)
    await let_lease_run_out(site, upload_id)
    offset = 300 if is_recorded else 0
    row = await send(site, upload_id, offset, SOME[offset:600])
    assert row["received_bytes"] == 600
    stalling.goes_on.set()
    with pytest.raises(Conflict, match="taken this upload over"):
        await receiving
    row = await site.row(upload_id)
    assert (row["received_bytes"], row["holder"]) == (600, None)
    await send(site, upload_id, 600, SOME[600:])
    row = await verified(site, upload_id)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
    assert len(site.kept()) == 1
    assert await site.contents(digest_of(SOME)) == SOME


async def test_a_pause_ends_who_is_sending(site: Site) -> None:
    upload_id, stalling = await create(site), Stalling(SOME[:300])
    receiving = asyncio.create_task(
        site.receiver(upload_lease_seconds=0.2).receive(site.viewer, upload_id, 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    await pause_upload(site.database, site.storage, site.viewer, upload_id=upload_id)
    with pytest.raises(UploadPaused) as caught:
        await receiving
    assert (caught.value.code, caught.value.status) == ("UPLOAD_PAUSED", 403)
    row = await site.row(upload_id)
    assert (row["state"], row["holder"]) == ("PAUSED", None)
    offset = row["received_bytes"]
    assert offset in (0, 300)
    row = await send(site, upload_id, offset, SOME[offset:])
    if row["state"] == "RECEIVED":
        row = await verified(site, upload_id)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))


async def test_a_pause_that_comes_after_the_last_byte_holds_nothing_up(site: Site) -> None:
    """The offset says that nothing is to be sent: no client would come to end the pause."""
    upload_id = await create(site)

    async def all_bytes() -> AsyncIterator[bytes]:
        yield SOME
        await pause_upload(site.database, site.storage, site.viewer, upload_id=upload_id)

    row = await site.receiver().receive(site.viewer, upload_id, 0, all_bytes())
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))


async def test_an_abort_ends_who_is_sending(site: Site) -> None:
    upload_id, stalling = await create(site), Stalling(SOME[:300])
    receiving = asyncio.create_task(
        site.receiver(upload_lease_seconds=0.2).receive(site.viewer, upload_id, 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    await abort_upload(site.database, site.storage, site.viewer, upload_id=upload_id)
    with pytest.raises(Gone):
        await receiving
    assert (site.kept(), await site.quota()) == ([], (0, 0))
    assert (await site.row(upload_id))["state"] == "ABORTED"


async def test_a_hash_that_completes_it_ends_who_is_sending(site: Site) -> None:
    await site.upload(SOME, "before")
    upload_id, stalling = await create(site), Stalling(b"x" * 300, b"x" * 700)
    receiving = asyncio.create_task(
        site.receiver().receive(site.viewer, upload_id, 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    done = await complete_upload(
        *(site.database, site.storage, site.viewer),
        upload_id=upload_id,
        sha256=digest_of(SOME),
    )
    assert (done["state"], done["protocol"]) == ("COMPLETED", "INSTANT")
    stalling.goes_on.set()
    with pytest.raises(Conflict, match="a file already"):
        await receiving
    assert await site.row(upload_id) == done
    assert len(site.kept()) == 1
    assert await site.contents(digest_of(SOME)) == SOME


async def test_of_those_who_resume_one_goes_on(site: Site) -> None:
    upload_id = await create(site)
    await send(site, upload_id, 0, SOME[:300])
    await pause_upload(site.database, site.storage, site.viewer, upload_id=upload_id)
    with pytest.raises(Conflict, match="goes on at 300"):
        await send(site, upload_id, 0, SOME)
    answers = await asyncio.gather(
        *(send(site, upload_id, 300, SOME[300:600]) for _ in range(5)), return_exceptions=True
    )
    assert sorted(type(each).__name__ for each in answers)[-1] == "dict"
    assert len([each for each in answers if isinstance(each, Conflict | Locked)]) == 4
    row = await site.row(upload_id)
    assert (row["received_bytes"], row["state"]) == (600, "UPLOADING")
    assert await site.states(row) == ["CREATED", "UPLOADING", "PAUSED", "UPLOADING"]


async def test_who_cannot_let_go_is_outlived_by_its_lease(
    site: Site, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_: Holding) -> None:
        raise AutoReconnect("gone")

    upload_id = await create(site)
    with monkeypatch.context() as patch:
        patch.setattr(Holding, "let_go", broken)
        with pytest.raises(PayloadTooLarge):
            await send(site, upload_id, 0, SOME + b"x", receiver=site.receiver())
    assert "upload.held" in caplog.text
    with pytest.raises(Locked):
        await send(site, upload_id, 0, SOME)
    await let_lease_run_out(site, upload_id)
    assert (await send(site, upload_id, 0, SOME))["state"] == "COMPLETED"
    assert site.kept() == [f"{upload_id}/2"]


# What fails -------------------------------------------------------------------------------------


async def test_a_full_disk_keeps_what_is_durable(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    contents = os.urandom(3 * MEBIBYTE)
    upload_id, receiver = await create(site, len(contents)), site.receiver()
    await send(site, upload_id, 0, contents[:MEBIBYTE], receiver=receiver)
    write = os.pwrite

    def full(descriptor: int, data: memoryview, at: int) -> int:
        room = 2 * MEBIBYTE - at
        if room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:room], at)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(InsufficientStorage):
            await send(site, upload_id, MEBIBYTE, contents[MEBIBYTE:], receiver=receiver)
    row = await site.row(upload_id)
    assert (row["received_bytes"], row["holder"], row["state"]) == (MEBIBYTE, None, "UPLOADING")
    row = await send(site, upload_id, MEBIBYTE, contents[MEBIBYTE:], receiver=receiver)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(contents))
    assert await site.contents(digest_of(contents)) == contents


async def test_a_disk_that_takes_nothing_keeps_nothing(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload_id = await create(site)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(InsufficientStorage):
            await send(site, upload_id, 0, SOME)
    assert site.kept() == []
    assert (await send(site, upload_id, 0, SOME))["state"] == "COMPLETED"


async def test_bytes_that_the_store_lost_end_the_upload(site: Site) -> None:
    upload_id = await create(site)
    await send(site, upload_id, 0, SOME[:300])
    (site.settings.data_path / "blobs" / "incoming" / str(upload_id) / "1").unlink()
    with pytest.raises(Gone, match="lost"):
        await send(site, upload_id, 300, SOME[300:])
    row = await site.row(upload_id)
    assert (row["state"], row["error"]["code"]) == ("FAILED", "NOT_STORED")
    assert await site.quota() == (0, 0)


@pytest.mark.parametrize("failure", [Conflict("not now"), AutoReconnect("gone")])
async def test_a_completion_that_fails_is_left_to_a_job(
    site: Site, monkeypatch: pytest.MonkeyPatch, failure: Exception
) -> None:
    """A client that asks is told that all bytes are here, and sends none again."""
    upload_id, receiver = await create(site), site.receiver()

    async def fail(*_: object) -> Row:
        raise failure

    monkeypatch.setattr(receiver._completions, "complete", fail)
    row = await send(site, upload_id, 0, SOME, receiver=receiver)
    assert (row["state"], row["received_bytes"], row["holder"]) == ("RECEIVED", 1000, None)
    job = await site.one("jobs", _id=row["job_id"])
    assert (job["kind"], job["input"]["upload_id"]) == ("VERIFY_FILE", upload_id)
    assert job["max_attempts"] == VERIFY_ATTEMPTS
    row = await verified(site, upload_id)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
    assert await site.contents(digest_of(SOME)) == SOME
    assert await site.quota() == (0, 0)


async def test_what_cannot_be_counted_is_sent_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither completed nor left to a job: it goes on where it was."""
    upload_id, receiver = await create(site), site.receiver()
    await send(site, upload_id, 0, SOME[:300], receiver=receiver)

    async def fail(*_: object) -> Row:
        raise AutoReconnect("gone")

    with monkeypatch.context() as patch:
        patch.setattr(receiver._completions, "complete", fail)
        patch.setattr(receiver, "_receive_in", fail)
        with pytest.raises(AutoReconnect):
            await send(site, upload_id, 300, SOME[300:], receiver=receiver)
    row = await site.row(upload_id)
    assert (row["state"], row["received_bytes"], row["holder"]) == ("UPLOADING", 300, None)
    row = await send(site, upload_id, 300, SOME[300:], receiver=receiver)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
    assert await site.contents(digest_of(SOME)) == SOME


async def test_a_version_that_was_published_meanwhile_takes_no_file(site: Site) -> None:
    upload_id = await create(site)
    await site.database.data["versions"].update_one({}, {"$set": {"status": "READY"}})
    with pytest.raises(Conflict, match="is READY"):
        await send(site, upload_id, 0, SOME)
    row = await site.row(upload_id)
    assert (row["state"], row["error"]["code"]) == ("FAILED", "INVALID_TRANSITION")
    assert (site.kept(), await site.quota()) == ([], (0, 0))
    assert await site.counters() == (0, 0, 0, 0)


async def test_few_hashes_are_kept(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiving, "HASHES", 1)
    receiver = site.receiver()
    first, second = await create(site, path="a"), await create(site, path="b")
    for upload_id in (first, second):
        await send(site, upload_id, 0, SOME[:300], receiver=receiver)
    rows = [
        await send(site, upload_id, 300, SOME[300:], receiver=receiver)
        for upload_id in (first, second)
    ]
    assert [row["state"] for row in rows] == ["RECEIVED", "COMPLETED"]


async def test_whatever_happens_the_bytes_are_right_and_nothing_is_left(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients break off and compete, tasks are cancelled, leases run out, at random moments."""
    monkeypatch.setattr(intake, "FLUSH_BYTES", 100_000)
    monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.02)
    chance = random.Random(7)
    receivers = [site.receiver() for _ in range(2)]

    async def sending(contents: bytes) -> AsyncIterator[bytes]:
        at = 0
        while at < len(contents):
            piece = contents[at : at + chance.randint(1, 30_000)]
            yield piece
            at += len(piece)
            if chance.random() < 0.2:
                await asyncio.sleep(chance.random() * 0.02)
            if chance.random() < 0.05:
                raise GoneAway

    async def attempt(upload_id: ObjectId, contents: bytes) -> None:
        tasks = []
        for _ in range(chance.choice([1, 1, 3])):
            at = (await site.row(upload_id))["received_bytes"]
            receiver = chance.choice(receivers)
            tasks.append(
                asyncio.create_task(
                    receiver.receive(site.viewer, upload_id, at, sending(contents[at:]))
                )
            )
            await asyncio.sleep(chance.random() * 0.1)
            if chance.random() < 0.3:
                await let_lease_run_out(site, upload_id)
        if chance.random() < 0.5:
            chance.choice(tasks).cancel()
        for answer in await asyncio.gather(*tasks, return_exceptions=True):
            expected = (dict, GoneAway, Conflict, Locked, asyncio.CancelledError)
            assert isinstance(answer, expected), answer

    async def upload(number: int) -> None:
        contents = chance.randbytes(1_000_000)
        upload_id = await create(site, len(contents), f"{number}")
        while (row := await site.row(upload_id))["is_open"]:
            if row["state"] == "RECEIVED":
                await verified(site, upload_id)
            else:
                await attempt(upload_id, contents)
        assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(contents))
        assert await site.contents(row["sha256"]) == contents

    await asyncio.gather(*(upload(number) for number in range(8)))
    blobs = await site.database.find("blobs", {})
    assert sorted(blob["key"] for blob in blobs) == [f"incoming/{key}" for key in site.kept()]
    assert await site.counters() == (8, 8_000_000) * 2
    assert await site.quota() == (0, 0)


# Stores that have no files ----------------------------------------------------------------------


async def test_bytes_come_into_a_store_of_objects(site: Site) -> None:
    settings = site.settings.model_copy(update={"storage_url": "memory:///"})
    async with open_storage(settings) as storage:
        elsewhere = replace(site, storage=storage, settings=settings)
        contents = os.urandom(5 * MEBIBYTE)
        receiver, upload_id = elsewhere.receiver(), await create(elsewhere, len(contents))
        row = await send(elsewhere, upload_id, 0, contents[:1000], receiver=receiver)
        assert (row["state"], row["received_bytes"]) == ("UPLOADING", 1000)
        row = await send(elsewhere, upload_id, 1000, contents[1000:], receiver=receiver)
        assert row["state"] == "RECEIVED"  # a job makes one object of it
        row = await verified(elsewhere, upload_id)
        assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(contents))
        assert await elsewhere.contents(row["sha256"]) == contents
        left = [each.key async for each in storage.incoming.listed()]
        assert left == [f"incoming/{upload_id}/whole"]


# Parts ------------------------------------------------------------------------------------------


async def test_what_a_store_puts_late_comes_among_no_other_bytes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It did not answer, and nobody waited for it any more."""
    put, late = ChunkIncoming.put, list[tuple[str, bytes]]()

    async def silent(_: ChunkIncoming, key: str, contents: bytes | memoryview) -> None:
        late.append((key, bytes(contents)))
        raise Unavailable("It does not answer.")

    settings = site.settings.model_copy(update={"storage_url": "memory:///"})
    async with open_storage(settings) as storage:
        site.storage = storage
        upload_id, receiver = await create(site), site.receiver()
        await send(site, upload_id, 0, SOME[:300], receiver=receiver)
        with monkeypatch.context() as patch:
            patch.setattr(ChunkIncoming, "put", silent)
            with pytest.raises(Unavailable):
                await send(site, upload_id, 300, SOME[300:600], receiver=receiver)
        await send(site, upload_id, 300, SOME[300:], receiver=receiver)
        [(key, contents)] = late
        assert isinstance(storage.incoming, ChunkIncoming)
        await put(storage.incoming, key, contents)
        row = await verified(site, upload_id)
        assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
        await put(storage.incoming, key, contents)
        assert await site.contents(digest_of(SOME)) == SOME


async def test_parts_are_joined_in_the_order_that_is_named(site: Site) -> None:
    upload_id, receiver = await create(site, sha256=digest_of(SOME)), site.receiver()
    sizes = [(0, 300), (300, 700), (700, 1000)]
    parts = [await receiver.add_part(site.viewer, upload_id, end - start) for start, end in sizes]
    assert await site.quota() == (1000, 1)
    with pytest.raises(Conflict, match="in parts"):
        await send(site, upload_id, 0, SOME)
    ids = [part["_id"] for part in parts]
    with pytest.raises(Conflict, match="not all its bytes"):
        await receiver.join_parts(site.viewer, upload_id, ids)
    done = await asyncio.gather(
        *(
            send(site, part["_id"], 0, SOME[start:end], receiver=receiver)
            for part, (start, end) in zip(parts, sizes, strict=True)
        )
    )
    assert [row["state"] for row in done] == ["RECEIVED"] * 3
    row = await site.row(upload_id)
    assert (row["received_bytes"], row["state"]) == (1000, "UPLOADING")
    assert await site.states(row) == ["CREATED", "UPLOADING"]
    assert (await receiver.status(site.viewer, ids[0]))["received_bytes"] == 300
    for wrong, says in (
        ([], "each part once"),
        ([ids[0], ids[0]], "each part once"),
        (ids[:2], "700 bytes"),
        ([*ids, ObjectId()], "no part"),
    ):
        with pytest.raises(BadRequest, match=says):
            await receiver.join_parts(site.viewer, upload_id, wrong)
    joined = await asyncio.gather(
        *(receiver.join_parts(site.viewer, upload_id, ids) for _ in range(3))
    )
    assert [row["state"] for row in joined] == ["RECEIVED"] * 3
    assert await site.database.count("jobs", {}) == 1
    row = await verified(site, upload_id)
    assert (row["state"], row["sha256"]) == ("COMPLETED", digest_of(SOME))
    assert await site.contents(digest_of(SOME)) == SOME
    assert site.kept() == [f"{upload_id}/whole"]
    assert await site.quota() == (0, 0)
    ended = await site.database.find("uploads", {"part_of": upload_id})
    assert [(part["state"], part["is_open"]) for part in ended] == [("COMPLETED", False)] * 3
    assert await site.states(row) == ["CREATED", "UPLOADING", "RECEIVED", "COMPLETED"]
    assert await site.database.count("events", {"upload_id": {"$in": ids}}) == 0


async def test_parts_have_their_limits(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver()
    with pytest.raises(PayloadTooLarge):
        await receiver.add_part(site.viewer, upload_id, 1001)
    parts = [await receiver.add_part(site.viewer, upload_id, 900) for _ in range(2)]
    with pytest.raises(PayloadTooLarge, match="more than twice"):
        await receiver.add_part(site.viewer, upload_id, 201)
    with pytest.raises(NotFound):
        await receiver.add_part(site.viewer, parts[0]["_id"], 1)
    with pytest.raises(NotFound):
        await receiver.add_part(site.company.stranger, upload_id, 1)
    await send(site, parts[0]["_id"], 0, SOME[:300])
    assert (await site.row(upload_id))["received_bytes"] == 300
    await receiver.terminate(site.viewer, parts[0]["_id"])
    assert ((await site.row(upload_id))["received_bytes"], site.kept()) == (0, [])
    with pytest.raises(Gone):
        await receiver.status(site.viewer, parts[0]["_id"])
    await receiver.add_part(site.viewer, upload_id, 201)
    other = await create(site, path="other")
    await send(site, other, 0, SOME[:10])
    with pytest.raises(Conflict, match="have come already"):
        await receiver.add_part(site.viewer, other, 10)


async def test_parts_end_with_their_upload(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver()
    part = await receiver.add_part(site.viewer, upload_id, 500)
    await send(site, part["_id"], 0, SOME[:300])
    await pause_upload(site.database, site.storage, site.viewer, upload_id=upload_id)
    await send(site, part["_id"], 300, SOME[300:400])
    assert (await site.row(upload_id))["state"] == "UPLOADING"
    await receiver.terminate(site.viewer, upload_id)
    assert (site.kept(), await site.quota()) == ([], (0, 0))
    assert (await site.row(part))["state"] == "ABORTED"
    with pytest.raises(Gone):
        await send(site, part["_id"], 400, SOME[400:500])


async def test_a_pause_ends_who_sends_a_part(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "FLUSH_SECONDS", 0.02)
    upload_id, receiver = await create(site), site.receiver()
    part, stalling = await receiver.add_part(site.viewer, upload_id, 500), Stalling(SOME[:300])
    receiving_part = asyncio.create_task(
        receiver.receive(site.viewer, part["_id"], 0, aiter(stalling))
    )
    while (await site.row(upload_id))["received_bytes"] < 300:
        await asyncio.sleep(0.01)
    await pause_upload(site.database, site.storage, site.viewer, upload_id=upload_id)
    stalling.goes_on.set()
    await receiving_part  # nothing more came, so nothing was refused
    with pytest.raises(PayloadTooLarge):
        await receiver.receive(site.viewer, part["_id"], 300, body(SOME[:300]), length=300)
    row = await receiver.receive(site.viewer, part["_id"], 300, body(SOME[300:500]))
    assert (row["state"], (await site.row(upload_id))["state"]) == ("RECEIVED", "UPLOADING")
    await receiver.terminate(site.viewer, upload_id)
    with pytest.raises(Gone):
        await receiver.terminate(site.viewer, part["_id"])


async def test_a_part_that_is_sent_while_its_upload_is_aborted(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver(upload_lease_seconds=0.2)
    part, stalling = await receiver.add_part(site.viewer, upload_id, 500), Stalling(SOME[:300])
    receiving_part = asyncio.create_task(
        receiver.receive(site.viewer, part["_id"], 0, aiter(stalling))
    )
    await stalling.is_asked.wait()
    await receiver.terminate(site.viewer, upload_id)
    with pytest.raises(Gone):
        await receiving_part
    assert site.kept() == []


async def test_a_part_may_be_all_of_it(site: Site) -> None:
    upload_id, receiver = await create(site), site.receiver()
    part = await receiver.add_part(site.viewer, upload_id, 1000)
    await send(site, part["_id"], 0, SOME, receiver=receiver)
    await receiver.join_parts(site.viewer, upload_id, [part["_id"]])
    assert (await verified(site, upload_id))["sha256"] == digest_of(SOME)
    assert site.kept() == [f"{part['_id']}/1"]


async def test_holders_write_only_as_long_as_it_is_theirs(site: Site) -> None:
    upload_id = await create(site)
    row = await site.row(upload_id)
    holding = Holding(
        site.database, site.settings, {**row, "token": 7}, key="incoming/x/7", at=0, before=[]
    )
    for act in (holding.renew(), holding.advance(10)):
        with pytest.raises(Conflict):
            await act
    await holding.let_go()
    assert await site.row(upload_id) == row
