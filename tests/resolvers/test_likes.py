"""A like counts once, however often and at once it is said."""

import asyncio

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.actors import Role
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelState, Visibility, trending_score
from modelharbor.errors import ErrorCode, Unauthenticated
from modelharbor.resolvers.likes import like_model, unlike_model
from tests.documents import START, insert_actor, insert_model, viewer_of
from tests.resolvers.conftest import Company
from tests.resolvers.state import everything, refused

pytestmark = pytest.mark.anyio


async def test_liking_and_unliking_twice_is_the_same_as_once(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", stats={"downloads_30d": 50})
    assert (await like_model(database, company.stranger, model_id=model.id))["stats"]["likes"] == 1
    before = await everything(database)
    row = await like_model(database, company.stranger, model_id=model.id)
    assert row["stats"]["likes"] == 1
    assert row["stats"]["trending_score"] == pytest.approx(
        trending_score(50, 1, model.created_at), rel=1e-12
    )
    assert row["revision"] == 1
    assert await everything(database) == before
    assert row["stats"]["as_of"] > START
    like = await database.data["likes"].find_one({})
    assert like is not None
    assert (like["user_id"], like["model_id"]) == (company.ann.id, model.id)
    await database.data["models"].update_one({}, {"$set": {"stats.as_of": START}})
    for _ in range(2):
        row = await unlike_model(database, company.stranger, model_id=model.id)
        assert row["stats"]["likes"] == 0
        assert row["stats"]["trending_score"] == pytest.approx(
            trending_score(50, 0, model.created_at), rel=1e-12
        )
        assert await database.data["likes"].count_documents({}) == 0
        assert row["stats"]["as_of"] > START


async def test_the_counter_is_right_when_many_like_at_once(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    people = [viewer_of(await insert_actor(f"fan{n}")) for n in range(8)]
    await asyncio.gather(
        *[like_model(database, person, model_id=model.id) for person in people * 3]
    )
    row = await like_model(database, people[0], model_id=model.id)
    assert row["stats"]["likes"] == 8 == await database.data["likes"].count_documents({})
    await asyncio.gather(
        *[unlike_model(database, person, model_id=model.id) for person in people[:5] * 3]
    )
    row = await unlike_model(database, people[0], model_id=model.id)
    assert row["stats"]["likes"] == 3 == await database.data["likes"].count_documents({})


async def test_who_may_like(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    deleted = await insert_model(company.acme, "gone", state=ModelState.DELETED)
    for role in Role:
        row = await like_model(database, company.member(role), model_id=model.id)
    assert row["stats"]["likes"] == len(Role)
    for act in (like_model, unlike_model):
        for model_id in (model.id, deleted.id, ObjectId()):
            async with refused(database, ErrorCode.NOT_FOUND, "id"):
                await act(database, company.stranger, model_id=model_id)
        before = await everything(database)
        with pytest.raises(Unauthenticated):
            await act(database, ANONYMOUS, model_id=model.id)
        assert await everything(database) == before
