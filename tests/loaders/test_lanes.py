"""Reads that go together: each asker gets what it asked for, as new as if it had read alone."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import orjson
import pytest
from bson import ObjectId
from pymongo.errors import AutoReconnect, ExecutionTimeout

from modelharbor.app import create_app
from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.tokens import make_secret, secret_hash, token_text
from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorDocument, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission, TokenDocument
from modelharbor.errors import Forbidden
from modelharbor.loaders.base import Loader, Reads, Sharing
from modelharbor.loaders.lanes import Lanes
from modelharbor.loaders.models import ModelPageLoader
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.settings import Settings
from tests.asking import Asker
from tests.documents import insert_actor, insert_model, insert_version, viewer_of
from tests.http.serving import Server, serving

pytestmark = pytest.mark.anyio

Held = tuple[asyncio.Event, asyncio.Event]


class Upper(Loader[str, Any, Any]):
    """Letters in upper case with the version of the store, when the test lets it go on."""

    sharing = Sharing.EVERYBODY
    store: ClassVar[dict[str, int]] = {}
    batches: ClassVar[list[list[str]]] = []
    gates: ClassVar[list[asyncio.Event]] = []
    bad: ClassVar[dict[str, Exception]] = {}
    """Keys that make the whole batch raise."""

    @property
    def most_keys(self) -> int:
        return 5

    async def batch_load(self, keys: list[str]) -> list[Any]:
        gate = asyncio.Event()
        self.batches.append(list(keys))
        self.gates.append(gate)
        seen = dict(self.store)  # the database answers with what it has when it is asked
        count = counted.get()
        if count is not None:
            count.names.append(f"find {''.join(keys)}")
            count.micros += 7
            count.cache_hits += 1
        await gate.wait()
        for key in keys:
            if key in self.bad:
                raise self.bad[key]
        return [
            ValueError(key) if key == "!" else f"{key.upper()}{seen.get(key, 0)}" for key in keys
        ]


class ByRights(Upper):
    sharing = Sharing.EQUAL_RIGHTS


class Alone(Upper):
    sharing = Sharing.NEVER


@pytest.fixture(autouse=True)
def fresh() -> None:
    for kept in (Upper.store, Upper.batches, Upper.gates, Upper.bad):
        kept.clear()


@pytest.fixture
def lanes() -> Lanes:
    return Lanes()


def reads(viewer: Viewer = ANONYMOUS) -> Reads:
    nothing = cast("Any", None)  # these loaders read nothing
    links = DownloadLinks(b"", "http://test")
    return Reads(database=nothing, cache=nothing, viewer=viewer, links=links)


Asked = asyncio.Task[Sequence[Any]]


async def ask(
    lanes: Lanes,
    keys: str,
    *,
    loader: type[Upper] = Upper,
    arguments: Any = None,
    fields: str = "",
    viewer: Viewer = ANONYMOUS,
) -> Asked:
    """An operation that reads, begun."""
    made = loader.of_batch(reads(viewer), arguments, frozenset(fields))
    task = asyncio.create_task(lanes_load(lanes, made, list(keys)))
    await turns()
    return task


async def lanes_load(lanes: Lanes, loader: Upper, keys: list[str]) -> Sequence[Any]:
    """The answers in the order of the keys."""
    found = await lanes.load(loader, keys)
    return [found[key] for key in keys]


async def turns() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def go_on(number: int = -1) -> None:
    """The database answers a read."""
    Upper.gates[number].set()
    await turns()


async def all_of(*asked: Awaitable[Any]) -> list[Any]:
    """What each got; the database answers at once from here on."""

    async def answer() -> None:
        while True:
            for gate in Upper.gates:
                gate.set()
            await asyncio.sleep(0)

    answering = asyncio.create_task(answer())
    try:
        async with asyncio.timeout(5):
            found = await asyncio.gather(*asked, return_exceptions=True)
            await turns()
            return found
    finally:
        answering.cancel()


def is_idle(lanes: Lanes) -> bool:
    return lanes._lanes == {} and lanes._tasks == set()


async def test_reads_that_wait_go_as_one(lanes: Lanes) -> None:
    first = await ask(lanes, "a")
    others = [await ask(lanes, keys) for keys in ("ba", "c", "ab")]
    assert Upper.batches == [["a"]]
    await go_on()
    assert await first == ["A0"]
    assert Upper.batches == [["a"], ["b", "a", "c"]]
    await go_on()
    assert [await each for each in others] == [["B0", "A0"], ["C0"], ["A0", "B0"]]
    await turns()
    assert is_idle(lanes)
    assert len(Upper.batches) == 2


async def test_one_that_asks_alone_does_not_wait(lanes: Lanes) -> None:
    for _ in range(2):
        asked = await ask(lanes, "ab")
        await go_on()
        assert await asked == ["A0", "B0"]
        assert is_idle(lanes)
    assert Upper.batches == [["a", "b"], ["a", "b"]]


async def test_a_read_never_joins_one_that_began_before_it(lanes: Lanes) -> None:
    """Who has written reads what it wrote."""
    before = await ask(lanes, "a")
    Upper.store["a"] = 1
    after = await ask(lanes, "a")
    await go_on()
    assert await before == ["A0"]
    Upper.store["a"] = 2
    later = await ask(lanes, "a")  # the read of `after` is under way
    await go_on()
    assert await after == ["A1"]
    await go_on()
    assert await later == ["A2"]
    assert Upper.batches == [["a"], ["a"], ["a"]]


def person(*organizations: ObjectId, scopes: Sequence[Permission] = (Permission.READ,)) -> Viewer:
    user = {"_id": ObjectId()}
    return Viewer(user, dict.fromkeys(organizations, Role.VIEWER), frozenset(scopes))


async def test_only_equal_reads_go_together(lanes: Lanes) -> None:
    someone = person()
    kinds: list[dict[str, Any]] = [
        {},
        {"arguments": 1},
        {"arguments": "1"},
        {"fields": "xy"},
        {"fields": "x"},
        {"loader": ByRights},
        {"loader": ByRights, "viewer": someone},
        {"loader": ByRights, "viewer": person()},
    ]
    asked = [await ask(lanes, "a", **kind) for kind in kinds]
    assert len(Upper.batches) == len(kinds)
    asked += [await ask(lanes, "b", **kind) for kind in kinds]
    assert len(Upper.batches) == len(kinds)
    assert await all_of(*asked) == [["A0"]] * len(kinds) + [["B0"]] * len(kinds)
    assert Upper.batches == [["a"]] * len(kinds) + [["b"]] * len(kinds)
    assert is_idle(lanes)


async def test_people_with_equal_rights_read_together(lanes: Lanes) -> None:
    """Two tokens of one person are equal, as are two that may not read, and nobody."""
    acme, borg = ObjectId(), ObjectId()
    ada = person(acme, borg)
    again = Viewer(ada.user, {borg: Role.ADMIN, acme: Role.VIEWER}, ada.scopes)
    blind = [person(acme, scopes=()), person(scopes=()), ANONYMOUS]
    groups = [[ada, again], blind, [person(acme, borg)]]
    assert len({viewer.principals for group in groups for viewer in group}) == 3
    first = [await ask(lanes, "a", loader=ByRights, viewer=group[0]) for group in groups]
    others = [
        await ask(lanes, "b", loader=ByRights, viewer=viewer)
        for group in groups
        for viewer in group
    ]
    assert len(Upper.batches) == 3
    await all_of(*first, *others)
    assert Upper.batches == [["a"]] * 3 + [["b"]] * 3


async def test_what_is_anybodys_own_never_goes_together(lanes: Lanes) -> None:
    asked = [await ask(lanes, "a", loader=Alone) for _ in range(3)]
    assert Upper.batches == [["a"]] * 3
    assert is_idle(lanes)
    assert await all_of(*asked) == [["A0"]] * 3


async def test_a_key_that_fails_fails_only_who_asked_for_it(lanes: Lanes) -> None:
    asked = [await ask(lanes, keys) for keys in ("a", "b!", "c", "!")]
    first, second, third, fourth = await all_of(*asked)
    assert (first, third) == (["A0"], ["C0"])
    assert second[0] == "B0"
    assert isinstance(second[1], ValueError)
    assert isinstance(fourth[0], ValueError)
    assert Upper.batches == [["a"], ["b", "!", "c"]]


async def test_a_batch_that_raises_is_read_again_for_each(lanes: Lanes) -> None:
    Upper.bad["x"] = Forbidden("Not x.")
    asked = [await ask(lanes, keys) for keys in ("a", "b", "xc", "d")]
    assert await all_of(*asked) == [["A0"], ["B0"], Upper.bad["x"], ["D0"]]
    assert Upper.batches == [["a"], ["b", "x", "c", "d"], ["b"], ["x", "c"], ["d"]]
    assert is_idle(lanes)


async def test_one_alone_that_raises_is_not_read_again(lanes: Lanes) -> None:
    Upper.bad["x"] = RuntimeError("x")
    asked = [await ask(lanes, keys) for keys in ("x", "x")]
    assert await all_of(*asked) == [Upper.bad["x"], Upper.bad["x"]]
    assert Upper.batches == [["x"], ["x"]]


async def test_when_the_database_is_gone_all_fail_at_once(lanes: Lanes) -> None:
    Upper.bad["b"] = AutoReconnect("gone")
    asked = [await ask(lanes, keys) for keys in ("a", "b", "c", "d")]
    assert await all_of(*asked) == [["A0"], *[Upper.bad["b"]] * 3]
    assert Upper.batches == [["a"], ["b", "c", "d"]]
    assert is_idle(lanes)


async def test_a_database_that_is_too_slow_is_not_asked_again(lanes: Lanes) -> None:
    """Once for each of those who waited, and at the same time: just when it can bear it least."""
    Upper.bad["b"] = ExecutionTimeout("slow")
    asked = [await ask(lanes, keys) for keys in ("a", "b", "c", "d")]
    assert await all_of(*asked) == [["A0"], *[Upper.bad["b"]] * 3]
    assert Upper.batches == [["a"], ["b", "c", "d"]]


async def test_for_who_has_left_nothing_is_read_again(lanes: Lanes) -> None:
    Upper.bad["x"] = Forbidden("Not x.")
    first, gone, bad, other = [await ask(lanes, keys) for keys in ("a", "b", "x", "c")]
    await go_on()
    assert (await first, Upper.batches[-1]) == (["A0"], ["b", "x", "c"])
    gone.cancel()
    await all_of(bad, other)
    assert Upper.batches[2:] == [["x"], ["c"]]


async def test_who_leaves_while_waiting_harms_nobody(lanes: Lanes) -> None:
    asked = [await ask(lanes, keys) for keys in ("a", "b", "c")]
    asked[1].cancel()
    await turns()
    await go_on()
    assert Upper.batches == [["a"], ["c"]]  # what nobody waits for is not read
    first, second, third = await all_of(*asked)
    assert (first, third) == (["A0"], ["C0"])
    assert isinstance(second, asyncio.CancelledError)
    assert is_idle(lanes)


async def test_who_leaves_while_it_is_read_harms_nobody(lanes: Lanes) -> None:
    asked = [await ask(lanes, keys) for keys in ("a", "b", "c")]
    await go_on()
    assert Upper.batches == [["a"], ["b", "c"]]
    asked[1].cancel()
    await turns()
    assert await asked[0] == ["A0"]
    second, third = await all_of(asked[1], asked[2])
    assert isinstance(second, asyncio.CancelledError)
    assert third == ["C0"]
    assert is_idle(lanes)


async def test_who_leaves_while_it_reads_for_itself_lets_the_next_begin(lanes: Lanes) -> None:
    asked = [await ask(lanes, keys) for keys in ("a", "b", "c")]
    asked[0].cancel()
    await turns()
    assert Upper.batches == [["a"], ["b", "c"]]
    first, *others = await all_of(*asked)
    assert isinstance(first, asyncio.CancelledError)
    assert others == [["B0"], ["C0"]]
    assert is_idle(lanes)


async def test_a_lane_is_forgotten_when_nobody_is_left(lanes: Lanes) -> None:
    for leaver in range(3):
        asked = [await ask(lanes, "a", arguments=leaver) for _ in range(3)]
        for each in asked[leaver:]:
            each.cancel()
        await all_of(*asked)
        await turns()
        assert is_idle(lanes)


async def test_who_is_left_by_all_is_read_to_its_end(lanes: Lanes) -> None:
    """The time of a read is bounded by MongoDB; the lane goes on after it."""
    asked = [await ask(lanes, keys) for keys in ("a", "b", "c")]
    await go_on()
    for each in asked[1:]:
        each.cancel()
    late = await ask(lanes, "d")
    assert Upper.batches == [["a"], ["b", "c"]]
    await go_on()
    assert Upper.batches == [["a"], ["b", "c"], ["d"]]
    assert (await all_of(late))[0] == ["D0"]
    assert is_idle(lanes)


async def test_lanes_do_not_grow(lanes: Lanes) -> None:
    asked = [await ask(lanes, "a", arguments=number % 50) for number in range(200)]
    assert len(lanes._lanes) == 50
    assert await all_of(*asked) == [["A0"]] * 200
    assert is_idle(lanes)
    assert len(Upper.batches) == 100


async def test_a_batch_holds_no_more_keys_than_its_loader_takes(lanes: Lanes) -> None:
    """Five here. One that asks for more goes alone, and whole."""
    asked = [
        await ask(lanes, keys) for keys in ("a", "bc", "de", "fg", "abcdefg", "h", "ijkl", "m")
    ]
    assert await all_of(*asked) == [
        [f"{letter.upper()}0" for letter in keys]
        for keys in ("a", "bc", "de", "fg", "abcdefg", "h", "ijkl", "m")
    ]
    assert ["".join(batch) for batch in Upper.batches] == [
        "a",
        "bcde",
        "fg",
        "abcdefg",
        "hijkl",
        "m",
    ]
    assert is_idle(lanes)


async def counting(lanes: Lanes, keys: str) -> tuple[Asked, CommandCount]:
    count = CommandCount()
    token = counted.set(count)
    try:
        return await ask(lanes, keys), count
    finally:
        counted.reset(token)


async def test_commands_count_for_each_that_waited_for_them(lanes: Lanes) -> None:
    first, first_count = await counting(lanes, "a")
    second, second_count = await counting(lanes, "b")
    third, third_count = await counting(lanes, "c")
    uncounted = await ask(lanes, "d")
    await all_of(first, second, third, uncounted)
    assert first_count == CommandCount(["find a"], 7, 1)
    assert second_count == third_count == CommandCount(["find bcd"], 7, 1)
    assert counted.get() is None


async def test_a_shared_batch_counts_once_for_an_operation_that_waits_twice(lanes: Lanes) -> None:
    count = CommandCount()
    token = counted.set(count)
    asked = [await ask(lanes, keys) for keys in ("a", "b", "c")]
    counted.reset(token)
    await all_of(*asked)
    assert count == CommandCount(["find a", "find bc"], 14, 2)


async def test_commands_of_a_batch_that_is_read_again_count_where_they_belong(
    lanes: Lanes,
) -> None:
    Upper.bad["x"] = Forbidden("Not x.")
    begun = [await counting(lanes, keys) for keys in ("a", "b", "x")]
    await all_of(*[asked for asked, _ in begun])
    assert [sorted(count.names) for _, count in begun] == [
        ["find a"],
        ["find b", "find bx"],
        ["find bx", "find x"],
    ]


async def test_more_may_be_under_way_where_that_is_wanted() -> None:
    lanes = Lanes(under_way=2)
    asked = [await ask(lanes, key) for key in "abcd"]
    assert Upper.batches == [["a"], ["b"]]
    assert await all_of(*asked) == [["A0"], ["B0"], ["C0"], ["D0"]]
    assert Upper.batches == [["a"], ["b"], ["c", "d"]]
    assert is_idle(lanes)


# ---- the loaders of the project


async def test_a_shared_read_knows_nothing_from_before(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one operation has read already is not what another reads together with it.

    Both look for models by contents, which is looked up first, and known to the one that came early.
    """
    acme = await insert_actor("acme")
    await insert_version(database, await insert_model(acme, "old"), {"a": 7})
    ask = replace(ask, lanes=Lanes())

    def page(first: int) -> str:
        return f'models(first: {first}, filter: {{fileSha256: "{7:064x}"}}) {{ nodes {{ name }} }}'

    one = ModelPageLoader.one
    release, waiting = asyncio.Event(), asyncio.Event()

    async def held(self: ModelPageLoader, query: Row) -> list[Row]:
        found = await one(self, query)
        if self.arguments.limit == 6 and not waiting.is_set():
            waiting.set()
            await release.wait()
        return found

    monkeypatch.setattr(ModelPageLoader, "one", held)
    six = f"{{ {page(6)} }}"
    first = asyncio.create_task(ask(six))
    await waiting.wait()
    early = asyncio.create_task(ask(f"{{ five: {page(5)} six: {page(6)} }}"))
    await asyncio.sleep(0.1)  # it knows who holds the contents, for `five`, and waits for `six`
    await insert_version(database, await insert_model(acme, "new"), {"a": 7})
    late = asyncio.create_task(ask(six))
    await asyncio.sleep(0.05)
    release.set()
    answers = [await first, await early, await late]
    assert [answer.fallback for answer in answers] == [None] * 3
    names = sorted(node["name"] for node in answers[2].data["models"]["nodes"])
    assert names == ["new", "old"]


