"""Events of models, and live lists: what is told, and to whom."""

from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.keyset import Window
from modelharbor.db.models import ModelDocument, Visibility
from modelharbor.errors import NotFound, Refused
from modelharbor.events.changes import Change
from modelharbor.observability.commands import counted
from modelharbor.resolvers.aliases import delete_alias, set_alias
from modelharbor.resolvers.grants import grant_role
from modelharbor.resolvers.likes import like_model, unlike_model
from modelharbor.resolvers.models import (
    archive_model,
    create_model,
    delete_model,
    restore_model,
    update_model,
)
from modelharbor.resolvers.versions import create_version, delete_version, update_version
from modelharbor.schema.filters import ModelFilter, StringFilter, StringListFilter
from modelharbor.schema.orders import ModelOrder, ModelOrderField, OrderDirection
from modelharbor.schema.query import models_window
from modelharbor.schema.subscription import ModelEventKind, changed_fields
from modelharbor.settings import Settings
from modelharbor.streams.base import Happening
from modelharbor.streams.models import ModelEvents, ModelsChanged
from tests.documents import insert_actor, insert_model, insert_version, viewer_of
from tests.explaining import Captured, explained

from .watching import Watched, Watching, event, place

pytestmark = pytest.mark.anyio


def kinds(happenings: list[Happening]) -> list[str]:
    return [each.row["kind"] for each in happenings]


async def test_what_happens_to_a_model(watch: Watching, settings: Settings) -> None:
    database = watch.database
    alice = viewer_of(await insert_actor("alice"))
    watched = await watch.watch(ModelEvents(), alice)
    model = await create_model(database, alice, settings, owner="alice", name="m")
    one: dict[str, Any] = {"model_id": model["_id"]}
    await update_model(
        database, alice, settings, **one, display_name="M", add_tags=["a"], card_markdown="# M"
    )
    version = await create_version(database, alice, settings, **one)
    await update_version(database, alice, version_id=version["_id"], label="v1")
    await delete_version(database, alice, version_id=version["_id"])
    document = await insert_model_version(database, model)
    await set_alias(database, alice, **one, name="prod", version_id=document, protected=True)
    await set_alias(database, alice, **one, name="prod", version_id=document, protected=False)
    await delete_alias(database, alice, **one, name="prod")
    await like_model(database, alice, **one)  # no event
    await archive_model(database, alice, **one)
    await restore_model(database, alice, **one)
    await delete_model(database, alice, **one)
    found = await watched.happenings()
    assert [
        (each.row["kind"], changed_fields(each.row["before"], each.row["after"])) for each in found
    ] == [
        ("MODEL_CREATED", ["name", "owner", "state", "visibility"]),
        ("MODEL_UPDATED", ["card", "displayName", "tags"]),
        ("VERSION_CREATED", ["number", "status"]),
        ("VERSION_UPDATED", ["label"]),
        ("VERSION_DELETED", ["status"]),
        ("ALIAS_SET", ["name", "protected", "version"]),
        ("ALIAS_SET", ["protected"]),
        ("ALIAS_DELETED", ["name", "protected", "version"]),
        ("MODEL_ARCHIVED", ["state"]),
        ("MODEL_RESTORED", ["state"]),
        ("MODEL_DELETED", ["state"]),
    ]
    assert [each.position for each in found] == sorted({each.position for each in found})
    assert {each.row["model_id"] for each in found} == {model["_id"]}
    assert {each.row["actor_id"] for each in found} == {alice.user_id}
    logged = await watch.logged(watched.source.query or {})
    replayed = await watched.source.of_events(watch.reads(alice), logged)
    assert [each.row["_id"] for each in replayed] == [each.row["_id"] for each in found]


async def insert_model_version(database: Database, model: Row) -> ObjectId:
    """A published one."""

    document = await ModelDocument.get(model["_id"])
    assert document is not None
    return (await insert_version(database, document, {"a": 1})).id


