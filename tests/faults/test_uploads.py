"""Uploads lose nothing and take nothing wrong, whatever happens to servers, clients, workers, disks."""

import asyncio
import random
import resource
import signal
import statistics
import subprocess
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.client.tus import PIECE_BYTES
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import migrate
from modelharbor.dev.engines import Engines
from modelharbor.settings import Settings

from .engines import one_member
from .figures import is_long, record
from .harbor import (
    GUARD_SECONDS,
    MIB,
    POLL_SECONDS,
    Berth,
    Harbor,
    Server,
    moored,
    on_the_way,
    opened,
)

pytestmark = pytest.mark.anyio
SIZE = (256 if is_long() else 24) * MIB
MOST_LOST = 8 * MIB  # bytes that a server has and has not counted yet, when it is killed
KILLS, EACH = (100, 10) if is_long() else (6, 6)  # in all, and most of one upload


@pytest.fixture(scope="module")
def harbor(
    engines: Engines, migrated_database: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Harbor]:
    """Its servers stay for all tests, unless they are killed."""
    folder = tmp_path_factory.mktemp("harbor")
    settings = Settings(
        mongo_url=engines.mongo_url,
        mongo_database=migrated_database,
        redis_url=engines.redis_url,
        data_path=folder / "data",
        environment="test",
        upload_lease_seconds=5.0 if is_long() else 1.0,
        lease_seconds=1.0,
        drain_seconds=0.5,
    )
    with opened(settings, folder) as harbor:
        yield harbor


@pytest.fixture
async def berth(harbor: Harbor, database: Database, tmp_path: Path) -> AsyncIterator[Berth]:
    async with moored(harbor, database, tmp_path) as berth:
        yield berth


def changed(settings: Settings, **values: Any) -> Settings:
    return Settings(**settings.model_dump(exclude_unset=True) | values)


def made(path: Path, size: int, chance: random.Random) -> str:
    """A file of any bytes; its SHA-256."""
    with path.open("wb") as file:
        for _ in range(0, size, MIB):
            file.write(chance.randbytes(MIB))
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


async def test_servers_and_clients_are_killed_while_bytes_come(berth: Berth) -> None:
    chance, harbor = random.Random(5), berth.harbor
    harbor.work()
    again: dict[str, list[int]] = {"server": [], "client": []}  # bytes, at each kill
    lost: list[int] = []  # those of them that had come to the server's process
    wrong = uploads = 0
    file = berth.folder / "file"
    while sum(map(len, again.values())) < KILLS:
        digest = made(file, SIZE, chance)
        upload_id = await berth.create((await harbor.up(2))[0], SIZE, f"file{uploads}")
        uploads += 1
        for mark in sorted(chance.randrange(SIZE - MIB) for _ in range(EACH)):
            server = await harbor.any(chance)
            sender = berth.sender(server, upload_id, file)
            await sender.until(mark)
            await asyncio.sleep(chance.uniform(0, 0.005))
            if not sender.is_running:
                break
            victim = min(again, key=lambda name: (len(again[name]), chance.random()))
            # Both stand still for a moment, so that what is between them can be told.
            for child in (server, sender):
                child.signal(signal.SIGSTOP)
            position, between = sender.position, on_the_way(server.port)
            assert position is not None, sender.log.read_text()
            if victim == "server":
                server.kill()
                sender.signal(signal.SIGCONT)
                harbor.server()
                await sender.ended()
            else:
                sender.kill()
                server.signal(signal.SIGCONT)
                await berth.until("uploads", upload_id, holder=None)
            offset = await berth.head(await harbor.any(chance), upload_id)
            again[victim].append(position - offset)
            if victim == "server":
                lost.append(position - between - offset)
        async with asyncio.timeout(GUARD_SECONDS):
            while await berth.sender(await harbor.any(chance), upload_id, file).ended():
                await asyncio.sleep(0.02)
        await berth.until("uploads", upload_id, is_open=False)
        wrong += await berth.stored(upload_id) != digest
    await berth.swept()
    orphans, reserved = await berth.orphans(), await berth.reserved()
    files = await berth.database.count("files", {})
    most = {name: max(counts) for name, counts in again.items()}
    record(
        f"kill -9 of servers and clients while {SIZE // MIB} MiB come",
        {
            "most_bytes_lost": f"<= {MOST_LOST}",
            "most_bytes_again_server": f"<= {PIECE_BYTES}",
            "most_bytes_again_client": f"<= {PIECE_BYTES}",
            "wrong_hashes": 0,
            "orphans": 0,
        },
        uploads=uploads,
        files=files,
        kills_of_servers=len(again["server"]),
        kills_of_clients=len(again["client"]),
        most_bytes_lost=max(lost),
        median_bytes_lost=statistics.median(lost),
        most_bytes_again_server=most["server"],
        most_bytes_again_client=most["client"],
        median_bytes_again_server=statistics.median(again["server"]),
        median_bytes_again_client=statistics.median(again["client"]),
        wrong_hashes=wrong,
        orphans=len(orphans),
    )
    assert (wrong, orphans, reserved, files) == (0, set(), (0, 0), uploads)
    assert max(lost) <= MOST_LOST
    assert max(most.values()) <= PIECE_BYTES


