"""Groups of subscriptions: what is shared, what is missed, what is passed over. Without a transport."""

import asyncio
from collections.abc import AsyncIterator, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import orjson
import pytest
from bson import ObjectId

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS, Viewer, job_principals
from modelharbor.cache.client import Cache, connect_cache
from modelharbor.context import Context
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.errors import BadUserInput, CursorExpired, Forbidden, HarborError, NotFound
from modelharbor.events.reader import Reader, open_reader
from modelharbor.events.recorder import recording
from modelharbor.execution import groups as engine
from modelharbor.execution.documents import DocumentStore
from modelharbor.execution.failures import Problem
from modelharbor.execution.live import Live
from modelharbor.execution.subscribing import Asked, Subscription
from modelharbor.jobs.put import put_job
from modelharbor.jobs.states import change_state
from modelharbor.loaders.lanes import Lanes
from modelharbor.observability.metrics import Metrics
from modelharbor.schema import core, schema
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.documents import insert_actor, viewer_of

pytestmark = pytest.mark.anyio
S = JobState
GUARD_SECONDS = 20.0  # against a hang
WATCH = """subscription W($id: ID!, $after: Cursor, $rate: Float = 50) {
  jobProgress(id: $id, after: $after, maxRateHz: $rate) { cursor job { state progress { current } } }
}"""
OWNED = """subscription W($id: ID!) { jobProgress(id: $id) { job { state subject { id } } } }"""
ALL = "subscription A($after: Cursor) { jobs(after: $after) { cursor job { id state } } }"