async def test_who_is_told(watch: Watching, settings: Settings) -> None:
    """Who could see the model then, and can now or could until it was deleted."""
    database = watch.database
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    names = ("alice", "member", "guest", "stranger")
    alice, member, guest, stranger = [await insert_actor(name) for name in names]
    owner = viewer_of(alice, {acme.id: Role.ADMIN})
    viewers = {
        "owner": owner,
        "member": viewer_of(member, {acme.id: Role.VIEWER}),
        "guest": viewer_of(guest),
        "stranger": viewer_of(stranger),
        "nobody": ANONYMOUS,
    }
    watched = {name: await watch.watch(ModelEvents(), viewer) for name, viewer in viewers.items()}

    async def told() -> dict[str, list[str]]:
        found = {name: kinds(await each.happenings()) for name, each in watched.items()}
        return {name: each for name, each in found.items() if each}

    model = await create_model(database, owner, settings, owner="acme", name="m")
    one: dict[str, Any] = {"model_id": model["_id"]}
    assert await told() == {"owner": ["MODEL_CREATED"], "member": ["MODEL_CREATED"]}
    await grant_role(
        database,
        owner,
        subject="Model",
        subject_id=model["_id"],
        actor_id=guest.id,
        role=Role.VIEWER,
    )
    assert await told() == {}  # who may do what is not told here
    await update_model(database, owner, settings, **one, summary="1")
    three = ("owner", "member", "guest")
    assert await told() == {name: ["MODEL_UPDATED"] for name in three}
    await update_model(database, owner, settings, **one, visibility=Visibility.PUBLIC)
    assert await told() == {name: ["MODEL_UPDATED"] for name in viewers}
    # What was seen by all when it happened is not told once it is private.
    await update_model(database, owner, settings, **one, summary="2")
    await update_model(database, owner, settings, **one, visibility=Visibility.PRIVATE)
    assert await told() == {name: ["MODEL_UPDATED"] * 2 for name in three}
    await delete_model(database, owner, **one)
    assert await told() == {name: ["MODEL_DELETED"] for name in three}
    await restore_model(database, owner, **one)
    assert await told() == {name: ["MODEL_RESTORED"] for name in three}


async def test_who_is_told_of_what_is_gone(watch: Watching, settings: Settings) -> None:
    """Who could see the model when it was deleted, for the last time: not who could before."""
    database = watch.database
    alice = viewer_of(await insert_actor("alice"))
    bob = await insert_actor("bob")
    guest = viewer_of(bob)
    made = {"owner": "alice", "visibility": Visibility.PUBLIC}
    names = ("hidden", "granted", "shown", "twice", "back", "removed")
    ids: dict[str, ObjectId] = {}
    for name in names:
        row = await create_model(database, alice, settings, name=name, **made)  # type: ignore[arg-type]  # one of many keywords
        ids[name] = row["_id"]

    async def show(name: str, visibility: Visibility) -> None:
        await update_model(database, alice, settings, model_id=ids[name], visibility=visibility)

    for name in ("hidden", "granted", "removed"):
        await show(name, Visibility.PRIVATE)
    await grant_role(
        database,
        alice,
        subject="Model",
        subject_id=ids["granted"],
        actor_id=bob.id,
        role=Role.VIEWER,
    )
    for name in names:
        await delete_model(database, alice, model_id=ids[name])
    for name in ("twice", "back"):
        await restore_model(database, alice, model_id=ids[name])
        await show(name, Visibility.PRIVATE)
    await delete_model(database, alice, model_id=ids["twice"])
    # Gone for good, and so is the word of its deletion.
    await database.data["models"].delete_one({"_id": ids["removed"]})
    await database.data["events"].delete_one({"model_id": ids["removed"], "kind": "MODEL_DELETED"})

    expected = {
        "alice": ["back", "granted", "hidden", "shown", "twice"],
        "guest": ["granted", "shown"],
        "nobody": ["shown"],
    }
    viewers = {"alice": alice, "guest": guest, "nobody": ANONYMOUS}
    logged = await watch.logged(ModelEvents().query)
    titles = {model_id: name for name, model_id in ids.items()}

    async def check() -> None:
        for title, viewer in viewers.items():
            reads = watch.reads(viewer)
            told = await ModelEvents().of_events(reads, logged)
            assert sorted({titles[each.row["model_id"]] for each in told}) == expected[title]
            for name, model_id in ids.items():
                source = ModelEvents(model_ids=(model_id, ids["shown"]))
                if name in expected[title]:
                    await source.check(reads)
                else:
                    with pytest.raises(NotFound):
                        await source.check(reads)

    await check()
    # By the order of commits where it is known, whatever the ids say; what has no place is the latest.
    events = database.data["events"]
    deletions = await events.find({"model_id": ids["twice"], "kind": "MODEL_DELETED"}).to_list()
    first, second = sorted(deletions, key=lambda row: ObjectId(row["_id"]))
    await events.delete_many({"_id": {"$in": [first["_id"], second["_id"]]}})
    earlier, later = ObjectId(), ObjectId()
    await events.insert_many(
        [
            {**second, "_id": earlier, "position": "2" * 24},
            {**first, "_id": later, "position": "1" * 24},
        ]
    )
    await check()
    await events.update_one({"_id": earlier}, {"$set": {"position": None}})
    await check()


