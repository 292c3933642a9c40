"""Groups of subscriptions: what is shared, what is missed, what is passed over. Without a transport."""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable
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
from modelharbor.db.actors import ActorDocument, ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventDocument, EventKind
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.db.uploads import UploadDocument, UploadState
from modelharbor.db.versions import VersionStatus
from modelharbor.errors import (
    BadUserInput,
    CursorExpired,
    Forbidden,
    HarborError,
    NotFound,
    RateLimited,
)
from modelharbor.events.changes import Change, What
from modelharbor.events.position import START
from modelharbor.events.reader import Reader, open_reader
from modelharbor.events.recorder import recording
from modelharbor.execution import groups as engine
from modelharbor.execution import live as live_module
from modelharbor.execution.documents import DocumentStore
from modelharbor.execution.execute import run
from modelharbor.execution.failures import Problem
from modelharbor.execution.live import Live
from modelharbor.execution.subscribing import Asked, Subscription
from modelharbor.jobs.put import put_job
from modelharbor.jobs.states import change_state
from modelharbor.loaders.base import Reads
from modelharbor.loaders.lanes import Lanes
from modelharbor.observability.metrics import Metrics
from modelharbor.schema import core, schema
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from modelharbor.storage.blobs import BlobStore, open_storage
from modelharbor.streams.base import Happening
from modelharbor.streams.uploads import UploadProgressFollower
from tests.documents import (
    change_upload,
    insert_actor,
    insert_model,
    insert_upload,
    insert_version,
    receive_bytes,
    viewer_of,
)

pytestmark = pytest.mark.anyio
S = JobState
GUARD_SECONDS = 20.0  # against a hang
WATCH = """subscription W($id: ID!, $after: Cursor, $rate: Float = 50) {
  jobProgress(id: $id, after: $after, maxRateHz: $rate) { cursor job { state progress { current } } }
}"""
OWNED = """subscription W($id: ID!) { jobProgress(id: $id) { job { state subject { id } } } }"""
ALL = "subscription A($after: Cursor) { jobs(after: $after) { cursor job { id state } } }"
MODELS = "subscription M($after: Cursor) { modelEvents(after: $after) { cursor model { name } } }"
LIST = "subscription { modelsChanged { ids } }"


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
    def names(self) -> list[str]:
        return [each["data"]["modelEvents"]["model"]["name"] for each in self.told]

    @property
    def code(self) -> str | None:
        """Of what ended it."""
        return self.problems[0]["extensions"]["code"] if self.problems else None

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
    storage: BlobStore
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
            storage=self.storage,
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

    def subscription(
        self, text: str, viewer: Viewer | None = None, **variables: Any
    ) -> tuple[Noted, Subscription]:
        sink = Noted()
        return sink, Subscription(self.asked(text, **variables), viewer or self.user, sink)

    async def follow(
        self, text: str, viewer: Viewer | None = None, **variables: Any
    ) -> tuple[Noted, Subscription]:
        sink, subscription = self.subscription(text, viewer, **variables)
        await self.live.join(subscription)
        return sink, subscription

    def resume(
        self, text: str, viewer: Viewer | None = None, **variables: Any
    ) -> tuple[Noted, Subscription, asyncio.Task[None]]:
        """While it is told what it missed."""
        sink, subscription = self.subscription(text, viewer, **variables)
        return sink, subscription, asyncio.create_task(self.live.join(subscription))

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

    async def happen(self, *models: ModelDocument) -> None:
        """Something, to each of them in turn."""
        for model in models:
            await EventDocument(
                kind=EventKind.MODEL_UPDATED,
                about=[model.id, model.owner_id],
                principals=model.principals,
                model_id=model.id,
                after={"summary": "new"},
            ).insert()

    async def missed(self, text: str, viewer: Viewer, *models: ModelDocument) -> str:
        """The cursor after which this happened, that only the log knows."""
        sink, subscription = await self.follow(text, viewer)
        await self.happen(models[0])
        await sink.until(1)
        subscription.close()
        for group in list(self.live.groups.values()):
            group.end()  # as in another process
        place = self.reader.position
        await self.happen(*models)
        await until(lambda: len(self.reader.since(place)) == len(models))
        return sink.cursor

    @property
    def members(self) -> int:
        return sum(len(group.members) for group in self.live.groups.values())

    def limit(self, **values: Any) -> None:
        self.live.settings = self.live.settings.model_copy(update=values)

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
        open_storage(settings) as storage,
    ):
        live = Live(schema, database, reader, settings, metrics)
        try:
            yield World(database, settings, cache, reader, live, metrics, storage, user)
        finally:
            await live.close()