async def test_a_server_that_stood_still_writes_nothing_late(berth: Berth) -> None:
    """SIGSTOP past its lease, another server goes on, SIGCONT: what it still has goes nowhere."""
    chance, file, size = random.Random(6), berth.folder / "file", 32 * MIB
    harbor = berth.harbor
    harbor.work()
    wrong = late = 0
    times = 5 if is_long() else 1
    for number in range(times):
        digest = made(file, size, chance)
        still, other = (await harbor.up(2))[:2]
        upload_id = await berth.create(still, size, f"file{number}")
        first = berth.sender(still, upload_id, file)
        while (await berth.row(upload_id))["received_bytes"] == 0:
            await asyncio.sleep(POLL_SECONDS)
        still.signal(signal.SIGSTOP)
        late += first.is_running
        second = berth.sender(other, upload_id, file)
        await second.until(size - 4 * MIB)
        second.kill()
        await berth.until("uploads", upload_id, holder=None)
        still.signal(signal.SIGCONT)
        await first.ended()
        assert await berth.sender(other, upload_id, file).ended() == 0
        await berth.until("uploads", upload_id, is_open=False)
        wrong += await berth.stored(upload_id) != digest
    await berth.swept()
    orphans = await berth.orphans()
    record(
        "SIGSTOP a server past the lease of its upload, another goes on, SIGCONT",
        {"wrong_hashes": 0, "orphans": 0},
        times=late,
        wrong_hashes=wrong,
        orphans=len(orphans),
    )
    assert (wrong, orphans) == (0, set())


async def test_workers_are_killed_while_they_verify(berth: Berth) -> None:
    """The next one finishes it; and told once more, all say the same."""
    chance, harbor = random.Random(7), berth.harbor
    times, size = (10, 64 * MIB) if is_long() else (1, SIZE)
    server = (await harbor.up(1))[0]
    kills = wrong = 0
    for number in range(times):
        digest = made(path := berth.folder / "file", size, chance)
        upload_id = await berth.create(server, size, f"file{number}", digest)
        final = await in_two_parts(berth, server, upload_id, path.read_bytes())
        job_id = (await berth.row(upload_id))["job_id"]
        harbor.rest()
        for _ in range(2):  # a job that has killed three workers is given up
            worker = harbor.worker()
            await berth.until("uploads", upload_id, state={"VERIFYING", "COMPLETED"})
            await berth.until("jobs", job_id, state={"RUNNING", "SUCCEEDED"})
            await asyncio.sleep(chance.uniform(0, 0.1))
            worker.kill()
            kills += (await berth.row(upload_id))["state"] == "VERIFYING"
        harbor.work()
        await berth.until("uploads", upload_id, is_open=False)
        wrong += await berth.stored(upload_id) != digest
        await tell_again(berth, server, upload_id, final)
        await berth.until("jobs", job_id, state="SUCCEEDED")
    await berth.swept()
    files, jobs = await berth.counts("files", "jobs", kind="VERIFY_FILE")
    references = sum(row["references"] for row in await berth.database.find("blobs", {}))
    orphans = await berth.orphans()
    record(
        f"kill -9 workers that verify {times} x {size // MIB} MiB in parts; each told 40 times more",
        {"wrong_hashes": 0, "files": times, "references": times, "jobs": times, "orphans": 0},
        kills_while_verifying=kills,
        wrong_hashes=wrong,
        files=files,
        references=references,
        jobs=jobs,
        orphans=len(orphans),
    )
    assert (wrong, files, references, jobs, orphans) == (0, times, times, times, set())
    assert await berth.reserved() == (0, 0)