async def test_who_saw_what_is_gone_is_read_at_once_and_from_the_end(watch: Watching) -> None:
    """In one command for all, which reads no more of a long history than its end."""
    database = watch.database
    ids = [ObjectId() for _ in range(20)]
    rows = [
        {
            "_id": ObjectId(),
            "stream": "models",
            "kind": "MODEL_UPDATED" if number < 49 else "MODEL_DELETED",
            "about": [model_id],
            "principals": ["public"],
            "model_id": model_id,
            "position": place(number + 1),
        }
        for number in range(50)
        for model_id in ids
    ]
    await database.data["events"].insert_many(rows)
    others = [
        {"kind": "MODEL_DELETED", "about": [ObjectId()], "position": None} for _ in range(300)
    ]
    await database.data["events"].insert_many(others)
    changes = [event(row, number) for number, row in enumerate(rows, 1)]
    captured = Captured()
    token = counted.set(captured)
    try:
        told = await ModelEvents().of_events(watch.reads(ANONYMOUS), changes)
    finally:
        counted.reset(token)
    assert len(told) == 1000
    [_, command] = [command for _, command in captured.commands]
    assert "$documents" in command["pipeline"][0]
    stages = await explained(database, command)
    looked = [stage for stage in stages if "$lookup" in stage]
    assert [stage["indexesUsed"] for stage in looked] == [["about"], ["about"]]
    assert [int(stage["totalDocsExamined"]) for stage in looked] == [20, 0]


