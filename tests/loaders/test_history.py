"""What the names of models pointed at on some day: as a replay of all changes says, by both engines."""

import asyncio
import os
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db import history
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventDocument, EventKind
from modelharbor.db.files import BlobDocument
from modelharbor.db.history import fill_pointed
from modelharbor.db.migrations import keep_history
from modelharbor.db.models import AliasEntry, ModelDocument, Visibility
from modelharbor.errors import Refused
from modelharbor.resolvers.aliases import delete_alias, set_alias
from modelharbor.resolvers.models import delete_model, update_model
from modelharbor.resolvers.versions import (
    archive_version,
    create_version,
    delete_version,
    publish_version,
    release_version,
)
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.asking import Asker
from tests.documents import START, insert_actor, insert_model, insert_version, viewer_of
from tests.explaining import Captured, keys_examined
from tests.resolvers.test_versions import add_files, inspection

pytestmark = pytest.mark.anyio
NAMES = ("production", "staging", "beta", "latest-tested")
SEEDS = range(100 if os.environ.get("FAULTS") == "long" else 3)
STEPS = 30
HARMFUL = 666
"""The length of contents that are not harmless."""
THEN = """query Then($at: DateTime!) { model(owner: "ann", name: "m") {
  aliases(asOf: $at) { name protected setAt version { number } }
  latest: version(asOf: $at) { number }
  named: version(alias: "production", asOf: $at) { number }
  first: version(number: 1, asOf: $at) { number }
  third: version(number: 3, asOf: $at) { number } }
  resolve(ref: "ann/m", asOf: $at) { number }
  by_name: resolve(ref: "ann/m@production", asOf: $at) { number }
  same: resolve(ref: "ann/m@latest", asOf: $at) { number }
  by_number: resolve(ref: "ann/m:3", asOf: $at) { number } }"""


@dataclass
class World:
    """The model as a client would keep book of it: by what its changes answered, nothing else."""

    numbers: dict[ObjectId, int] = field(default_factory=dict)
    status: dict[ObjectId, str] = field(default_factory=dict)
    aliases: dict[str, tuple[ObjectId, bool]] = field(default_factory=dict)

    def of(self, *states: str) -> list[ObjectId]:
        return [each for each, status in self.status.items() if status in states]

    def expected(self, now: "World") -> Any:
        """What is answered of this state when `now` is the state of today."""
        gone = set(now.of("DELETED"))

        def one(found: ObjectId | None) -> Any:
            return None if found is None or found in gone else {"number": self.numbers[found]}

        ready = self.of("READY")
        latest = one(max(ready, key=self.numbers.__getitem__) if ready else None)
        production = one(self.aliases.get("production", (None, False))[0])
        by_number = {number: one(each) for each, number in self.numbers.items()}
        return {
            "aliases": [
                {"name": name, "protected": protected, "version": one(version_id)}
                for name, (version_id, protected) in sorted(self.aliases.items())
                if version_id not in gone
            ],
            "latest": latest,
            "production": production,
            "first": by_number.get(1),
            "third": by_number.get(3),
        }


