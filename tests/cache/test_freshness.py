"""No answer that is kept outlives an acknowledged write, whatever becomes of Redis and of the stream.

Two processes with their own connections to the real engines. What a test calls a process is
`Freshness` with what is around it; the API is not needed for it.
"""

import asyncio
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from bson import ObjectId
from pymongo.errors import OperationFailure, PyMongoError
from redis.asyncio import Redis
from redis.exceptions import RedisError

from modelharbor.cache import freshness as module
from modelharbor.cache.following import NOWHERE, Following, pack
from modelharbor.cache.freshness import open_freshness
from modelharbor.cache.tags import changed, entity, gone
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.dev.engines import Child
from modelharbor.settings import Settings
from tests.faults.engines import redis_server
from tests.http.processes import free_port
from tests.http.proxy import Door

from .processes import Process, Register, process, processes, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Redis has long enough on a busy machine, where a test is not about that."""
    return settings.model_copy(update={"response_cache": True, "cache_timeout_seconds": 2.0})


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as a busy machine takes for what comes within milliseconds."""
    monkeypatch.setattr(module, "REACH_SECONDS", 10.0)


@dataclass
class OwnRedis:
    """A redis-server that a test may do anything to."""

    folder: Path
    port: int
    stack: AsyncExitStack
    child: Child | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    async def start(self) -> None:
        self.child = await self.stack.enter_async_context(redis_server(self.folder, self.port))
        async with Redis.from_url(self.url) as redis:

            async def answers() -> bool:
                try:
                    return bool(await redis.ping())
                except (RedisError, OSError):
                    return False

            await until(answers)

    def signal(self, number: int) -> None:
        assert self.child is not None
        self.child.process.send_signal(number)

    def kill(self) -> None:
        assert self.child is not None
        self.signal(signal.SIGKILL)
        self.child.process.wait()

    async def ask(self, *command: Any) -> Any:
        async with Redis.from_url(self.url) as redis:
            return await redis.execute_command(*command)  # type: ignore[no-untyped-call]  # redis-py leaves it untyped


@pytest.fixture
async def own_redis(tmp_path: Path) -> AsyncIterator[OwnRedis]:
    folder = tmp_path / "redis"
    folder.mkdir()
    async with AsyncExitStack() as stack:
        own = OwnRedis(folder, free_port(), stack)
        await own.start()
        yield own
        own.signal(signal.SIGCONT)


@pytest.fixture
def with_own(settings: Settings, own_redis: OwnRedis) -> Settings:
    return settings.model_copy(update={"redis_url": own_redis.url})


@pytest.fixture
async def register(database: Database) -> Register:
    made = Register()
    await made.insert(database)
    return made


def key_of(it: Process) -> str:
    return it.freshness._key


async def test_nothing_is_used_before_all_is_known(settings: Settings, register: Register) -> None:
    async with process(settings) as one:
        assert one.freshness.position == 0
        assert not await one.freshness.ready()
        await one.usable()
        assert one.freshness.position > 0


async def test_an_acknowledged_write_is_known_in_all_processes(
    settings: Settings, register: Register
) -> None:
    """Who writes, and who reads first afterwards, is drawn each time."""
    async with processes(settings, settings) as both:
        chance = random.Random(7)
        for _ in range(300):
            for each in both:
                await each.check(register)
            await chance.choice(both).write(register)
            first, second = chance.sample(both, 2)
            await first.check(register)
            await second.check(register)
        # Each reads twice after each write: the second finds what the first has kept.
        assert min(each.hits for each in both) > 250


async def test_many_at_once_never_see_less_than_what_was_acknowledged(
    settings: Settings, database: Database
) -> None:
    registers = [Register() for _ in range(5)]
    for each in registers:
        await each.insert(database)
    async with processes(settings, settings) as both:

        async def client(number: int) -> None:
            chance = random.Random(number)
            for _ in range(60):
                it, register = chance.choice(both), chance.choice(registers)
                if chance.random() < 0.1:
                    await it.write(register)
                else:
                    await it.check(register)

        await asyncio.gather(*[client(number) for number in range(20)])
        assert sum(each.hits for each in both) > 100