async def test_only_those_that_are_asked_for(watch: Watching, settings: Settings) -> None:
    database = watch.database
    alice, bob = [viewer_of(await insert_actor(name)) for name in ("alice", "bob")]
    made = {"visibility": Visibility.PUBLIC}
    first = await create_model(database, alice, settings, owner="alice", name="first", **made)  # type: ignore[arg-type]  # one of many keywords
    second = await create_model(database, alice, settings, owner="alice", name="second", **made)  # type: ignore[arg-type]  # the same
    theirs = await create_model(database, bob, settings, owner="bob", name="theirs", **made)  # type: ignore[arg-type]  # the same
    sources = {
        "one": ModelEvents(model_ids=(first["_id"],)),
        "two": ModelEvents(model_ids=(first["_id"], theirs["_id"])),
        "owner": ModelEvents(owner="alice"),
        "kinds": ModelEvents(kinds=frozenset({"MODEL_ARCHIVED", "MODEL_DELETED"})),
        "all": ModelEvents(
            model_ids=(first["_id"], theirs["_id"]),
            owner="bob",
            kinds=frozenset({"MODEL_ARCHIVED"}),
        ),
    }
    assert len({source.stream for source in sources.values()}) == len(sources)
    watched = {name: await watch.watch(source, alice) for name, source in sources.items()}
    names = {first["_id"]: "first", second["_id"]: "second", theirs["_id"]: "theirs"}
    for viewer, model in ((alice, first), (alice, second), (bob, theirs)):
        await update_model(database, viewer, settings, model_id=model["_id"], summary="x")
        await archive_model(database, viewer, model_id=model["_id"])
    expected = {
        "one": ["first MODEL_UPDATED", "first MODEL_ARCHIVED"],
        "two": [
            "first MODEL_UPDATED",
            "first MODEL_ARCHIVED",
            "theirs MODEL_UPDATED",
            "theirs MODEL_ARCHIVED",
        ],
        "owner": [
            "first MODEL_UPDATED",
            "first MODEL_ARCHIVED",
            "second MODEL_UPDATED",
            "second MODEL_ARCHIVED",
        ],
        "kinds": ["first MODEL_ARCHIVED", "second MODEL_ARCHIVED", "theirs MODEL_ARCHIVED"],
        "all": ["theirs MODEL_ARCHIVED"],
    }

    def shown(happenings: list[Happening]) -> list[str]:
        return [f"{names[each.row['model_id']]} {each.row['kind']}" for each in happenings]

    for name, each in watched.items():
        live = shown(await each.happenings())
        assert live == expected[name], name
        logged = await watch.logged(each.source.query or {})
        replayed = shown(await each.source.of_events(watch.reads(alice), logged))
        assert [one for one in replayed if "CREATED" not in one] == live, name


async def test_what_may_not_be_watched(watch: Watching, settings: Settings) -> None:
    database = watch.database
    alice, bob = [viewer_of(await insert_actor(name)) for name in ("alice", "bob")]
    model = await create_model(database, alice, settings, owner="alice", name="m")
    mine = ModelEvents(model_ids=(model["_id"],))
    await mine.check(watch.reads(alice))
    for source in (mine, ModelEvents(model_ids=(ObjectId(),)), ModelEvents(owner="none")):
        with pytest.raises(NotFound):
            await source.check(watch.reads(bob))
    await ModelEvents(owner="alice").check(watch.reads(bob))
    # Who could see it until it was deleted still has to be told of that.
    await delete_model(database, alice, model_id=model["_id"])
    await mine.check(watch.reads(alice))
    with pytest.raises(NotFound):
        await mine.check(watch.reads(bob))
    assert await ModelEvents(owner="none").of_events(watch.reads(bob), await watch.logged({})) == []


def test_every_kind_is_told_but_roles() -> None:

    shown = {str(kind.value) for kind in ModelEventKind}
    assert shown == {kind.value for kind in EventKind} - {"ROLE_GRANTED"}


# Live lists --------------------------------------------------------------------------------------


@dataclass
class Client:
    """Does what the description of QueryResultChange says, and nothing else."""

    rows: dict[ObjectId, Row] = field(default_factory=dict)
    cursors: dict[ObjectId, str] = field(default_factory=dict)
    happenings: int = 0

    def apply(self, change: Row) -> None:
        self.happenings += 1
        for each in change["removed"]:
            del self.rows[each], self.cursors[each]
        for edge in change["added"]:
            assert edge["node"]["_id"] not in self.rows
            self.rows[edge["node"]["_id"]] = edge["node"]
            self.cursors[edge["node"]["_id"]] = edge["cursor"]
        for row in change["updated"]:
            assert self.rows[row["_id"]] != row
            self.rows[row["_id"]] = row
        assert set(self.rows) == set(change["order"])
        self.rows = {each: self.rows[each] for each in change["order"]}


async def rerun(watch: Watching, window: Window, viewer: Viewer) -> list[Row]:
    follower = ModelsChanged(window).follow()
    page = await follower.page(watch.reads(viewer))
    rows: list[Row] = page["nodes"]
    return rows


def changes_of(row: Row, names: dict[ObjectId, str]) -> dict[str, list[str]]:
    return {
        "added": [names[edge["node"]["_id"]] for edge in row["added"]],
        "updated": [names[each["_id"]] for each in row["updated"]],
        "removed": [names[each] for each in row["removed"]],
        "order": [names[each] for each in row["order"]],
    }