def test_every_loader_says_with_whom_it_shares() -> None:
    """What looks at who asks in other ways than `principals` is shared with nobody."""

    def below(kind: type[Any]) -> set[type[Any]]:
        kinds: list[type[Any]] = kind.__subclasses__()
        return {kind}.union(*[below(each) for each in kinds])

    ours = {each for each in below(Loader) if each.__module__.startswith("modelharbor.")}
    alone = {each.__name__ for each in ours if each.sharing is Sharing.NEVER}
    assert alone == {
        "CacheStatsLoader",
        "ComparisonLoader",
        "DownloadLinkLoader",
        "ExportLinkLoader",
        "FilesByContentsLoader",
        "HoldersByContentsLoader",
        "LikedByModelLoader",
        "Loader",
        "MembersByOrganizationLoader",
        "MembershipByIdLoader",
        "NodeLoader",
        "NodesLoader",
        "OrganizationsByUserLoader",
        "OthersByContentsLoader",
        "PageLoader",
        "RateLimitLoader",
        "RowByIdLoader",
        "StorageByLoginLoader",
        "StorageByOwnerLoader",
        "TensorComparisonLoader",
        "TokenByIdLoader",
        "TokensByUserLoader",
        "UploadUrlLoader",
        "VersionByReferenceLoader",
        "ViewerLoader",
    }