@dataclass
class History:
    """Random changes by the resolvers, and the state after each commit."""

    random: Random
    database: Database
    settings: Settings
    viewer: Viewer
    model: ModelDocument
    world: World = field(default_factory=World)
    states: list[tuple[datetime, World]] = field(default_factory=list)

    async def run(self, steps: int) -> None:
        self.note()
        for _ in range(steps):
            await asyncio.sleep(0.003)  # the next moment is another one
            await self.random.choice([self.create, self.publish, self.publish, self.point, self.point, self.point, self.unpoint, self.archive, self.delete, self.release, self.describe])()  # fmt: skip
            self.note()

    def note(self) -> None:
        self.states.append((utc_now(), deepcopy(self.world)))

    def one_of(self, *states: str) -> ObjectId | None:
        found = self.world.of(*states)
        return self.random.choice(found) if found else None

    async def create(self) -> None:
        row = await create_version(
            self.database, self.viewer, self.settings, model_id=self.model.id
        )
        harmful = self.random.random() < 0.2
        await add_files(row, {"weights": HARMFUL if harmful else row["number"]})
        self.world.numbers[row["_id"]], self.world.status[row["_id"]] = row["number"], "DRAFT"

    async def publish(self) -> None:
        version_id = self.one_of("DRAFT")
        if version_id is None:
            return await self.create()
        names = self.random.sample(NAMES, self.random.choice((0, 0, 1, 2)))
        done = await publish_version(
            self.database, self.viewer, version_id=version_id, set_aliases=names
        )
        self.world.status[version_id] = done.version["status"]
        if done.version["status"] == "READY":
            for name in names:
                _, protected = self.world.aliases.get(name, (None, False))
                self.world.aliases[name] = (version_id, protected)
        return None

    async def point(self) -> None:
        version_id = self.one_of("READY")
        if version_id is not None:
            name, protected = self.random.choice(NAMES), self.random.random() < 0.3
            await set_alias(self.database, self.viewer, model_id=self.model.id, name=name, version_id=version_id, protected=protected)  # fmt: skip
            self.world.aliases[name] = (version_id, protected)

    async def unpoint(self) -> None:
        if self.world.aliases:
            name = self.random.choice(sorted(self.world.aliases))
            await delete_alias(self.database, self.viewer, model_id=self.model.id, name=name)
            del self.world.aliases[name]

    async def archive(self) -> None:
        version_id = self.one_of("READY")
        if version_id is not None:
            await archive_version(self.database, self.viewer, version_id=version_id)
            self.world.status[version_id] = "ARCHIVED"

    async def delete(self) -> None:
        version_id = self.one_of("DRAFT", "READY", "ARCHIVED", "QUARANTINED")
        if version_id is None:
            return
        if any(version_id == each for each, _ in self.world.aliases.values()):
            with pytest.raises(Refused):
                await delete_version(self.database, self.viewer, version_id=version_id)
            return
        await delete_version(self.database, self.viewer, version_id=version_id)
        self.world.status[version_id] = "DELETED"

    async def release(self) -> None:
        version_id = self.one_of("QUARANTINED")
        if version_id is not None:
            await release_version(
                self.database, self.viewer, version_id=version_id, reason="looked into it"
            )
            self.world.status[version_id] = "READY"

    async def describe(self) -> None:
        summary = f"said {self.random.random()}"
        await update_model(
            self.database, self.viewer, self.settings, model_id=self.model.id, summary=summary
        )


async def made(database: Database, settings: Settings, seed: int) -> History:
    ann = await insert_actor("ann")
    model = await insert_model(ann, "m", created_at=utc_now(), updated_at=utc_now())
    await BlobDocument(
        sha256=f"{HARMFUL:064x}", size_bytes=HARMFUL, stored=True, inspection=inspection("UNSAFE")
    ).insert()
    made = History(Random(seed), database, settings, viewer_of(ann), model)
    await made.run(STEPS)
    return made


async def compare(ask: Asker, made: History) -> None:
    """At every moment between two commits."""
    for number, (at, world) in enumerate(made.states):
        answer = await ask(THEN, at=at.isoformat())
        assert answer.errors == []
        model = answer.data["model"]
        for alias in model["aliases"]:
            assert datetime.fromisoformat(alias.pop("setAt")) <= at
        expected = world.expected(made.world)
        assert {
            "aliases": model["aliases"],
            "latest": model["latest"],
            "production": model["named"],
            "first": model["first"],
            "third": model["third"],
        } == expected, (number, at)
        assert (answer.data["resolve"], answer.data["by_name"], answer.data["by_number"]) == (
            expected["latest"],
            expected["production"],
            expected["third"],
        )
        assert answer.data["same"] == answer.data["resolve"]


@pytest.mark.parametrize("seed", SEEDS)
async def test_every_moment_is_as_it_was(
    ask: Asker, database: Database, settings: Settings, seed: int
) -> None:
    history = await made(database, settings, seed)
    await compare(ask, history)
    await compare(ask.by_core, history)


@pytest.mark.parametrize("seed", SEEDS)
async def test_so_it_is_by_a_log_of_before_events_kept_it(
    ask: Asker, database: Database, settings: Settings, seed: int
) -> None:
    history = await made(database, settings, seed)
    kept = await database.data["events"].find().sort("_id", 1).to_list()
    await database.data["events"].update_many({}, {"$unset": {"pointed": 1}})
    await fill_pointed(database)
    await compare(ask, history)
    filled = await database.data["events"].find().sort("_id", 1).to_list()
    assert len(filled) == len(kept)
    await fill_pointed(database)
    assert await database.data["events"].find().sort("_id", 1).to_list() == filled


