"""Which models a bulk change is about, and what is refused before anything is looked at."""

from random import Random
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorKind, Role
from modelharbor.db.connection import Database
from modelharbor.db.models import Grant, ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode
from modelharbor.resolvers.bulk import may_filter, valid_changes
from tests.documents import SCOPES, insert_actor, insert_model, row_of

from .state import refused

pytestmark = pytest.mark.anyio


async def test_the_filter_finds_what_the_viewer_may(database: Database) -> None:
    """By random owners, grants, roles and scopes, as `Viewer.on_model` says."""
    chance = Random("rights")
    people = [await insert_actor(f"p{number}") for number in range(3)]
    groups = [await insert_actor(f"g{number}", ActorKind.ORGANIZATION) for number in range(3)]
    for number in range(60):
        actors = chance.sample([*people, *groups], k=chance.randint(0, 3))
        await insert_model(
            chance.choice([*people, *groups]),
            f"m{number}",
            visibility=chance.choice(list(Visibility)),
            state=chance.choice([ModelState.ACTIVE, ModelState.ARCHIVED]),
            grants=[Grant(actor_id=each.id, role=chance.choice(list(Role))) for each in actors],
        )
    rows = await database.find("models", {})
    found_some = 0
    for _ in range(40):
        viewer = Viewer(
            user=row_of(chance.choice(people)),
            roles={each.id: chance.choice(list(Role)) for each in groups if chance.random() < 0.6},
            scopes=frozenset(scope for scope in SCOPES if chance.random() < 0.8),
        )
        for permission in (Permission.WRITE, Permission.PUBLISH, Permission.ADMINISTER):
            seen = {**viewer.visible, **may_filter(viewer, permission)}
            found = {row["_id"] for row in await database.find("models", seen)}
            visible = await database.find("models", viewer.visible)
            assert found == {row["_id"] for row in visible if permission in viewer.on_model(row)}
            found_some += bool(found)
    assert found_some > 60
    assert len(rows) == 60


@pytest.mark.parametrize(
    ("given", "path"),
    [
        ({}, []),
        ({"add_tags": [], "remove_tags": []}, []),
        ({"state": ModelState.DELETED}, ["state"]),
        ({"add_tags": ["x"], "state": ModelState.DELETED}, ["state"]),
        ({"add_tags": [""]}, ["addTags"]),
        ({"add_tags": [f"t{number}" for number in range(101)]}, ["addTags"]),
        ({"remove_tags": ["x" * 65]}, ["removeTags"]),
    ],
)
async def test_changes_that_are_none(
    database: Database, given: dict[str, Any], path: list[str]
) -> None:
    async with refused(database, ErrorCode.BAD_INPUT, *path):
        valid_changes(**given)


@pytest.mark.parametrize(
    ("given", "needed"),
    [
        ({"add_tags": ["x"]}, [Permission.WRITE]),
        ({"remove_tags": ["x"]}, [Permission.WRITE]),
        ({"visibility": Visibility.PUBLIC}, [Permission.WRITE, Permission.ADMINISTER]),
        ({"state": ModelState.ACTIVE}, [Permission.ADMINISTER]),
        (
            {"add_tags": ["x"], "state": ModelState.ARCHIVED},
            [Permission.WRITE, Permission.ADMINISTER],
        ),
    ],
)
def test_what_changes_need(given: dict[str, Any], needed: list[Permission]) -> None:
    assert valid_changes(**given).permissions == needed


def test_nobody_may_change_anything() -> None:
    assert may_filter(Viewer(), Permission.WRITE) == {"_id": {"$in": []}}
    someone = Viewer(user={"_id": ObjectId()})
    assert may_filter(someone, Permission.WRITE) == {"_id": {"$in": []}}