# ---- end to end

PAGE = """
query Page($first: Int!) { models(first: $first, orderBy: {field: NAME, direction: ASC}) {
  nodes { fullName owner { login } latestVersion { number files(first: 2) { nodes { path } } } } } }
"""
COMMANDS = 4  # of one page


@pytest.fixture
async def page_of_ten(database: Database) -> None:
    for index in range(10):
        owner = await insert_actor(f"owner{index}")
        model = await insert_model(owner, f"m{index}")
        await insert_version(database, model, {"a": 1, "b": 2, "c": 3})


async def sent(database: Database) -> int:
    """Reads that the server has seen."""
    status = await database.client.admin.command("serverStatus")
    commands = status["metrics"]["commands"]
    return int(commands["find"]["total"] + commands["aggregate"]["total"])


@pytest.mark.parametrize("coalescing", [True, False])
async def test_a_hundred_pages_at_once(
    database: Database, settings: Settings, page_of_ten: None, coalescing: bool
) -> None:
    changed = {"coalescing": coalescing, "max_running_operations": 100}
    async with serving(settings.model_copy(update=changed), None) as server:
        alone = {
            first: (await server.ask(PAGE, variables={"first": first})).content
            for first in range(1, 11)
        }
        before = await sent(database)
        asked = [(number % 10) + 1 for number in range(100)]
        answers = await asyncio.gather(
            *[server.ask(PAGE, variables={"first": first}) for first in asked]
        )
        commands = await sent(database) - before
    for first, answer in zip(asked, answers, strict=True):
        assert answer.content == alone[first]
        found = orjson.loads(answer.content)
        assert "errors" not in found
        assert len(found["data"]["models"]["nodes"]) == first
    if coalescing:
        assert commands <= 100 * COMMANDS // 3
    else:
        assert commands == 100 * COMMANDS