async def test_what_was_set_before_the_log_began_is_told_from_the_model(
    ask: Asker, database: Database, settings: Settings
) -> None:
    """As far as it stands there still; and what the log tells later, by the log."""
    ann = await insert_actor("ann")
    model = await insert_model(ann, "m")
    days = [START + timedelta(days=number) for number in range(6)]
    one, two, three = [
        await insert_version(database, model, {"a": 1}, created_at=day, published_at=day)
        for day in (days[0], days[1], days[4])
    ]
    entries = [
        AliasEntry(name="production", version_id=one.id, set_at=days[2]),
        AliasEntry(name="beta", version_id=two.id, set_at=days[3]),
    ]
    await database.data["models"].update_one(
        {"_id": model.id}, {"$set": {"aliases": [each.model_dump() for each in entries]}}
    )
    document = """query($at: DateTime!) { model(owner: "ann", name: "m") {
      aliases(asOf: $at) { name version { number } } version(asOf: $at) { number } } }"""

    async def then(at: datetime) -> tuple[dict[str, int], int | None]:
        answers = [await each(document, at=at.isoformat()) for each in (ask, ask.by_core)]
        assert answers[0].data == answers[1].data
        found = answers[0].data["model"]
        aliases = {each["name"]: each["version"]["number"] for each in found["aliases"]}
        return aliases, found["version"] and found["version"]["number"]

    before_all = START - timedelta(seconds=1)
    expected = [
        (before_all, ({}, None)),
        (days[0], ({}, 1)),
        (days[1], ({}, 2)),
        (days[2], ({"production": 1}, 2)),
        (days[3], ({"production": 1, "beta": 2}, 2)),
        (days[5], ({"production": 1, "beta": 2}, 3)),
    ]
    for at, state in expected:
        assert await then(at) == state
    moved = await set_alias(
        database, viewer_of(ann), model_id=model.id, name="production", version_id=three.id
    )
    # Where it pointed before, nobody knows any more.
    assert await then(days[3]) == ({"beta": 2}, 2)
    assert await then(moved["set_at"]) == ({"production": 3, "beta": 2}, 3)
    assert await then(moved["set_at"] - timedelta(milliseconds=1)) == ({"beta": 2}, 3)
    # By the events of before they kept all names, that is known again.
    await database.data["events"].update_many({}, {"$unset": {"pointed": 1}})
    await fill_pointed(database)
    assert await then(moved["set_at"]) == ({"production": 3, "beta": 2}, 3)


async def test_a_version_and_its_aliases_come_at_one_moment(
    ask: Asker, database: Database, settings: Settings
) -> None:
    ann = await insert_actor("ann")
    model, viewer = await insert_model(ann, "m"), viewer_of(ann)
    row = await create_version(database, viewer, settings, model_id=model.id)
    await add_files(row, {"a": 1})
    done = await publish_version(
        database, viewer, version_id=row["_id"], set_aliases=["production", "beta"]
    )
    at = done.version["published_at"]
    document = """query($at: DateTime!) { model(owner: "ann", name: "m") {
      aliases(asOf: $at) { name setAt } version(asOf: $at) { publishedAt } } }"""
    shown = at.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    answer = await ask(document, at=shown)
    assert answer.data["model"] == {
        "aliases": [{"name": "beta", "setAt": shown}, {"name": "production", "setAt": shown}],
        "version": {"publishedAt": shown},
    }
    answer = await ask(document, at=(at - timedelta(milliseconds=1)).isoformat())
    assert answer.data["model"] == {"aliases": [], "version": None}