@dataclass(eq=False)
class Noted:
    """A sink that keeps what it gets."""

    told: list[Any] = field(default_factory=list)
    keys: list[Hashable] = field(default_factory=list)
    problems: list[Problem] | None = None
    is_complete: bool = False
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def send(self, payload: bytes, key: Hashable) -> None:
        self.told.append(orjson.loads(payload))
        self.keys.append(key)
        self.changed.set()

    async def room(self) -> None:
        pass

    def complete(self) -> None:
        self.is_complete = True
        self.changed.set()

    def fail(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.changed.set()

    async def until(self, count: int) -> list[Any]:
        async with asyncio.timeout(GUARD_SECONDS):
            while len(self.told) < count and not self.is_complete and self.problems is None:
                self.changed.clear()
                await self.changed.wait()
        return self.told

    async def ended(self) -> None:
        async with asyncio.timeout(GUARD_SECONDS):
            while not self.is_complete and self.problems is None:
                self.changed.clear()
                await self.changed.wait()

    @property
    def states(self) -> list[tuple[str, str]]:
        jobs = [each["data"]["jobProgress"]["job"] for each in self.told]
        return [(job["state"], job["progress"]["current"]) for job in jobs]

    @property
    def cursor(self) -> str:
        """Of the last event."""
        [event] = self.told[-1]["data"].values()
        cursor: str = event["cursor"]
        return cursor


@dataclass
class World:
    database: Database
    settings: Settings
    cache: Cache
    reader: Reader
    live: Live
    metrics: Metrics
    user: Viewer

    def asked(self, text: str, **variables: Any) -> Asked:
        document = self.documents.get(text)
        operation = document.operation(None)
        context = partial(
            Context,
            database=self.database,
            cache=self.cache,
            links=DownloadLinks(b"k" * 32, "http://test"),
            lanes=Lanes(),
            settings=self.settings,
            request_id="test",
        )
        return Asked(
            document,
            operation,
            variables,
            operation.coerce(variables),
            "http://test",
            lambda viewer: context(viewer=viewer),
        )

    def __post_init__(self) -> None:
        self.documents = DocumentStore(core, self.settings)

    async def follow(
        self, text: str, viewer: Viewer | None = None, **variables: Any
    ) -> tuple[Noted, Subscription]:
        sink = Noted()
        subscription = Subscription(self.asked(text, **variables), viewer or self.user, sink)
        await self.live.join(subscription)
        return sink, subscription

    async def put(self, *principals: ObjectId | None, **values: Any) -> Row:
        user_id = self.user.user_id

        async def work(session: Any) -> Row:
            return await put_job(
                self.database,
                session,
                kind=JobKind.REINDEX,
                input={},
                created_by_id=user_id,
                principals=job_principals(user_id, *principals),
                **values,
            )

        return await self.database.transaction(work)

    async def become(self, job: Row, *states: JobState) -> None:
        for state in states:

            async def work(session: Any, state: JobState = state) -> Row | None:
                return await change_state(self.database, session, {"_id": job["_id"]}, state)

            assert await self.database.transaction(work) is not None

    async def progress(self, job: Row, current: int) -> None:
        await self.database.data["jobs"].update_one(
            {"_id": job["_id"]},
            {"$set": {"progress.current": current}, "$inc": {"progress.sequence": 1}},
        )

    def counted(self, name: str) -> float:
        found = self.metrics.registry.get_sample_value(name)
        assert found is not None
        return found


@asynccontextmanager
async def world_of(database: Database, settings: Settings) -> AsyncIterator[World]:
    metrics = Metrics()
    user = viewer_of(await insert_actor("ada"))
    async with (
        connect_cache(settings) as cache,
        open_reader(database, settings) as reader,
        recording(database, settings),
    ):
        live = Live(schema, database, reader, settings, metrics)
        try:
            yield World(database, settings, cache, reader, live, metrics, user)
        finally:
            await live.close()


@pytest.fixture
async def world(database: Database, settings: Settings) -> AsyncIterator[World]:
    async with world_of(database, settings) as world:
        yield world


def id_of(job: Row) -> str:
    return global_id("Job", job["_id"])


async def test_an_answer_is_made_once_for_all_who_want_the_same(world: World) -> None:
    friend = viewer_of(await insert_actor("bob"))
    job = await world.put(friend.user_id)
    followed = [
        await world.follow(WATCH, viewer, id=id_of(job))
        for viewer in (world.user, friend, world.user)
    ]
    await world.become(job, S.RUNNING)
    for sink, _ in followed:
        await sink.until(2)
        assert sink.states == [("QUEUED", "0"), ("RUNNING", "0")]
    assert len(world.live.groups) == 1  # also for viewers whose rights differ
    assert world.counted("modelharbor_encodings_total") == 2
    assert world.counted("modelharbor_deliveries_total") == 6
    assert world.counted("modelharbor_subscriptions") == 3


async def test_what_hangs_on_rights_is_shared_among_equals_only(world: World) -> None:
    friend = viewer_of(await insert_actor("bob"))
    job = await world.put(friend.user_id)
    for viewer in (world.user, friend, world.user):
        await world.follow(OWNED, viewer, id=id_of(job))
    assert len(world.live.groups) == 2  # `subject` is what each may see


async def test_other_arguments_and_selections_are_other_groups(world: World) -> None:
    job, other = await world.put(), await world.put()
    await world.follow(WATCH, id=id_of(job))
    sink, _ = await world.follow(WATCH, id=id_of(other))
    await world.follow(WATCH.replace("state", "kind"), id=id_of(job))
    await world.follow(WATCH, id=id_of(job), rate=1)
    assert len(world.live.groups) == 4
    await world.follow(WATCH, id=id_of(other), after=sink.cursor)
    assert len(world.live.groups) == 4  # where one goes on says nothing about answers


async def test_who_may_not_see_it_is_told_that_there_is_none(world: World) -> None:
    job = await world.put()
    stranger = viewer_of(await insert_actor("eve"))
    for viewer in (stranger, ANONYMOUS, replace(world.user, scopes=frozenset())):
        with pytest.raises(NotFound):
            await world.follow(WATCH, viewer, id=id_of(job))
    assert world.live.groups == {}


async def test_who_lost_the_right_is_not_told_more(world: World) -> None:
    friend = viewer_of(await insert_actor("bob"))
    job = await world.put(friend.user_id)
    mine, _ = await world.follow(WATCH, id=id_of(job))
    theirs, subscription = await world.follow(WATCH, friend, id=id_of(job))
    with pytest.raises(NotFound):
        await world.live.renew(subscription, replace(friend, scopes=frozenset()))
    await world.become(job, S.RUNNING)
    await mine.until(2)
    assert len(theirs.told) == 1


async def test_other_rights_that_suffice_go_on_without_a_gap(world: World) -> None:
    job = await world.put()
    sink, subscription = await world.follow(WATCH, id=id_of(job))
    await world.become(job, S.RUNNING)
    await sink.until(2)
    await world.live.renew(subscription, replace(world.user, roles={}))
    await world.become(job, S.SUCCEEDED)
    await sink.ended()
    assert [state for state, _ in sink.states] == ["QUEUED", "RUNNING", "SUCCEEDED"]


async def test_a_list_that_hangs_on_rights_ends_with_them(world: World) -> None:
    text = "subscription { modelsChanged { totalCount } }"
    _, subscription = await world.follow(text)
    with pytest.raises(Forbidden, match="subscribe again"):
        await world.live.renew(subscription, ANONYMOUS)


@pytest.mark.parametrize("is_kept", [True, False])
async def test_what_was_missed_is_told_once_and_in_order(
    world: World, is_kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "KEPT", 256 if is_kept else 1)
    job = await world.put()
    sink, subscription = await world.follow(WATCH, id=id_of(job))
    staying, _ = await world.follow(WATCH, id=id_of(job))
    await world.become(job, S.RUNNING)
    await sink.until(2)
    subscription.leave()
    await world.become(job, S.RETRYING, S.RUNNING)
    await world.progress(job, 3)
    await staying.until(5)
    back, _ = await world.follow(WATCH, id=id_of(job), after=sink.cursor)
    await world.become(job, S.SUCCEEDED)
    await back.ended()
    assert back.is_complete
    states = [("RETRYING", "0"), ("RUNNING", "0"), ("RUNNING", "3"), ("SUCCEEDED", "3")]
    assert back.states == states
    assert staying.states == [("QUEUED", "0"), ("RUNNING", "0"), *states]


async def test_whoever_comes_back_after_the_end_is_complete_at_once(world: World) -> None:
    job = await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job))
    await world.become(job, S.RUNNING, S.FAILED)
    await sink.ended()
    back, _ = await world.follow(WATCH, id=id_of(job), after=sink.cursor)
    await back.ended()
    assert back.told == []
    assert back.is_complete
    late, _ = await world.follow(WATCH, id=id_of(job))
    await late.ended()
    assert late.states == [("FAILED", "0")]
    assert world.counted("modelharbor_subscriptions") == 0