async def test_a_transaction_is_known_when_its_commit_is_acknowledged(
    settings: Settings, database: Database
) -> None:
    some = [Register() for _ in range(3)]
    for each in some:
        await each.insert(database)
    async with processes(settings, settings) as (one, other):
        for _ in range(30):
            for register in some:
                await other.check(register)

            async def work(session: Any) -> None:
                for register in some:
                    register.written += 1
                    await one.database.data["versions"].update_one(
                        {"_id": register.id}, {"$inc": {"number": 1}}, session=session
                    )

            wrote = await one.transact(work)
            assert wrote is not None
            await one.freshness.acknowledge(wrote)
            for register in some:
                register.acknowledged = register.written
                await other.check(register)


async def test_a_write_from_outside_is_known_within_two_seconds(
    settings: Settings, database: Database, register: Register
) -> None:
    async with process(settings) as one:
        await one.usable()
        for number in range(1, 6):
            await one.read(register)
            assert await one.read(register) == number - 1
            assert register.id in one.kept
            await database.data["versions"].update_one(
                {"_id": register.id}, {"$set": {"number": number}}
            )
            start = time.monotonic()
            while await one.read(register) != number:
                assert time.monotonic() - start < 2
            await one.read(register)


async def test_what_others_kept_before_a_process_began_can_be_judged(
    settings: Settings, register: Register
) -> None:
    tags = [entity("versions", register.id)]
    async with process(settings) as one:
        await one.usable()
        before = one.freshness.position
        await one.write(register)
        await until(lambda: one.freshness.position > before)
        after = one.freshness.position
        async with process(settings) as late:
            await late.usable()
            assert not late.freshness.is_current(before, tags)
            assert late.freshness.is_current(after, tags)
            assert not late.freshness.is_current(before - (120 << 32), ["models/other"])