async def test_a_list_step_by_step(watch: Watching, settings: Settings) -> None:
    database = watch.database
    alice = viewer_of(await insert_actor("alice"))
    models, names = {}, {}

    async def make(name: str) -> None:
        row = await create_model(
            database, alice, settings, owner="alice", name=name, visibility=Visibility.PUBLIC
        )
        models[name], names[row["_id"]] = row["_id"], name

    order = ModelOrder(field=ModelOrderField.NAME, direction=OrderDirection.ASC)
    window = models_window(first=2, order_by=order)
    for name in ("b", "d"):
        await make(name)
    watched = await watch.watch(ModelsChanged(window), ANONYMOUS)
    standing = watched.follower.standing()
    assert standing is not None
    assert standing is watched.follower.standing()
    assert changes_of(standing.row, names) == {
        "added": ["b", "d"],
        "updated": [],
        "removed": [],
        "order": ["b", "d"],
    }

    async def step() -> dict[str, list[str]] | None:
        found = await watched.rows()
        assert len(found) <= 1
        return changes_of(found[0], names) if found else None

    assert await step() is None
    await make("c")
    assert await step() == {
        "added": ["c"],
        "updated": [],
        "removed": ["d"],
        "order": ["b", "c"],
    }
    await make("e")  # behind the end
    await update_model(database, alice, settings, model_id=models["d"], summary="x")
    assert await step() is None
    await update_model(database, alice, settings, model_id=models["c"], summary="x")
    assert await step() == {
        "added": [],
        "updated": ["c"],
        "removed": [],
        "order": ["b", "c"],
    }
    await update_model(
        database, alice, settings, model_id=models["b"], visibility=Visibility.PRIVATE
    )
    assert await step() == {
        "added": ["d"],
        "updated": [],
        "removed": ["b"],
        "order": ["c", "d"],
    }
    await archive_model(database, alice, model_id=models["c"])
    await delete_model(database, alice, model_id=models["d"])
    assert await step() == {
        "added": ["e"],
        "updated": [],
        "removed": ["c", "d"],
        "order": ["e"],
    }
    now = watched.follower.standing()
    assert now is not None
    assert now is not standing
    assert changes_of(now.row, names) == {
        "added": ["e"],
        "updated": [],
        "removed": [],
        "order": ["e"],
    }


async def test_what_moved_is_taken_away_and_put_in(watch: Watching) -> None:
    alice = await insert_actor("alice")
    names: dict[ObjectId, str] = {}
    for name, downloads in (("low", 1), ("high", 9)):
        model = await insert_model(alice, name, stats={"downloads_30d": downloads})
        names[model.id] = name
    low = next(iter(names))
    window = models_window(order_by=ModelOrder(field=ModelOrderField.DOWNLOADS_30D))
    watched = await watch.watch(ModelsChanged(window), ANONYMOUS)
    await watch.database.data["models"].update_one(
        {"_id": low}, {"$set": {"stats.downloads_30d": 5}}
    )
    moved = {"added": ["low"], "updated": [], "removed": ["low"], "order": ["high", "low"]}
    assert [changes_of(row, names) for row in await watched.rows()] == [moved]
    await watch.database.data["models"].update_one(
        {"_id": low}, {"$set": {"stats.downloads_30d": 50}}
    )
    [row] = await watched.rows()
    assert changes_of(row, names) == {**moved, "order": ["low", "high"]}


WINDOWS = {
    "trending": models_window(first=4),
    "by name": models_window(
        first=5, order_by=ModelOrder(field=ModelOrderField.NAME, direction=OrderDirection.ASC)
    ),
    "by likes": models_window(first=3, order_by=ModelOrder(field=ModelOrderField.LIKES)),
    "by time": models_window(first=100, order_by=ModelOrder(field=ModelOrderField.UPDATED_AT)),
    "tagged": models_window(
        first=4,
        filter=ModelFilter(
            or_=[
                ModelFilter(tags=StringListFilter(has_any=["red"])),
                ModelFilter(name=StringFilter(prefix="m1")),
            ]
        ),
    ),
    "searched": models_window(first=3, search="whale"),
}