async def in_two_parts(berth: Berth, server: Server, upload_id: ObjectId, contents: bytes) -> str:
    """Sent, and put together by ten at once; what they said."""
    half, addresses = len(contents) // 2, []
    for part in (contents[:half], contents[half:]):
        length = str(len(part))
        answer = await berth.post(
            server, upload_id, part, upload_concat="partial", upload_length=length
        )
        assert answer.status_code == 201
        addresses.append(answer.headers["location"])
    final = f"final;{' '.join(addresses)}"
    answers = await asyncio.gather(
        *(berth.post(server, upload_id, upload_concat=final) for _ in range(10))
    )
    assert {answer.status_code for answer in answers} == {201}
    return final


async def tell_again(berth: Berth, server: Server, upload_id: ObjectId, final: str) -> None:
    """That it is complete, in every way: nothing comes of it."""
    done = await berth.row(upload_id)
    payloads, answers = await asyncio.gather(
        asyncio.gather(*(berth.complete(server, upload_id, done["sha256"]) for _ in range(10))),
        asyncio.gather(
            *(berth.post(server, upload_id, upload_concat=final) for _ in range(10)),
            *(berth.patch(server, upload_id, done["size_bytes"], b"") for _ in range(10)),
        ),
    )
    assert all(payload["userErrors"] == [] for payload in payloads)
    assert {answer.status_code for answer in answers} <= {201, 204, 403}
    assert await berth.row(upload_id) == done


# Who sends anything -----------------------------------------------------------------------------