async def test_a_request_that_must_know_of_changes_waits_for_them(
    settings: Settings, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no longer than a moment, where they do not come."""
    async with processes(settings, settings) as (one, other):
        taken, stopped = other.freshness.following._take, asyncio.Event()

        async def held_up(reply: Row, asked_at: float) -> bool:
            await stopped.wait()
            return await taken(reply, asked_at)

        monkeypatch.setattr(other.freshness.following, "_take", held_up)
        await other.read(register)
        await one.write(register)
        waiting = asyncio.create_task(other.freshness.ready())
        await asyncio.sleep(0.01)
        stopped.set()
        assert await waiting
        await other.check(register)
        stopped.clear()
        monkeypatch.setattr(module, "REACH_SECONDS", 0.05)
        await one.write(register)
        assert not await other.freshness.ready()
        assert other.freshness.stats.late == 1
        await other.check(register)
        stopped.set()
        await other.usable()


async def test_what_clients_were_told_is_known_to_what_is_kept(
    settings: Settings, register: Register
) -> None:
    """By a subscription, which follows the same changes on its own."""
    async with process(settings) as one:
        await one.usable()
        before = one.freshness.position
        _, wrote = await one.commit(register)
        assert wrote is not None
        one.freshness.learned(wrote)
        assert await one.freshness.ready()
        assert one.freshness.position >= wrote > before
        one.freshness.learned(wrote + (30 << 32))
        assert not await one.freshness.ready()


async def test_who_has_not_heard_for_a_second_uses_nothing(
    settings: Settings, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Redis has nothing to say of writes from outside."""
    async with process(settings) as one:
        await one.usable()
        taken, stopped = one.freshness.following._take, asyncio.Event()

        async def held_up(reply: Row, asked_at: float) -> bool:
            await stopped.wait()
            return await taken(reply, asked_at)

        monkeypatch.setattr(one.freshness.following, "_take", held_up)
        start = time.monotonic()
        while await one.freshness.ready():
            assert time.monotonic() - start < 2
            await asyncio.sleep(0.01)
        stopped.set()
        await one.usable()


async def test_a_killed_cursor_is_opened_again_where_it_was(
    settings: Settings, database: Database, register: Register
) -> None:
    async with process(settings) as one:
        await one.usable()
        for _ in range(3):
            await one.read(register)
            version = one.freshness.version
            forgotten = one.freshness.stats.forgotten
            cursor = one.freshness.following.cursor
            await database.data.command("killCursors", NOWHERE, cursors=[cursor])
            await database.data["versions"].update_one(
                {"_id": register.id}, {"$inc": {"number": 1}}
            )
            await until(lambda before=cursor: one.freshness.following.cursor not in {0, before})
            await until(lambda before=version: one.freshness.version > before)
            assert one.freshness.stats.forgotten == forgotten
            await one.usable()
            [row] = await database.find("versions", {"_id": register.id})
            assert await one.read(register) == row["number"]


async def test_through_killed_cursors_nothing_old_is_used(
    settings: Settings, database: Database, register: Register
) -> None:
    async with processes(settings, settings) as both:

        async def kill() -> None:
            for _ in range(10):
                await asyncio.sleep(0.05)
                for each in both:
                    await database.data.command(
                        "killCursors", NOWHERE, cursors=[each.freshness.following.cursor]
                    )

        killing, chance = asyncio.create_task(kill()), random.Random(3)
        while not killing.done():
            await chance.choice(both).write(register)
            for each in both:
                await each.check(register)
                await each.check(register)
        await killing


@pytest.mark.parametrize("loss", ["drop", "rename away", "rename onto", "dropDatabase"])
async def test_with_a_collection_everything_is_forgotten(settings: Settings, loss: str) -> None:
    """In a database of its own: what it had is gone, and its stream goes on behind that."""
    alone = settings.model_copy(update={"mongo_database": f"lost_{ObjectId()}"})
    async with process(alone) as one:
        data, client = one.database.data, one.database.client
        await data["versions"].insert_one({"number": 1})
        await data["elsewhere"].insert_one({"number": 1})
        await one.usable()
        position, told = one.freshness.position, []
        one.freshness.on_change(lambda collection, key: told.append((collection, key)))
        assert one.freshness.is_current(position, ["models/x"])
        if loss == "drop":
            await data["versions"].drop()
        elif loss == "rename away":
            await data["versions"].rename("away")
        elif loss == "rename onto":
            await data["elsewhere"].rename("models")
        else:
            await client.drop_database(alone.mongo_database)
        await until(lambda: not one.freshness.is_current(position, ["models/x"]))
        await one.usable()
        assert ("models", None) in told
        assert ("versions", None) in told
        assert one.freshness.is_current(one.freshness.position, ["models/x"])
        register = Register()
        await register.insert(one.database)
        await until(lambda: ("versions", register.id) in told)
        await one.usable()
        await one.check(register)
        await client.drop_database(alone.mongo_database)


async def test_where_others_collections_go_nothing_is_forgotten(settings: Settings) -> None:
    alone = settings.model_copy(update={"mongo_database": f"lost_{ObjectId()}"})
    async with process(alone) as one:
        await one.database.data["usage_20260101"].insert_one({})
        await one.usable()
        position = one.freshness.position
        await one.database.data["usage_20260101"].drop()
        await until(lambda: one.freshness.position > position)
        assert one.freshness.is_current(position, ["models/x"])
        await one.database.client.drop_database(alone.mongo_database)


async def test_lost_history_forgets_everything(
    settings: Settings, database: Database, register: Register
) -> None:
    """A place that MongoDB's log does not have: it goes on from a minute ago, as at the start."""
    async with process(settings) as one:
        await one.usable()
        following, position = one.freshness.following, one.freshness.position
        async with await database.data["versions"].watch() as stream:
            await one.write(register)
            token = (await anext(stream))["_id"]["_data"]
        # A number within a second that no commit has.
        missing = {"_data": f"82{int(token[2:10], 16) - 1:08x}7fffffff{token[18:]}"}

        while following._token is not None:  # an answer that is under way has another one
            following._token = missing
            await database.data.command("killCursors", NOWHERE, cursors=[following.cursor])
            await until(lambda: following._token is not missing)
        await until(lambda: one.freshness.stats.forgotten > 1)
        await one.usable()
        assert one.freshness.position > position
        assert not one.freshness.is_current(position - (61 << 32), ["models/other"])
        await one.write(register)
        await one.check(register)


async def test_where_mongodb_does_not_know_a_minute_it_begins_now(
    settings: Settings, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, starts = Following._from_time, list[int]()

    async def is_gone(self: Following, session: Any, start: int) -> Row:
        starts.append(start)
        if len(starts) == 1:
            raise OperationFailure("no history", 286)
        return await asked(self, session, start)

    monkeypatch.setattr(Following, "_from_time", is_gone)
    async with process(settings) as one:
        await one.usable()
        position = one.freshness.position
        assert starts[1] - starts[0] == 60 << 32
        assert not one.freshness.is_current(starts[1] - 2, ["models/other"])
        assert one.freshness.is_current(position, ["models/other"])


# ---- Redis


async def test_through_restarts_of_redis_nothing_old_is_used(
    with_own: Settings, own_redis: OwnRedis, register: Register
) -> None:
    async with processes(with_own, with_own) as both:
        for _ in range(3):
            for each in both:
                await each.check(register)
            own_redis.kill()
            # Its own writer has to wait: everybody has to hear of it without Redis.
            await both[0].write(register)
            for each in both:
                await each.check(register)
            await own_redis.start()
            await asyncio.gather(*[each.usable() for each in both])
            for each in both:
                await each.check(register)
                hits = each.hits
                await each.check(register)
                assert each.hits == hits + 1
            await both[1].write(register)
            for each in both:
                await each.check(register)


async def test_a_number_that_was_flushed_is_made_of_mongodbs_time(
    with_own: Settings, own_redis: OwnRedis, register: Register
) -> None:
    async with processes(with_own, with_own) as both:
        one, other = both
        for flush in (("FLUSHALL",), ("DEL", key_of(one)), ("SET", key_of(one), "rubbish")):
            await one.write(register)
            _, time = await one.commit(register)
            assert time is not None
            await own_redis.ask(*flush)
            # Somebody has acknowledged up to `time` just before: nobody may go below it.
            await asyncio.gather(*[each.freshness.ready() for each in both])
            await asyncio.gather(*[each.usable() for each in both])
            assert int(await own_redis.ask("GET", key_of(one)), 16) >= time
            await one.write(register)
            await other.check(register)


async def test_a_writer_that_finds_no_number_makes_none_of_its_own(
    with_own: Settings, own_redis: OwnRedis, register: Register
) -> None:
    """A later write may be acknowledged, and forgotten, before the one that comes first: what is raised
    next has to be later than both."""
    async with process(with_own) as one:
        await one.usable()
        _, early = await one.commit(register)
        _, late = await one.commit(register)
        assert early is not None
        assert late is not None
        await one.freshness.acknowledge(late)
        await own_redis.ask("FLUSHALL")
        await one.freshness.acknowledge(early)
        found = await own_redis.ask("GET", key_of(one))
        assert found is None or int(found, 16) >= late
        await one.usable()
        assert int(await own_redis.ask("GET", key_of(one)), 16) >= late


async def test_an_old_dump_of_redis_is_not_believed(
    with_own: Settings, own_redis: OwnRedis, register: Register
) -> None:
    async with processes(with_own, with_own) as both:
        one, other = both
        await one.write(register)
        await own_redis.ask("SAVE")
        old = int(await own_redis.ask("GET", key_of(one)), 16)
        for _ in range(3):
            await one.write(register)
        newer = int(await own_redis.ask("GET", key_of(one)), 16)
        assert newer > old
        own_redis.kill()
        await own_redis.start()
        await asyncio.gather(*[each.usable() for each in both])
        assert int(await own_redis.ask("GET", key_of(one)), 16) >= newer
        await other.check(register)


async def test_a_number_that_went_back_is_not_believed(
    with_own: Settings, own_redis: OwnRedis, register: Register
) -> None:
    async with process(with_own) as one:
        await one.write(register)
        await one.usable()
        newer = int(await own_redis.ask("GET", key_of(one)), 16)
        await own_redis.ask("SET", key_of(one), f"{newer - 1:016x}")
        assert not await one.freshness.ready()
        await one.usable()
        assert int(await own_redis.ask("GET", key_of(one)), 16) >= newer


async def test_a_number_of_the_far_future_is_made_good(
    with_own: Settings, own_redis: OwnRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with process(with_own) as one:
        await one.usable()
        monkeypatch.setattr(module, "REACH_SECONDS", 0.05)
        await own_redis.ask("SET", key_of(one), "f" * 16)
        assert not await one.freshness.ready()
        await one.usable()
        found = int(await own_redis.ask("GET", key_of(one)), 16)
        assert found >> 32 < time.time() + 30


async def test_a_redis_that_takes_no_writes_is_not_believed(
    with_own: Settings, own_redis: OwnRedis
) -> None:
    """A primary that has become a replica has an old number, and says so only to who writes."""
    async with process(with_own) as one:
        await one.usable()
        await own_redis.ask("REPLICAOF", "127.0.0.1", str(free_port()))
        assert not await one.freshness.ready()
        await asyncio.sleep(0.6)
        assert not await one.freshness.ready()
        await own_redis.ask("REPLICAOF", "NO", "ONE")
        await one.usable()


async def test_a_redis_that_hangs_is_left_at_once_and_found_again(
    with_own: Settings, own_redis: OwnRedis, register: Register
) -> None:
    strict = with_own.model_copy(update={"cache_timeout_seconds": 0.05})
    async with processes(strict, strict) as both:
        one, other = both
        await other.check(register)
        own_redis.signal(signal.SIGSTOP)
        start = time.monotonic()
        assert await asyncio.gather(*[one.freshness.ready() for _ in range(50)]) == [False] * 50
        # 50 ms are allowed; the rest is for a busy machine.
        assert time.monotonic() - start < 0.5
        assert one.freshness.rounds.is_open
        start = time.monotonic()
        assert await asyncio.gather(*[one.freshness.ready() for _ in range(50)]) == [False] * 50
        assert time.monotonic() - start < 0.05
        await one.write(register)
        await other.check(register)
        own_redis.signal(signal.SIGCONT)
        await asyncio.gather(*[each.usable() for each in both])
        await other.check(register)


async def test_who_is_cut_off_from_redis_is_heard_of_all_the_same(
    settings: Settings, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader has its Redis, and so no reason to doubt: the writer waits, then it need not any more,
    for it has suspended what is kept, and when that ends everybody has heard."""
    door = Door(urlsplit(settings.redis_url).port or 6379)
    await door.open()
    cut = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{door.port}/0"})
    waits: list[float] = []
    async with processes(cut, settings) as (writer, reader):
        await reader.check(register)
        hits = reader.hits
        await reader.check(register)
        assert reader.hits == hits + 1
        await door.close()
        for _ in range(4):
            start = time.monotonic()
            await writer.write(register)
            waits.append(time.monotonic() - start)
            for _ in range(3):
                await reader.check(register)
        assert waits[0] >= module.HEARD_SECONDS
        assert max(waits[1:]) < module.HEARD_SECONDS
        assert reader.freshness.rounds.done
        assert not await reader.freshness.ready()
        # Over a whole suspension: it is extended while there are writes.
        until_time = time.monotonic() + module.SUSPENDED_SECONDS
        while time.monotonic() < until_time:
            await writer.write(register)
            await reader.check(register)
            await asyncio.sleep(0.02)
        assert writer.freshness.stats.suspensions >= 2
        # The others go on when it is over, the writer when it has found Redis.
        await reader.usable()
        await reader.check(register)
        await door.open()
        await writer.usable()
        await door.close()


async def test_without_mongodb_too_a_writer_waits_until_all_have_heard(
    settings: Settings, register: Register, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The suspension cannot be written: each write waits for itself."""
    dead = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})

    async def refused(*_: object, **__: object) -> None:
        raise PyMongoError("no")

    async with process(dead) as one:
        _, wrote = await one.commit(register)
        monkeypatch.setattr(type(one.database.data["cache"]), "update_one", refused)
        for _ in range(2):
            start = time.monotonic()
            await one.freshness.acknowledge(wrote)
            assert time.monotonic() - start >= module.HEARD_SECONDS
        assert one.freshness.stats.suspensions == 0


async def test_a_process_that_starts_in_a_suspension_hears_of_it(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the stream begins after it was written."""
    dead = settings.model_copy(update={"redis_url": f"redis://127.0.0.1:{free_port()}/0"})
    async with process(dead) as writer:
        await writer.freshness._write_suspension()
        assert writer.freshness.stats.suspensions == 1
    monkeypatch.setattr("modelharbor.cache.following.BACK_SECONDS", 0)
    async with process(settings) as late:
        await until(lambda: late.freshness.position > 0)
        await until(lambda: not late.freshness.rounds.is_open)
        assert not await late.freshness.ready()
        await database.data["cache"].delete_many({})


async def test_nothing_is_done_where_nothing_is_kept(
    settings: Settings, register: Register
) -> None:
    without = settings.model_copy(update={"response_cache": False})
    async with process(without) as one:
        await until(lambda: not one.freshness.rounds.is_open)
        assert not await one.freshness.ready()
        assert await one.freshness.rounds.next()
        await one.write(register)
        assert (one.freshness.position, one.freshness.stats.changes) == (0, 0)


async def test_other_parts_have_their_answers_whatever_is_kept(settings: Settings) -> None:
    class Counter:
        def __init__(self) -> None:
            self.found: list[Any] = []

        def commands(self, pipeline: Any) -> int:
            pipeline.execute_command("ECHO", "a")
            pipeline.execute_command("NONSENSE")
            return 2

        def answered(self, replies: list[Any]) -> None:
            self.found += replies

        def failed(self) -> None:
            self.found.append("failed")

    for is_kept in (True, False):
        counter = Counter()
        wanted = settings.model_copy(update={"response_cache": is_kept})
        async with (
            process(wanted) as one,
            open_freshness(one.database, one.cache, wanted, counter) as freshness,
        ):
            rounds = freshness.rounds
            await until(lambda rounds=rounds: not rounds.is_open)
            counter.found.clear()
            assert await rounds.next()
            assert counter.found[0] == b"a"
            assert "NONSENSE" in str(counter.found[1])
            assert len(counter.found) == 2


async def test_lists_are_judged_by_their_tags(settings: Settings, database: Database) -> None:
    model = ObjectId()
    await database.data["models"].insert_one(
        {"_id": model, "name_lower": str(model), "task": "ocr", "principals": ["public"]}
    )
    ocr = changed("models", "stats.likes", "task:ocr")
    other = changed("models", "stats.likes", "task:asr")
    async with process(settings) as one:
        await one.usable()
        position = one.freshness.position
        wrote = pack((await database.data.command("hello"))["operationTime"])
        assert wrote >= position
        await database.data["models"].update_one({"_id": model}, {"$inc": {"stats.likes": 1}})
        await until(lambda: not one.freshness.is_current(position, [ocr]))
        assert one.freshness.is_current(position, [other, gone("models"), "files/x"])
        assert not one.freshness.is_current(position, [other, f"models/{model}"])
        assert one.freshness.is_current(one.freshness.position, [ocr])