async def test_without_the_setting_there_are_no_lanes(settings: Settings) -> None:
    for coalescing in (True, False):
        app = create_app(settings.model_copy(update={"coalescing": coalescing}))
        async with app.router.lifespan_context(app) as state:
            assert state is not None
            assert isinstance(state["lanes"], Lanes) is coalescing
            assert coalescing or state["lanes"] is None


async def bearer(user: ActorDocument) -> dict[str, str]:
    secret = make_secret()
    token = TokenDocument(
        user_id=user.id,
        name="test",
        prefix="mh_",
        secret_sha256=secret_hash(secret),
        scopes=[Permission.READ, Permission.DOWNLOAD],
    )
    await token.insert()
    return {"authorization": f"Bearer {token_text(token.id, secret)}"}


@pytest.fixture
async def server(settings: Settings) -> AsyncIterator[Server]:
    roomy = settings.model_copy(update={"max_running_operations": 100})
    async with serving(roomy, None) as server:
        yield server


MINE = """
{ viewer { login } models(orderBy: {field: NAME, direction: ASC}) { totalCount nodes { name viewerCan viewerHasLiked owner { login } } }
  search(query: "whale") { totalCount } suggest(prefix: "m-") model(owner: "acme", name: "m-acme") { name }
  of: model(owner: "ada", name: "m-ada") { latestVersion { files { nodes { downloadUrl } } } } }
"""


