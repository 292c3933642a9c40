"""One key, one input, one object: also at once, also after a failure, until the key expires."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.tokens import authenticate, finish_notes
from modelharbor.db.actors import Role
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelState
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused
from modelharbor.resolvers.models import create_model, delete_model
from modelharbor.resolvers.tokens import create_api_token
from modelharbor.resolvers.versions import create_version, delete_version
from modelharbor.settings import Settings
from tests.documents import insert_model
from tests.resolvers.conftest import Company
from tests.resolvers.state import everything, refused

pytestmark = pytest.mark.anyio


async def count(database: Database, name: str) -> int:
    return await database.data[name].count_documents({})


async def test_fifty_models_at_once_are_one(
    database: Database, settings: Settings, company: Company
) -> None:
    rows = await asyncio.gather(
        *[
            create_model(
                *(database, company.admin, settings),
                owner="acme",
                name="bert",
                card_markdown="# Bert",
                idempotency_key="key",
            )
            for _ in range(50)
        ]
    )
    assert rows == [rows[0]] * 50
    assert [
        await count(database, name) for name in ("models", "cards", "events", "idempotency")
    ] == [*(1, 1, 1, 1)]


async def test_fifty_versions_at_once_are_one(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    rows = await asyncio.gather(
        *[
            create_version(
                database, company.admin, settings, model_id=model.id, idempotency_key="key"
            )
            for _ in range(50)
        ]
    )
    assert rows == [rows[0]] * 50
    assert rows[0]["number"] == 1
    assert await count(database, "versions") == 1


async def test_fifty_tokens_at_once_are_one_with_one_secret(
    database: Database, settings: Settings, company: Company
) -> None:
    found = await asyncio.gather(
        *[
            create_api_token(
                *(database, company.stranger, settings),
                name="x",
                scopes=[Permission.READ],
                idempotency_key="key",
            )
            for _ in range(50)
        ]
    )
    assert found == [found[0]] * 50
    assert await count(database, "tokens") == 1
    text = found[0][1]
    assert text[27:] not in str(await everything(database))
    assert (await authenticate(database, f"Bearer {text}")).user_id == company.ann.id
    await finish_notes()


async def test_another_input_with_the_key_is_a_conflict(
    database: Database, settings: Settings, company: Company
) -> None:
    given: dict[str, Any] = {"owner": "acme", "name": "bert", "tags": ["a"]}
    await create_model(database, company.admin, settings, **given, idempotency_key="key")
    others: list[dict[str, Any]] = [
        {"name": "other"},
        {"owner": "Acme"},
        {"tags": []},
        {"summary": "x"},
        {"card_markdown": "x"},
        {"properties": {"a": 1}},
    ]
    for other in others:
        async with refused(
            database,
            ErrorCode.CONFLICT,
            "idempotencyKey",
            says="The idempotency key was used with another input: use a new one.",
        ):
            await create_model(
                database, company.admin, settings, **{**given, **other}, idempotency_key="key"
            )


async def test_a_key_belongs_to_one_person_and_one_mutation(
    database: Database, settings: Settings, company: Company
) -> None:
    first = await create_model(
        database, company.admin, settings, owner="acme", name="one", idempotency_key="key"
    )
    second = await create_model(
        *(database, company.member(Role.MAINTAINER), settings),
        owner="acme",
        name="two",
        idempotency_key="key",
    )
    version = await create_version(
        database, company.admin, settings, model_id=first["_id"], idempotency_key="key"
    )
    assert len({first["_id"], second["_id"], version["_id"]}) == 3


async def test_without_a_key_each_is_a_new_one(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    for number in (1, 2):
        row = await create_version(database, company.admin, settings, model_id=model.id)
        assert row["number"] == number
    assert await count(database, "idempotency") == 0


async def test_what_failed_leaves_the_key_free(
    database: Database, settings: Settings, company: Company
) -> None:
    taken = await insert_model(company.acme, "bert")
    async with refused(database, ErrorCode.ALREADY_EXISTS, "name"):
        await create_model(
            database, company.admin, settings, owner="acme", name="bert", idempotency_key="key"
        )
    await database.data["models"].delete_one({"_id": taken.id})
    await create_model(
        database, company.admin, settings, owner="acme", name="bert", idempotency_key="key"
    )


async def test_a_key_is_remembered_for_the_hours_set_and_not_longer(
    database: Database, settings: Settings, company: Company
) -> None:
    settings = settings.model_copy(update={"idempotency_hours": 2.0})
    model = await insert_model(company.acme, "bert")

    async def create() -> int:
        row = await create_version(
            database, company.admin, settings, model_id=model.id, idempotency_key="key"
        )
        number: int = row["number"]
        return number

    before = utc_now()
    assert await create() == 1
    record = await database.data["idempotency"].find_one({})
    assert record is not None
    assert before <= record["expires_at"] - timedelta(hours=2) <= utc_now()
    assert await create() == 1
    # Expired, and not yet removed: it does not count.
    await database.data["idempotency"].update_one(
        {}, {"$set": {"expires_at": utc_now() - timedelta(milliseconds=1)}}
    )
    assert sorted(await asyncio.gather(*[create() for _ in range(5)])) == [2] * 5
    assert await count(database, "idempotency") == 1


async def test_what_is_gone_or_no_longer_to_be_seen_is_not_answered_again(
    database: Database, settings: Settings, company: Company
) -> None:
    async def create_again() -> ObjectId:
        row = await create_model(
            database, company.admin, settings, owner="acme", name="bert", idempotency_key="key"
        )
        model_id: ObjectId = row["_id"]
        return model_id

    model_id = await create_again()
    version = await create_version(
        database, company.admin, settings, model_id=model_id, idempotency_key="key"
    )
    await delete_version(database, company.admin, version_id=version["_id"])
    async with refused(database, ErrorCode.CONFLICT, "idempotencyKey", says="no longer there"):
        await create_version(
            database, company.admin, settings, model_id=model_id, idempotency_key="key"
        )
    left = company.admin.__class__(user=company.admin.user, scopes=company.admin.scopes)
    async with refused(database, ErrorCode.CONFLICT, "idempotencyKey", says="no longer there"):
        await create_model(
            database, left, settings, owner="acme", name="bert", idempotency_key="key"
        )
    async with refused(database, ErrorCode.NOT_FOUND, "modelId"):
        await create_version(database, left, settings, model_id=model_id, idempotency_key="key")
    await delete_model(database, company.admin, model_id=model_id)
    async with refused(database, ErrorCode.CONFLICT, "idempotencyKey", says="no longer there"):
        await create_again()
    row = await database.data["models"].find_one({"_id": model_id})
    assert row is not None
    assert row["state"] == ModelState.DELETED.value


async def test_many_keys_for_one_name_make_one_model(
    database: Database, settings: Settings, company: Company
) -> None:
    found = await asyncio.gather(
        *[
            create_model(
                *(database, company.admin, settings),
                owner="acme",
                name="bert",
                idempotency_key=f"{n}",
            )
            for n in range(5)
        ],
        return_exceptions=True,
    )
    codes = [one.code for one in found if isinstance(one, Refused)]
    assert codes == [ErrorCode.ALREADY_EXISTS] * 4
    assert await count(database, "idempotency") == 1