@pytest.fixture
async def world(database: Database, settings: Settings) -> AsyncIterator[World]:
    async with world_of(database, settings) as world:
        yield world


def id_of(job: Row) -> str:
    return global_id("Job", job["_id"])


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(GUARD_SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


class Gate:
    """Holds answers back while it is closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.only_passing = False
        self.waiting = 0
        made = engine.Group.payload

        async def payload(group: engine.Group, happening: Happening) -> bytes:
            if happening.is_passing or not self.only_passing:
                self.waiting += 1
                try:
                    await self.is_open.wait()
                finally:
                    self.waiting -= 1
            return await made(group, happening)

        monkeypatch.setattr(engine.Group, "payload", payload)

    def close(self, *, only_passing: bool = False) -> None:
        self.only_passing = only_passing
        self.is_open.clear()

    def open(self) -> None:
        self.is_open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


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


# ---- who gets what, where answers hang on rights


async def organization_of(
    world: World, role: Role, visibility: Visibility = Visibility.PRIVATE
) -> tuple[ActorDocument, ModelDocument, Viewer]:
    """One with a model, of which the user is a member."""
    owner = await insert_actor("acme", ActorKind.ORGANIZATION)
    model = await insert_model(owner, "m", visibility=visibility)
    return owner, model, replace(world.user, roles={owner.id: role})


async def test_equal_principals_in_other_roles_share_no_answers(world: World) -> None:
    text = """subscription M($after: Cursor) { modelEvents(after: $after) { cursor model {
      viewerCan latestVersion { files(first: 1) { nodes { downloadUrl } } }
    } } }"""
    owner, model, admin = await organization_of(world, Role.ADMIN)
    await insert_version(world.database, model, {"weights.bin": 3})
    reader = replace(admin, roles={owner.id: Role.VIEWER})
    assert admin.principals == reader.principals

    def seen(sink: Noted) -> list[tuple[int, bool]]:
        """How much may be done, and whether there are links."""
        models = [each["data"]["modelEvents"]["model"] for each in sink.told]
        links = [each["latestVersion"]["files"]["nodes"][0]["downloadUrl"] for each in models]
        return [
            (len(each["viewerCan"]), link is not None)
            for each, link in zip(models, links, strict=True)
        ]

    first, subscription = await world.follow(text, admin)
    staying, _ = await world.follow(text, admin)
    second, _ = await world.follow(text, reader)
    assert len(world.live.groups) == 2
    await world.happen(model)
    for sink in (first, staying, second):
        await sink.until(1)
    assert (seen(first), seen(second)) == ([(6, True)], [(1, False)])
    # One is taken a role: from the next event on, also of what was missed meanwhile.
    subscription.leave()
    await world.happen(model)
    await staying.until(2)
    await world.live.renew(subscription, reader)
    await world.happen(model)
    await first.until(3)
    await staying.until(3)
    assert seen(first) == [(6, True), (1, False), (1, False)]
    assert seen(staying) == [(6, True)] * 3


async def test_what_became_private_is_not_told_again(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "FRESH_SECONDS", 0.0)
    owner, model, _ = await organization_of(world, Role.ADMIN, Visibility.PUBLIC)
    public = await insert_model(owner, "public")
    staying, _ = await world.follow(MODELS, ANONYMOUS)
    sink, subscription = await world.follow(MODELS, ANONYMOUS)
    await world.happen(model)
    await sink.until(1)
    subscription.close()
    await world.happen(model)
    await staying.until(2)
    [group] = world.live.groups.values()
    assert len(group.kept) == 2
    hidden = {"visibility": "PRIVATE", "principals": [f"actor:{owner.id}"]}
    await world.database.data["models"].update_one({"_id": model.id}, {"$set": hidden})
    back, _ = await world.follow(MODELS, ANONYMOUS, after=sink.cursor)
    await world.happen(public)
    await back.until(1)
    assert back.names == ["public"]
    assert staying.names == ["m", "m", "public"]


async def test_what_stands_is_shown_as_rights_are_now(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, model, _ = await organization_of(world, Role.ADMIN, Visibility.PUBLIC)
    job = await world.put(subject={"type": "Model", "id": model.id})

    async def subject() -> Any:
        sink, _ = await world.follow(OWNED, id=id_of(job))
        return sink.told[0]["data"]["jobProgress"]["job"]["subject"]

    shown = {"id": global_id("Model", model.id)}
    assert [await subject(), await subject()] == [shown, shown]
    assert world.counted("modelharbor_encodings_total") == 1
    hidden = {"visibility": "PRIVATE", "principals": [f"actor:{owner.id}"]}
    await world.database.data["models"].update_one({"_id": model.id}, {"$set": hidden})
    monkeypatch.setattr(engine, "FRESH_SECONDS", 0.0)
    assert await subject() is None
    assert len(world.live.groups) == 1


# ---- what goes on while something is told that was missed


@pytest.mark.parametrize("end", [Subscription.close, Subscription.leave])
async def test_whoever_leaves_while_it_is_told_gets_no_more(
    world: World, gate: Gate, end: Callable[[Subscription], None]
) -> None:
    model = await insert_model(await insert_actor("own"), "m")
    after = await world.missed(MODELS, world.user, *[model] * 5)
    gate.close()
    sink, subscription, joining = world.resume(MODELS, after=after)
    await until(lambda: gate.waiting)
    end(subscription)
    gate.open()
    await joining
    assert (sink.told, sink.is_complete, sink.problems) == ([], False, None)
    assert world.members == 0
    assert subscription.group is None


async def test_whoever_is_closed_while_it_is_admitted_does_not_come_in(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = await world.put()
    check, checked, go_on = world.live.check, asyncio.Event(), asyncio.Event()

    async def slow(*args: Any) -> None:
        await check(*args)
        checked.set()
        await go_on.wait()

    monkeypatch.setattr(world.live, "check", slow)
    sink, subscription, joining = world.resume(WATCH, id=id_of(job))
    await checked.wait()
    subscription.close()
    go_on.set()
    await joining
    assert (sink.told, world.live.groups) == ([], {})


async def test_renewals_while_it_is_told_leave_one_membership_and_nothing_twice(
    world: World, gate: Gate
) -> None:
    owner, model, viewer = await organization_of(world, Role.ADMIN)
    after = await world.missed(MODELS, viewer, *[model] * 5)
    gate.close()
    sink, subscription, joining = world.resume(MODELS, viewer, after=after)
    await until(lambda: gate.waiting)
    renewing = [
        asyncio.create_task(
            world.live.renew(subscription, replace(viewer, roles={owner.id: role, **more}))
        )
        for role, more in ((Role.VIEWER, {}), (Role.MAINTAINER, {ObjectId(): Role.ADMIN}))
    ]
    await until(lambda: gate.waiting >= 2)
    gate.open()
    await asyncio.gather(joining, *renewing)
    assert (len(sink.told), world.members) == (5, 1)
    await world.happen(model)
    await sink.until(6)
    cursors = [each["data"]["modelEvents"]["cursor"] for each in sink.told]
    assert len(cursors) == len(set(cursors)) == 6
    assert world.counted("modelharbor_subscriptions") == 1


async def test_rights_that_are_taken_while_it_is_told_count_from_then_on(
    world: World, gate: Gate
) -> None:
    _, model, viewer = await organization_of(world, Role.VIEWER)
    after = await world.missed(MODELS, viewer, *[model] * 5)
    gate.close()
    sink, subscription, joining = world.resume(MODELS, viewer, after=after)
    await until(lambda: gate.waiting)
    await world.live.renew(subscription, replace(viewer, roles={}))
    gate.open()
    await joining
    assert (sink.told, world.members) == ([], 1)  # it goes on, with what it may see now


@pytest.mark.parametrize("state", [S.SUCCEEDED, S.RETRYING])
async def test_a_slow_answer_of_what_stands_comes_neither_twice_nor_too_late(
    world: World, gate: Gate, state: JobState
) -> None:
    job = await world.put()
    staying, _ = await world.follow(WATCH, id=id_of(job))
    await world.become(job, S.RUNNING)
    await staying.until(2)
    after = staying.cursor
    await world.progress(job, 3)
    await staying.until(3)
    gate.close(only_passing=True)
    sink, _, joining = world.resume(WATCH, id=id_of(job), after=after)
    await until(lambda: gate.waiting)
    await world.become(job, state)
    await sink.until(1)
    gate.open()
    await joining
    assert sink.states == [(state.value, "3")]
    assert sink.is_complete == (state is S.SUCCEEDED)
    if state is S.RETRYING:
        await world.become(job, S.RUNNING, S.SUCCEEDED)
        await sink.ended()
        assert sink.states == [("RETRYING", "3"), ("RUNNING", "3"), ("SUCCEEDED", "3")]


async def test_what_happens_while_rights_are_renewed_is_not_missed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await insert_model(await insert_actor("own"), "m")
    sink, subscription = await world.follow(MODELS)
    check, go_on = world.live.check, asyncio.Event()

    async def slow(*args: Any) -> None:
        await go_on.wait()
        await check(*args)

    monkeypatch.setattr(world.live, "check", slow)
    renewing = asyncio.create_task(
        world.live.renew(subscription, replace(world.user, roles={ObjectId(): Role.VIEWER}))
    )
    await until(lambda: world.members == 0)
    place = world.reader.position
    await world.happen(model)
    await until(lambda: world.reader.position > place)
    assert sink.told == []
    go_on.set()
    await renewing
    await world.happen(model)
    await sink.until(2)
    assert sink.names == ["m", "m"]


# ---- what it may cost


async def test_there_are_so_many_different_subscriptions(world: World) -> None:
    world.limit(max_streams=2)
    first, second, third = [await world.put() for _ in range(3)]
    _, subscription = await world.follow(WATCH, id=id_of(first))
    await world.follow(WATCH, id=id_of(second))
    with pytest.raises(RateLimited, match="2 different subscriptions"):
        await world.follow(WATCH, id=id_of(third))
    await world.follow(WATCH, id=id_of(second))  # it is not a different one
    subscription.close()
    assert len(world.live.groups) == 2  # for who comes back
    sink, _ = await world.follow(WATCH, id=id_of(third))
    assert (sink.states, len(world.live.groups)) == ([("QUEUED", "0")], 2)
    with pytest.raises(RateLimited):
        await world.follow(WATCH, id=id_of(first))


async def test_a_source_with_a_pace_holds_no_changes(world: World) -> None:
    await world.follow(LIST)
    [group] = world.live.groups.values()
    for _ in range(5):
        group.take(Change(What.MODEL, START, {"model_id": ObjectId()}))
    assert len(group.changes) == 1


async def test_too_many_changes_end_what_cannot_keep_up(
    world: World, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "MOST_CHANGES", 3)
    model = await insert_model(await insert_actor("own"), "m")
    sink, _ = await world.follow(MODELS)
    gate.close()
    await world.happen(*[model] * 2)
    await until(lambda: gate.waiting)
    await world.happen(*[model] * 4)
    await sink.ended()
    assert (sink.code, sink.told, world.live.groups) == ("UNAVAILABLE", [], {})
    assert world.reader._subscribers == {}


async def test_what_takes_no_after_is_neither_kept_nor_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.streams.models.ModelsChanged.pace", 0.01)
    owner = await insert_actor("own")
    sink, subscription = await world.follow(LIST)
    _, other = await world.follow(LIST)
    await insert_model(owner, "m")
    await sink.until(2)
    [group] = world.live.groups.values()
    assert (len(group.kept), group.kept_bytes) == (0, 0)
    subscription.close()
    assert len(world.live.groups) == 1
    other.close()
    assert world.live.groups == {}
    await until(lambda: not world.live.tasks)
    assert world.reader._subscribers == {}


async def test_what_is_kept_is_bounded_and_the_rest_comes_from_the_log(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = await insert_model(await insert_actor("own"), "m")
    staying, _ = await world.follow(MODELS)
    [group] = world.live.groups.values()
    began = group.kept_from
    await world.happen(model)
    await staying.until(1)
    cursor, size = staying.cursor, group.kept_bytes
    assert (group.kept_from, len(group.kept)) == (began, 1)
    monkeypatch.setattr(engine, "KEPT_BYTES", 3 * size)
    await world.happen(*[model] * 5)
    await staying.until(6)
    assert (len(group.kept), group.kept_bytes) == (3, 3 * size)
    assert began < group.kept_from < group.kept[0].happening.position
    logged: list[str] = []
    source = type(group.source)
    of_events = source.of_events

    async def noted(source: Any, reads: Any, changes: Any) -> list[Happening]:
        logged.extend(change.position for change in changes)
        return await of_events(source, reads, changes)

    monkeypatch.setattr(source, "of_events", noted)
    back, _ = await world.follow(MODELS, after=cursor)
    assert back.told == staying.told[1:]
    assert len(logged) == 5
    late, _ = await world.follow(MODELS, after=staying.told[2]["data"]["modelEvents"]["cursor"])
    assert late.told == staying.told[3:]
    assert len(logged) == 5  # all of that was kept


async def test_an_answer_may_have_a_size(world: World) -> None:
    job = await world.put()
    world.limit(max_answer_bytes=50)
    sink, _ = await world.follow(WATCH, id=id_of(job))
    [answer] = sink.told
    [error] = answer["errors"]
    assert answer["data"] is None
    assert error["extensions"]["code"] == "OPERATION_TOO_COMPLEX"
    assert error["extensions"]["limit"] == 50
    world.limit(max_answer_bytes=1000)
    await world.become(job, S.RUNNING)
    await sink.until(2)
    assert sink.told[1]["data"]["jobProgress"]["job"]["state"] == "RUNNING"


# ---- what fails


class Broken(Noted):
    """A client that cannot be sent to any more."""

    attempts = 0

    def send(self, payload: bytes, key: Hashable) -> None:
        self.attempts += 1
        raise RuntimeError("This client is gone.")


async def test_one_client_that_fails_is_nothing_to_the_others(world: World) -> None:
    model = await insert_model(await insert_actor("own"), "m")
    before, _ = await world.follow(MODELS)
    broken, (_, subscription) = Broken(), world.subscription(MODELS)
    subscription.sink = broken
    await world.live.join(subscription)
    after, _ = await world.follow(MODELS)
    await world.happen(*[model] * 2)
    for sink in (before, after):
        await sink.until(2)
        assert sink.names == ["m", "m"]
    assert (broken.attempts, subscription.is_closed, world.members) == (1, True, 2)


@pytest.mark.parametrize("is_kept", [True, False])
async def test_one_client_that_fails_while_it_comes_in_is_left_alone(
    world: World, is_kept: bool
) -> None:
    model = await insert_model(await insert_actor("own"), "m")
    if is_kept:
        staying, _ = await world.follow(MODELS)
        await world.happen(*[model] * 4)
        await staying.until(4)
        after = staying.told[0]["data"]["modelEvents"]["cursor"]
    else:
        after = await world.missed(MODELS, world.user, *[model] * 4)
    broken, (_, subscription) = Broken(), world.subscription(MODELS, after=after)
    subscription.sink = broken
    await world.live.join(subscription)
    assert (broken.attempts, subscription.is_closed) == (1, True)
    assert world.members == (1 if is_kept else 0)


async def test_the_last_progress_of_each_of_many_jobs_always_comes(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modelharbor.schema.subscription.JOBS_RATE_HZ", 10.0)
    text = "subscription { jobs { job { id state progress { current } } } }"
    busy = [await world.put() for _ in range(4)]
    other = await world.put()
    for job in (*busy, other):
        await world.become(job, S.RUNNING)
    sink, _ = await world.follow(text)
    for current in range(1, 11):
        for job in busy if current % 2 else reversed(busy):
            await world.progress(job, current)
    await world.become(other, S.SUCCEEDED)

    def last() -> dict[str, tuple[str, str]]:
        jobs = [each["data"]["jobs"]["job"] for each in sink.told]
        return {job["id"]: (job["state"], job["progress"]["current"]) for job in jobs}

    wanted = {id_of(job): ("RUNNING", "10") for job in busy} | {id_of(other): ("SUCCEEDED", "0")}
    await until(lambda: last() == wanted)
    assert len(sink.told) < 40


async def test_the_process_ends_though_an_answer_hangs(
    world: World, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_module, "LAST_SECONDS", 0.1)
    job = await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job), rate=0.1)
    await world.become(job, S.RUNNING)
    await world.progress(job, 1)
    await sink.until(3)
    await world.progress(job, 2)
    [group] = world.live.groups.values()
    await until(lambda: group.pending)
    gate.close()
    closed = asyncio.Event()
    world.live.shut_down[closed.set] = None
    world.live.shut()
    async with asyncio.timeout(5):
        await closed.wait()
    assert len(sink.told) == 3


@pytest.mark.parametrize(
    ("code", "failures", "runs"), [("TIMEOUT", 9, 1), ("UNAVAILABLE", 2, 3), ("UNAVAILABLE", 9, 4)]
)
async def test_what_may_come_back_is_read_again_and_what_takes_too_long_is_not(
    world: World, monkeypatch: pytest.MonkeyPatch, code: str, failures: int, runs: int
) -> None:
    monkeypatch.setattr(engine, "AGAIN_SECONDS", 0.001)
    monkeypatch.setattr(engine, "PATIENCE", 4)
    job = await world.put()
    sink, _ = await world.follow(WATCH, id=id_of(job))
    count = 0

    async def failing(*args: Any) -> Any:
        nonlocal count
        count += 1
        answer = await run(*args)
        if count <= failures:
            answer.errors.append({"message": "no", "extensions": {"code": code}})
        return answer

    monkeypatch.setattr(engine, "run", failing)
    await world.become(job, S.RUNNING)
    await sink.until(2)
    assert count == runs
    errors = [each["extensions"]["code"] for each in sink.told[1].get("errors", [])]
    assert errors == ([code] if failures == 9 else [])
    await world.progress(job, 1)  # newer progress comes anyway
    await sink.until(3)
    assert count == runs + 1


# Several subjects at once ------------------------------------------------------------------------

UPLOADS = """subscription U($ids: [ID!], $versionId: ID, $after: Cursor, $rate: Float = 50) {
  uploadProgress(ids: $ids, versionId: $versionId, after: $after, maxRateHz: $rate) {
    cursor upload { path state receivedBytes }
  }
}"""
U = UploadState


@dataclass
class Sent:
    """Two uploads into one version."""

    a: UploadDocument
    b: UploadDocument

    @property
    def ids(self) -> list[str]:
        return [global_id("Upload", each.id) for each in (self.a, self.b)]

    @property
    def version_id(self) -> str:
        return global_id("ModelVersion", self.a.version_id)


@pytest.fixture
async def sent(world: World) -> Sent:
    alice = await insert_actor("alice")
    world.user = viewer_of(alice)
    model = await insert_model(alice, "m")
    version = await insert_version(world.database, model, {}, status=VersionStatus.UPLOADING)
    return Sent(*[await insert_upload(alice, model, version, path) for path in "ab"])


def uploads_of(sink: Noted) -> list[str]:
    uploads = [each["data"]["uploadProgress"]["upload"] for each in sink.told]
    return [f"{each['path']} {each['state']} {each['receivedBytes']}" for each in uploads]


async def test_some_uploads_are_told_as_they_stand_and_then_to_the_last_end(
    world: World, sent: Sent
) -> None:
    database = world.database
    sink, _ = await world.follow(UPLOADS, ids=sent.ids)
    assert uploads_of(sink) == ["a CREATED 0", "b CREATED 0"]
    await change_upload(database, sent.a, U.UPLOADING)
    await sink.until(3)
    await receive_bytes(database, sent.b, 7)
    await sink.until(4)
    late, _ = await world.follow(UPLOADS, ids=sent.ids)
    assert world.members == 2
    assert len(world.live.groups) == 1
    assert uploads_of(late) == ["a UPLOADING 0", "b CREATED 7"]
    await change_upload(database, sent.a, U.ABORTED)
    await sink.until(5)
    assert not sink.is_complete
    await change_upload(database, sent.b, U.COMPLETED)
    await sink.ended()
    await late.ended()
    ends = ["a ABORTED 0", "b COMPLETED 7"]
    assert uploads_of(sink)[2:] == ["a UPLOADING 0", "b CREATED 7", *ends]
    assert uploads_of(late)[2:] == ends
    ended, _ = await world.follow(UPLOADS, ids=sent.ids)
    assert uploads_of(ended) == ends
    assert ended.is_complete
    nothing, _ = await world.follow(UPLOADS, ids=sent.ids, after=sink.cursor)
    assert nothing.told == []
    assert nothing.is_complete


@pytest.mark.parametrize("is_elsewhere", [False, True])
async def test_changes_of_uploads_that_were_missed_are_told_once(
    world: World, sent: Sent, is_elsewhere: bool
) -> None:
    """By the group that was left, and by another process."""
    database = world.database
    sink, subscription = await world.follow(UPLOADS, ids=sent.ids)
    await change_upload(database, sent.a, U.UPLOADING)
    await sink.until(3)
    subscription.close()
    if is_elsewhere:
        for group in list(world.live.groups.values()):
            group.end()
    place = world.reader.position
    await change_upload(database, sent.b, U.UPLOADING)
    await receive_bytes(database, sent.b, 9)
    await change_upload(database, sent.b, U.FAILED)
    await until(lambda: len(world.reader.since(place)) == 2)
    back, again = await world.follow(UPLOADS, ids=sent.ids, after=sink.cursor)
    await back.until(2)
    assert uploads_of(back) == ["b UPLOADING 0", "b FAILED 9"]
    assert not back.is_complete
    again.close()
    await change_upload(database, sent.a, U.COMPLETED)
    await until(lambda: len(world.reader.since(place)) == 3)
    end, _ = await world.follow(UPLOADS, ids=sent.ids, after=back.cursor)
    await end.ended()
    assert uploads_of(end) == ["a COMPLETED 0"]
    assert end.is_complete


async def test_what_is_read_ahead_of_the_log_is_told_once(
    world: World, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To who comes anew as it stands, to who comes back as the event that it was."""
    database = world.database
    first, subscription = await world.follow(UPLOADS, ids=sent.ids)
    subscription.close()
    for group in list(world.live.groups.values()):
        group.end()
    read = UploadProgressFollower.begin

    async def begin(self: UploadProgressFollower, reads: Reads, position: str) -> None:
        await change_upload(database, sent.a, U.UPLOADING)
        await change_upload(database, sent.a, U.PAUSED)
        await read(self, reads, position)

    monkeypatch.setattr(UploadProgressFollower, "begin", begin)
    (anew, _), (back, _) = await asyncio.gather(
        world.follow(UPLOADS, ids=sent.ids),
        world.follow(UPLOADS, ids=sent.ids, after=first.cursor),
    )
    await change_upload(database, sent.b, U.UPLOADING)
    await anew.until(3)
    await back.until(3)
    assert uploads_of(anew) == ["a PAUSED 0", "b CREATED 0", "b UPLOADING 0"]
    assert uploads_of(back) == ["a UPLOADING 0", "a PAUSED 0", "b UPLOADING 0"]


async def test_who_has_the_end_from_the_log_is_not_left_waiting(
    world: World, sent: Sent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the group comes to it only later."""
    database = world.database
    await change_upload(database, sent.b, U.ABORTED)
    sink, _ = await world.follow(UPLOADS, ids=sent.ids)
    assert uploads_of(sink) == ["a CREATED 0", "b ABORTED 0"]
    may_look, look = asyncio.Event(), UploadProgressFollower.happenings

    async def happenings(
        self: UploadProgressFollower, reads: Reads, changes: list[Change]
    ) -> list[Happening]:
        await may_look.wait()
        return await look(self, reads, changes)

    monkeypatch.setattr(UploadProgressFollower, "happenings", happenings)
    place = world.reader.position
    await change_upload(database, sent.a, U.COMPLETED)
    await until(lambda: world.reader.since(place))
    [group] = world.live.groups.values()
    group.kept_from = world.reader.position  # what was missed comes from the log
    back, _ = await world.follow(UPLOADS, ids=sent.ids, after=sink.cursor)
    assert uploads_of(back) == ["a COMPLETED 0"]
    assert not back.is_complete
    may_look.set()
    await back.ended()
    await sink.ended()
    assert uploads_of(back) == ["a COMPLETED 0"]
    assert uploads_of(sink)[2:] == ["a COMPLETED 0"]


async def test_progress_of_each_of_several_uploads_is_conflated_by_itself(
    world: World, sent: Sent
) -> None:
    database = world.database
    sink, _ = await world.follow(UPLOADS, ids=sent.ids, rate=0.1)
    for received in (1, 2):
        await receive_bytes(database, sent.a, received)
        await receive_bytes(database, sent.b, received)
        await sink.until(4)
    await change_upload(database, sent.a, U.COMPLETED)
    await change_upload(database, sent.b, U.COMPLETED)
    await sink.ended()
    assert uploads_of(sink)[2:] == [
        "a CREATED 1",
        "b CREATED 1",
        "a COMPLETED 2",
        "b COMPLETED 2",
    ]
    assert sink.keys[2:4] == [sent.a.id, sent.b.id]


async def test_uploads_of_a_version_go_on(world: World, sent: Sent) -> None:
    database = world.database
    sink, _ = await world.follow(UPLOADS, versionId=sent.version_id)
    assert sink.told == []
    await change_upload(database, sent.a, U.COMPLETED)
    await receive_bytes(database, sent.b, 3)
    await sink.until(2)
    await change_upload(database, sent.b, U.COMPLETED)
    await sink.until(3)
    assert uploads_of(sink) == ["a COMPLETED 0", "b CREATED 3", "b COMPLETED 3"]
    assert not sink.is_complete
    back, _ = await world.follow(
        UPLOADS,
        versionId=sent.version_id,
        after=sink.told[0]["data"]["uploadProgress"]["cursor"],
    )
    await back.until(1)
    assert uploads_of(back) == ["b COMPLETED 3"]
    assert not back.is_complete