async def test_each_sees_only_what_it_may(database: Database, server: Server) -> None:
    acme, ada, eve = [await insert_actor(login) for login in ("acme", "ada", "eve")]
    await MembershipDocument(organization_id=acme.id, user_id=eve.id, role=Role.VIEWER).insert()
    for owner in (acme, ada, eve):
        model = await insert_model(
            owner, f"m-{owner.login}", visibility=Visibility.PRIVATE, summary="whale"
        )
        await insert_version(database, model, {"a": 1})
    await insert_model(acme, "m-open", summary="whale")
    headers = {"ada": await bearer(ada), "eve": await bearer(eve), "nobody": {}}
    seen = {
        "ada": ["m-ada", "m-open"],
        "eve": ["m-acme", "m-eve", "m-open"],
        "nobody": ["m-open"],
    }
    who = [name for _ in range(20) for name in headers]
    answers = await asyncio.gather(*[server.ask(MINE, headers[name]) for name in who])
    for name, answer in zip(who, answers, strict=True):
        found = answer.json()
        assert "errors" not in found
        data = found["data"]
        assert data["viewer"] == (None if name == "nobody" else {"login": name})
        assert [node["name"] for node in data["models"]["nodes"]] == seen[name]
        assert data["models"]["totalCount"] == data["search"]["totalCount"] == len(seen[name])
        assert [text.split("/")[1] for text in data["suggest"]] == seen[name]
        assert data["model"] == ({"name": "m-acme"} if name == "eve" else None)
        own = data["of"]
        assert (own is not None) is (name == "ada")
        if own is not None:
            [file] = own["latestVersion"]["files"]["nodes"]
            assert file["downloadUrl"].startswith("http://localhost/files/")


async def test_who_has_changed_something_reads_it_amid_others(
    ask: Asker, database: Database
) -> None:
    """While forty others read the same model over and over."""
    acme = await insert_actor("acme")
    await insert_model(acme, "m", summary="0")
    ask = replace(ask, lanes=Lanes())
    document = '{ model(owner: "acme", name: "m") { summary } }'
    writing = True

    async def read() -> None:
        while writing:
            answer = await ask(document)
            assert answer.errors == []

    others = [asyncio.create_task(read()) for _ in range(40)]
    try:
        for number in range(30):
            await database.data["models"].update_one({}, {"$set": {"summary": str(number)}})
            answer = await ask(document, viewer_of(acme) if number % 2 else ANONYMOUS)
            assert answer.data == {"model": {"summary": str(number)}}
    finally:
        writing = False
        await asyncio.gather(*others)