async def test_of_fifty_at_once_at_two_servers_one_is_heard(berth: Berth) -> None:
    """Each sends bytes of its own: what is kept at an offset is of one of them, whole."""
    pieces, length = (40 if is_long() else 4), 256 * 1024
    servers = await berth.harbor.up(2)
    upload_id = await berth.create(servers[0], pieces * length)
    kept, twice, statuses = b"", 0, set[int]()
    for place in range(pieces):
        bodies = [bytes([place, number]) * (length // 2) for number in range(50)]
        answers = await asyncio.gather(
            *(
                berth.patch(servers[number % len(servers)], upload_id, place * length, body)
                for number, body in enumerate(bodies)
            )
        )
        won = [number for number, answer in enumerate(answers) if answer.status_code == 204]
        statuses |= {answer.status_code for answer in answers}
        twice += len(won) - 1
        kept += bodies[won[0]]
        assert await berth.head(servers[-1], upload_id) == len(kept)
    berth.harbor.work()
    row = await berth.until("uploads", upload_id, is_open=False)
    wrong = int(await berth.stored(upload_id) != sha256(kept).hexdigest())
    record(
        f"50 parallel PATCHes on one upload at two servers, {pieces} times",
        {"heard_twice": 0, "wrong_hashes": 0},
        heard_twice=twice,
        wrong_hashes=wrong,
        statuses=sorted(statuses),
    )
    assert (twice, wrong) == (0, 0)
    assert statuses <= {204, 409, 423}
    assert row["state"] == "COMPLETED"


async def test_wrong_short_long_repeated_and_reordered_bytes_count_for_nothing(
    berth: Berth,
) -> None:
    chance, size = random.Random(8), 2 * MIB
    servers = await berth.harbor.up(2)
    rounds = 20 if is_long() else 2
    sent = accepted = wrong = 0
    berth.harbor.work()
    for number in range(rounds):
        contents = chance.randbytes(size)
        upload_id = await berth.create(servers[0], size, f"file{number}")
        at = 0
        while at < size:
            server = chance.choice(servers)
            end = min(size, at + chance.randrange(1, size // 8))
            right = contents[at:end]
            other = chance.choice([0, at + 1, max(0, at - 7), size])
            for offset, body, headers in (
                (at, chance.randbytes(len(right)), {"upload_checksum": checksum(right)}),
                (at, right[:-1], {"upload_checksum": checksum(right)}),
                (at, contents[at:] + b"x", {}),  # too long, said so
                (at, chunks(contents[at:], b"x" * MIB), {"upload_checksum": checksum(right)}),
                (other if other != at else at + 2, right, {}),  # at another place
            ):
                answer = await berth.patch(server, upload_id, offset, body, **headers)
                sent += 1
                accepted += answer.status_code == 204
            assert await berth.head(server, upload_id) == at
            headers = {"upload_checksum": checksum(right)} if chance.random() < 0.5 else {}
            if chance.random() < 0.3:  # a connection that breaks: what came is kept
                token = (await berth.row(upload_id))["token"] + 1
                with pytest.raises(Broken):
                    await berth.patch(server, upload_id, at, breaking(right))
                await berth.until("uploads", upload_id, token=token, holder=None)
                at = await berth.head(server, upload_id)
                continue
            answer = await berth.patch(server, upload_id, at, right, **headers)
            assert answer.status_code == 204, answer.text
            at = end
        await berth.until("uploads", upload_id, is_open=False)
        wrong += await berth.stored(upload_id) != sha256(contents).hexdigest()
    # Whole, but not what was said, at one server and in parts in another order.
    for path, parts in (("whole", [b"ab"]), ("parts", [b"b", b"a"])):
        upload_id = await berth.create(servers[0], 2, path, sha256(b"ba").hexdigest()[::-1])
        sent += 1
        if path == "whole":
            answer = await berth.patch(servers[1], upload_id, 0, parts[0])
            assert answer.status_code == 460
        else:
            made_parts = [
                await berth.post(
                    servers[0], upload_id, part, upload_concat="partial", upload_length="1"
                )
                for part in parts
            ]
            final = f"final;{' '.join(each.headers['location'] for each in reversed(made_parts))}"
            await berth.post(servers[1], upload_id, upload_concat=final)
        row = await berth.until("uploads", upload_id, is_open=False)
        assert (row["state"], row["error"]["code"]) == ("FAILED", "CHECKSUM_MISMATCH")
    await berth.swept()
    orphans = await berth.orphans()
    record(
        "wrong, short, long, repeated and reordered bytes",
        {"accepted": 0, "wrong_hashes": 0, "orphans": 0},
        sent=sent,
        accepted=accepted,
        wrong_hashes=wrong,
        orphans=len(orphans),
    )
    assert (accepted, wrong, orphans) == (0, 0, set())
    assert await berth.database.count("files", {}) == rounds
    assert await berth.reserved() == (0, 0)


def checksum(contents: bytes) -> str:
    return f"sha256 {b64encode(sha256(contents).digest()).decode()}"


class Broken(Exception):
    pass


async def chunks(*pieces: bytes) -> AsyncIterator[bytes]:
    """Of a body whose length nobody says before."""
    for piece in pieces:
        yield piece


async def breaking(contents: bytes) -> AsyncIterator[bytes]:
    yield contents[: len(contents) // 2]
    raise Broken


async def test_as_many_uploads_get_in_as_fit(berth: Berth) -> None:
    servers = await berth.harbor.up(2)
    fitting, many, size = 17, 50, 1000
    await berth.database.data["quotas"].insert_one(
        {
            "_id": berth.owner_id,
            "limit_bytes": fitting * size + size // 2,
            "reserved_bytes": 0,
            "open_uploads": 0,
            "changes": 0,
        }
    )
    payloads = await asyncio.gather(
        *(
            berth.create_uploads(
                servers[number % 2],
                {"path": f"file{number}", "sizeBytes": str(size)},
                key=str(number),
            )
            for number in range(many)
        )
    )
    created = sum(bool(payload["uploads"]) for payload in payloads)
    codes = [error["code"] for payload in payloads for error in payload["userErrors"]]
    record(
        f"{many} createUploads at once at two servers, {fitting} fit",
        {"created": fitting, "reserved_bytes": fitting * size},
        created=created,
        refused=len(codes),
        reserved_bytes=(await berth.reserved())[0],
    )
    assert (created, codes) == (fitting, ["QUOTA_EXCEEDED"] * (many - fitting))
    assert await berth.reserved() == (fitting * size, fitting)
    assert await berth.database.count("uploads", {}) == fitting


# Disks and databases ----------------------------------------------------------------------------


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[], None]]:
    """A store of 24 MiB, most of which is taken, for the servers of the block; called, there is room."""
    folder.mkdir()
    options = ("-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder))
    done = subprocess.run(["mount", *options], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(10 * MIB))
        yield ballast.unlink
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


async def test_the_disk_is_full_in_the_middle(berth: Berth) -> None:
    chance, size = random.Random(9), 20 * MIB
    berth.harbor.rest()  # it has another store
    digest = made(file := berth.folder / "file", size, chance)
    folder = berth.folder / "disk"
    with small_disk(folder) as make_room:
        settings = changed(berth.harbor.settings, storage_url=f"file://{folder}/store")
        with opened(settings, berth.folder) as harbor:
            berth.harbor = harbor
            server = (await harbor.up(1))[0]
            upload_id = await berth.create(server, size)
            contents = file.read_bytes()
            answer = await berth.patch(server, upload_id, 0, contents)
            codes = [error["extensions"]["code"] for error in answer.json()["errors"]]
            is_alive = (await berth.client.get(f"{server.url}/healthz")).status_code == 200
            at = await berth.head(server, upload_id)
            files, blobs = await berth.counts("files", "blobs")
            again = await berth.patch(server, upload_id, at, contents[at:])
            make_room()
            row = await berth.row(upload_id)
            assert (row["state"], row["holder"]) == ("UPLOADING", None)
            assert await berth.sender(server, upload_id, file).ended() == 0
            harbor.work()
            await berth.until("uploads", upload_id, is_open=False)
            right = await berth.stored(upload_id) == digest
            await berth.swept()
            orphans = await berth.orphans()
    record(
        f"the disk is full in the middle of {size // MIB} MiB (tmpfs)",
        {"status": 507, "server_alive": True, "visible_partial_blobs": 0, "gone_on_with": True},
        status=answer.status_code,
        code=codes,
        kept_bytes=at,
        server_alive=is_alive,
        visible_partial_blobs=files + blobs,
        gone_on_with=right,
        orphans=len(orphans),
    )
    assert (answer.status_code, again.status_code) == (507, 507)
    assert codes == ["INSUFFICIENT_STORAGE"]
    assert (is_alive, files, blobs, right, orphans) == (True, 0, 0, True, set())
    assert 0 < at < 14 * MIB


async def test_a_file_may_not_grow_for_a_while(berth: Berth) -> None:
    """What a limit of the process refuses, as a quota of the file system does."""
    chance, size = random.Random(10), 16 * MIB
    digest = made(file := berth.folder / "file", size, chance)
    server = (await berth.harbor.up(1))[0]
    upload_id = await berth.create(server, size)
    limits = resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (9 * MIB, limits[1]))
    assert await berth.sender(server, upload_id, file).ended() == 507 % 256
    assert await berth.counts("files", "blobs") == [0, 0]
    at = await berth.head(server, upload_id)
    assert at <= 9 * MIB
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, limits)
    assert await berth.sender(server, upload_id, file).ended() == 0
    berth.harbor.work()
    await berth.until("uploads", upload_id, is_open=False)
    assert await berth.stored(upload_id) == digest


async def test_the_database_is_killed_in_the_middle(harbor: Harbor, tmp_path: Path) -> None:
    """A set of one, which comes back with what it had."""
    chance, times = random.Random(11), 10 if is_long() else 1
    digest = made(file := tmp_path / "file", SIZE, chance)
    async with one_member(tmp_path) as member:
        settings = changed(
            harbor.settings,
            mongo_url=member.url,
            mongo_database="faults",
            mongo_timeout_seconds=3.0 if is_long() else 1.0,
        )
        async with connect(settings) as database:
            await migrate(database)
            with opened(settings, tmp_path) as harbor:
                async with moored(harbor, database, tmp_path) as berth:
                    server = (await harbor.up(1))[0]
                    harbor.work()
                    upload_id = await berth.create(server, SIZE)
                    back = 0
                    for number in range(times):
                        sender = berth.sender(server, upload_id, file)
                        await sender.until((number + 1) * SIZE // (times + 1))
                        at = (await berth.row(upload_id))["received_bytes"]
                        member.kill()
                        await sender.ended()
                        await member.start()
                        row = await berth.row(upload_id)
                        back += row["received_bytes"] < at
                    async with asyncio.timeout(GUARD_SECONDS):
                        while await berth.sender(server, upload_id, file).ended():
                            await asyncio.sleep(0.1)
                    await berth.until("uploads", upload_id, is_open=False)
                    wrong = int(await berth.stored(upload_id) != digest)
                    await berth.swept()
                    orphans = await berth.orphans()
    record(
        f"kill -9 mongod while {SIZE // MIB} MiB come, {times} times",
        {"offsets_gone_back": 0, "wrong_hashes": 0, "orphans": 0},
        offsets_gone_back=back,
        wrong_hashes=wrong,
        orphans=len(orphans),
    )
    assert (back, wrong, orphans) == (0, 0, set())