async def test_many_jobs_are_followed_from_the_log_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await world.put()
    sink, subscription = await world.follow(ALL)
    await world.become(first, S.RUNNING)
    await sink.until(1)
    subscription.leave()
    [group] = world.live.groups.values()
    group.end()  # as in another process
    jobs = [await world.put() for _ in range(5)]
    for job in jobs:
        await world.become(job, S.RUNNING)
    back, _ = await world.follow(ALL, after=sink.cursor)
    await world.become(first, S.SUCCEEDED)
    await back.until(11)
    told = [
        (each["data"]["jobs"]["job"]["id"], each["data"]["jobs"]["job"]["state"])
        for each in back.told
    ]
    assert told == [
        *((id_of(job), "QUEUED") for job in jobs),
        *((id_of(job), "RUNNING") for job in jobs),
        (id_of(first), "SUCCEEDED"),
    ]


async def test_progress_is_passed_over_and_the_newest_is_told(world: World) -> None:
    job = await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job), rate=2)
    await world.become(job, S.RUNNING)
    for current in range(1, 31):
        await world.progress(job, current)
    await sink.until(4)
    numbers = [int(current) for _, current in sink.states]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 30
    assert len(numbers) < 10
    assert sink.keys[:2] == [None, None]
    assert sink.keys[-1] is not None  # a transport may leave it out