@pytest.mark.parametrize("seed", range(2))
async def test_who_applies_the_changes_has_what_the_query_gives(
    watch: Watching, settings: Settings, seed: int
) -> None:
    """Whatever several people do: after each time that all has been handed over."""
    random, database = Random(f"live {seed}"), watch.database
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    people = [await insert_actor(name) for name in ("alice", "bob", "cyd")]
    alice, bob, cyd = people
    viewers = {
        "alice": viewer_of(alice, {acme.id: Role.ADMIN}),
        "bob": viewer_of(bob, {acme.id: Role.MAINTAINER}),
        "cyd": viewer_of(cyd),
        "nobody": ANONYMOUS,
    }
    doers = [viewers["alice"], viewers["alice"], viewers["bob"], viewers["cyd"]]
    models: list[ObjectId] = []

    async def do() -> None:
        by = random.choice(doers)
        what = random.choice(
            ("create", "update", "update", "like", "unlike", "archive", "restore", "delete", "show", "tag", "grant")
        )  # fmt: skip
        if what == "create" or not models:
            row = await create_model(
                database,
                by,
                settings,
                owner="acme"
                if by is not viewers["cyd"] and random.random() < 0.6
                else by.user["login"],  # type: ignore[index]  # somebody
                name=f"m{len(models)}",
                summary=random.choice(("whale", "a blue whale", None)),
                tags=random.sample(("red", "blue"), random.randrange(3)),
                visibility=random.choice(list(Visibility)),
            )
            models.append(row["_id"])
            return
        one: dict[str, Any] = {"model_id": random.choice(models)}
        match what:
            case "update":
                summary = random.choice(("whale", "whale of a whale", "fish", None))
                await update_model(database, by, settings, **one, summary=summary)
            case "tag":
                await update_model(
                    database,
                    by,
                    settings,
                    **one,
                    add_tags=random.choice((["red"], [])),
                    remove_tags=random.choice((["blue"], ["red"], [])),
                )
            case "show":
                shown = random.choice(list(Visibility))
                await update_model(database, by, settings, **one, visibility=shown)
            case "like":
                await like_model(database, by, **one)
            case "unlike":
                await unlike_model(database, by, **one)
            case "archive":
                await archive_model(database, by, **one)
            case "restore":
                await restore_model(database, by, **one)
            case "delete":
                await delete_model(database, by, **one)
            case "grant":
                await grant_role(
                    database,
                    by,
                    subject="Model",
                    subject_id=one["model_id"],
                    actor_id=random.choice(people).id,
                    role=random.choice((Role.VIEWER, None)),
                )

    async def several(most: int) -> int:
        done = 0
        for _ in range(random.randrange(1, most)):
            try:
                await do()
                done += 1
            except Refused:
                continue
        return done

    await several(12)
    watched: dict[tuple[str, str], tuple[Watched, Client]] = {}
    for title, window in WINDOWS.items():
        for name, viewer in viewers.items():
            each = await watch.watch(ModelsChanged(window), viewer)
            client, standing = Client(), each.follower.standing()
            assert standing is not None
            client.apply(standing.row)
            watched[title, name] = each, client
    done = told = 0
    for _ in range(60):
        done += await several(5)
        await watch.settle()
        for (title, name), (each, client) in watched.items():
            changes: list[Change] = each.changes
            each.changes = []
            if changes:
                found = await each.follower.happenings(watch.reads(each.viewer), changes)
                for happening in found:
                    client.apply(happening.row)
                told += len(found)
            expected = await rerun(watch, WINDOWS[title], each.viewer)
            assert list(client.rows.values()) == expected, (title, name)
            cursor = WINDOWS[title].cursor
            assert [client.cursors[row["_id"]] for row in expected] == list(map(cursor, expected))
    assert done >= 40
    assert told >= 200