async def test_what_comes_later_is_later_by_any_clock(
    ask: Asker, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process whose clock is behind changes what one has changed whose clock is ahead."""
    ann = await insert_actor("ann")
    model, viewer = await insert_model(ann, "m"), viewer_of(ann)
    versions = [await insert_version(database, model, {"a": 1}) for _ in range(6)]
    for version, seconds in zip(versions, (0, 5, -5, -5, -5, 0), strict=True):
        skew = timedelta(seconds=seconds)
        with monkeypatch.context() as patch:
            patch.setattr(history, "utc_now", lambda skew=skew: utc_now() + skew)
            entry = await set_alias(
                database, viewer, model_id=model.id, name="production", version_id=version.id
            )
        for asker in (ask, ask.by_core):
            answer = await asker(
                'query($at: DateTime!) { resolve(ref: "ann/m@production", asOf: $at) { number } }',
                at=entry["set_at"].isoformat(),
            )
            assert answer.data["resolve"] == {"number": version.number}
    times = [event.at for event in await EventDocument.find_all().sort("_id").to_list()]
    assert times == sorted(set(times))


async def test_rights_are_those_of_now(ask: Asker, database: Database, settings: Settings) -> None:
    ann, ben = await insert_actor("ann"), await insert_actor("ben")
    model = await insert_model(ann, "m")
    viewer = viewer_of(ann)
    version = await insert_version(database, model, {"a": 1})
    entry = await set_alias(
        database, viewer, model_id=model.id, name="production", version_id=version.id
    )
    document = """query($at: DateTime!, $id: ID!) {
      resolve(ref: "ann/m@production", asOf: $at) { number }
      model(owner: "ann", name: "m") { aliases(asOf: $at) { name } }
      node(id: $id) { ... on Alias { name version { number } } } }"""
    shown: dict[str, Any] = {"at": entry["set_at"].isoformat()}
    ids = 'query($at: DateTime!) { model(owner: "ann", name: "m") { aliases(asOf: $at) { id } } }'
    [alias] = (await ask(ids, **shown)).data["model"]["aliases"]
    shown["id"] = alias["id"]
    there = {
        "resolve": {"number": 1},
        "model": {"aliases": [{"name": "production"}]},
        "node": {"name": "production", "version": {"number": 1}},
    }
    nothing = {"resolve": None, "model": None, "node": None}
    await delete_alias(database, viewer, model_id=model.id, name="production")
    for asker in (ask, ask.by_core):
        assert (await asker(document, ANONYMOUS, **shown)).data == there
    await update_model(database, viewer, settings, model_id=model.id, visibility=Visibility.PRIVATE)
    for asker in (ask, ask.by_core):
        assert (await asker(document, viewer_of(ben), **shown)).data == nothing
        assert (await asker(document, viewer, **shown)).data == there
    await delete_version(database, viewer, version_id=version.id)
    for asker in (ask, ask.by_core):
        gone = (await asker(document, viewer, **shown)).data
        assert gone == {"resolve": None, "model": {"aliases": []}, "node": None}
    await delete_model(database, viewer, model_id=model.id)
    assert (await ask(document, viewer, **shown)).data == nothing


async def test_an_alias_of_then_is_another_object_than_that_of_now(
    ask: Asker, database: Database
) -> None:
    ann = await insert_actor("ann")
    model = await insert_model(ann, "m")
    one, two = [await insert_version(database, model, {"a": 1}) for _ in range(2)]
    first = await set_alias(
        database, viewer_of(ann), model_id=model.id, name="production", version_id=one.id
    )
    await set_alias(
        database, viewer_of(ann), model_id=model.id, name="production", version_id=two.id
    )
    document = """query($at: DateTime, $ids: [ID!]!) { model(owner: "ann", name: "m") {
      now: aliases { id version { number } } same: aliases(asOf: null) { id version { number } }
      then: aliases(asOf: $at) { id version { number } } }
      nodes(ids: $ids) { id ... on Alias { version { number } } } }"""
    for asker in (ask, ask.by_core):
        found = (await asker(document, at=first["set_at"].isoformat(), ids=[])).data["model"]
        assert found["now"] == found["same"]
        [now], [then] = found["now"], found["then"]
        assert (now["version"], then["version"]) == ({"number": 2}, {"number": 1})
        nodes = (await asker(document, ids=[then["id"], now["id"]])).data["nodes"]
        assert nodes == [then, now]
        wrong = [
            global_id("Alias", f"{model.id}/production@{when}")  # type: ignore[arg-type]  # any text
            for when in ("yesterday", "2026-01-01", "2026-01-01T00:00:00")
        ]
        assert (await asker(document, ids=wrong)).data["nodes"] == [None] * 3


async def test_a_time_to_come_is_now(ask: Asker, database: Database) -> None:
    ann = await insert_actor("ann")
    model = await insert_model(ann, "m")
    version = await insert_version(database, model, {"a": 1})
    await set_alias(
        database, viewer_of(ann), model_id=model.id, name="production", version_id=version.id
    )
    for at in ("9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z"):
        answer = await ask(
            """query($at: DateTime!) { resolve(ref: "ann/m@production", asOf: $at) { number }
            number: resolve(ref: "ann/m:1", asOf: $at) { number } }""",
            at=at,
        )
        expected = {"number": 1} if at.startswith("9") else None
        assert (answer.errors, answer.data) == ([], {"resolve": expected, "number": expected})


async def test_it_costs_the_same_for_any_history_and_number_of_models(
    ask: Asker, database: Database
) -> None:
    ann = await insert_actor("ann")
    for index in range(20):
        model = await insert_model(ann, f"m{index:02}")
        version = await insert_version(database, model, {"a": 1})
        entry = AliasEntry(name="production", version_id=version.id, set_at=START).model_dump()
        pointed = {"latest_version_id": version.id, "aliases": [entry]}
        many = 5000 if index == 3 else 2
        await database.data["events"].insert_many(
            [
                {
                    "model_id": model.id,
                    "at": START + timedelta(seconds=number),
                    "pointed": pointed,
                    "stream": "models",
                    "position": f"{number:024x}",
                }
                for number in range(many)
            ]
        )
    document = """query($first: Int!, $at: DateTime!) { models(first: $first, orderBy: {field: NAME, direction: ASC}) {
      nodes { aliases(asOf: $at) { name version { number } } version(asOf: $at) { number } } } }"""
    for first in (1, 20):
        captured = Captured()
        answer = await ask(
            document, count=captured, first=first, at=(START + timedelta(minutes=9)).isoformat()
        )
        nodes = answer.data["models"]["nodes"]
        assert (
            nodes
            == [
                {
                    "aliases": [{"name": "production", "version": {"number": 1}}],
                    "version": {"number": 1},
                }
            ]
            * first
        )
        assert sorted(answer.commands) == [
            *["aggregate models"] * 2,
            "find models",
            *["find versions"] * 3,
        ]
        examined = await keys_examined(database, captured, "events")
        assert 0 < examined <= 2 * 2 * first


async def test_the_example_of_the_guide(ask: Asker, database: Database, settings: Settings) -> None:
    text = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
    section = text.partition("\n## Time travel\n")[2].partition("\n## ")[0]
    document = section.partition("```graphql\n")[2].partition("```")[0]
    labs = await insert_actor("harbor-labs")
    model, viewer = await insert_model(labs, "tiny-llama"), viewer_of(labs)
    days = []
    for name in ("production", "staging"):
        row = await create_version(database, viewer, settings, model_id=model.id)
        await add_files(row, {"a": row["number"]})
        done = await publish_version(database, viewer, version_id=row["_id"], set_aliases=[name])
        days.append(done.version["published_at"])
    two = row["_id"]
    entry = await set_alias(database, viewer, model_id=model.id, name="production", version_id=two)
    production, staging = [
        {"name": name, "version": {"number": number}}
        for name, number in (("production", 1), ("staging", 2))
    ]
    moved = {**production, "version": {"number": 2}}
    expected = [
        (days[0], 1, 1, [production]),
        (days[1], 1, 2, [production, staging]),
        (entry["set_at"], 2, 2, [moved, staging]),
    ]
    for day, number, latest, aliases in expected:
        for asker in (ask, ask.by_core):
            answer = await asker(document, day=day.isoformat())
            assert answer.data == {
                "resolve": {"number": number},
                "model": {"latest": {"number": latest}, "aliases": aliases},
            }


async def test_the_migration_does_it(database: Database) -> None:
    ann = await insert_actor("ann")
    model = await insert_model(ann, "m")
    version = await insert_version(database, model, {"a": 1})
    await set_alias(database, viewer_of(ann), model_id=model.id, name="a", version_id=version.id)
    gone = EventDocument(kind=EventKind.ALIAS_SET, model_id=ann.id, after={"name": "a"})
    await gone.insert()  # its model was removed
    [told] = await database.data["events"].find({"model_id": model.id}).to_list()
    await database.data["events"].update_many({}, {"$unset": {"pointed": 1}})
    await keep_history(database)
    assert await database.data["events"].find({"model_id": model.id}).to_list() == [told]
    assert (await database.data["events"].find_one({"_id": gone.id}) or {}).get("pointed") is None