async def test_a_change_of_state_leaves_no_older_progress_behind(world: World) -> None:
    job = await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job), rate=0.1)
    await world.become(job, S.RUNNING)
    for current in (1, 2, 3):
        await world.progress(job, current)
    await world.become(job, S.SUCCEEDED)
    await sink.ended()
    assert sink.states[-1] == ("SUCCEEDED", "3")
    assert [state for state, _ in sink.states].count("SUCCEEDED") == 1


async def test_what_waits_is_told_before_the_process_ends(world: World) -> None:
    job = await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job), rate=0.1)
    await world.become(job, S.RUNNING)
    await world.progress(job, 1)
    await sink.until(3)
    await world.progress(job, 2)
    [group] = world.live.groups.values()
    async with asyncio.timeout(GUARD_SECONDS):
        while not group.pending:
            await asyncio.sleep(0.01)
    closed = asyncio.Event()
    world.live.shut_down[closed.set] = None
    world.live.shut()
    world.live.shut()
    async with asyncio.timeout(GUARD_SECONDS):
        await closed.wait()
    assert sink.states[-1] == ("RUNNING", "2")


async def test_lost_history_ends_what_hangs_on_it(world: World) -> None:
    job = await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job))
    [group] = world.live.groups.values()
    group.lost()
    await sink.ended()
    assert sink.problems is not None
    assert sink.problems[0]["extensions"]["code"] == "CURSOR_EXPIRED"
    assert world.live.groups == {}


async def test_a_group_that_nobody_follows_ends_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LINGER_SECONDS", 0.1)
    job = await world.put()
    _, subscription = await world.follow(WATCH, id=id_of(job))
    subscription.leave()
    subscription.leave()
    async with asyncio.timeout(GUARD_SECONDS):
        while world.live.groups or world.live.tasks:
            await asyncio.sleep(0.01)
    assert world.reader._subscribers == {}


async def test_many_who_come_at_once_are_checked_once(world: World) -> None:
    job = await world.put()
    asked = world.asked(WATCH, id=id_of(job))
    sinks = [Noted() for _ in range(100)]
    followed = [Subscription(asked, world.user, sink) for sink in sinks]
    await asyncio.gather(*[world.live.join(each) for each in followed])
    assert [sink.states for sink in sinks] == [[("QUEUED", "0")]] * 100
    assert world.counted("modelharbor_encodings_total") == 1


@pytest.mark.parametrize(
    ("text", "variables", "error"),
    [
        (WATCH, {"id": "x"}, NotFound),
        (WATCH, {"after": "garbage"}, BadUserInput),
        (WATCH, {"rate": 0.0}, BadUserInput),
        (WATCH, {"rate": 51.0}, BadUserInput),
        ("subscription { modelsChanged(first: 0) { totalCount } }", {}, BadUserInput),
        ("subscription { modelEvents(kinds: []) { at } }", {}, BadUserInput),
    ],
)
async def test_arguments_that_may_not_be_are_refused(
    world: World, text: str, variables: dict[str, Any], error: type[HarborError]
) -> None:
    job = await world.put()
    given = {"id": id_of(job), **variables} if "$id" in text else variables
    with pytest.raises(error):
        await world.follow(text, **given)
    assert world.live.groups == {}


async def test_a_cursor_is_good_for_its_own_subscription_and_time(world: World) -> None:
    job, other = await world.put(), await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job))
    with pytest.raises(BadUserInput):
        await world.follow(WATCH, id=id_of(other), after=sink.cursor)
    with pytest.raises(BadUserInput):
        await world.follow(ALL, after=sink.cursor)
    world.live.settings = world.settings.model_copy(update={"event_days": 1e-9})
    with pytest.raises(CursorExpired):
        await world.follow(WATCH, id=id_of(job), after=sink.cursor)
