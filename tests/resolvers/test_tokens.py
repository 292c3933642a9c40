"""Tokens are never more than the one that makes them, and end when they are revoked."""

import logging
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from bson import ObjectId
from pydantic import SecretStr

from modelharbor.auth.tokens import authenticate, finish_notes
from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Unauthenticated
from modelharbor.resolvers.tokens import (
    create_api_token,
    issue_token,
    list_tokens,
    revoke_api_token,
    revoke_token,
)
from modelharbor.settings import Settings
from tests.documents import insert_actor, viewer_of
from tests.resolvers.conftest import Company
from tests.resolvers.state import everything, refused

pytestmark = pytest.mark.anyio
READ = [Permission.READ]


async def test_a_new_token_leads_to_its_maker_with_its_scopes(
    database: Database, settings: Settings, company: Company
) -> None:
    expires = datetime(2999, 1, 1, 12, 0, 0, 123_456, tzinfo=UTC)
    row, text = await create_api_token(
        database,
        company.stranger,
        settings,
        name=" laptop ",
        scopes=[Permission.WRITE, Permission.READ, Permission.WRITE],
        expires_at=expires,
    )
    assert row == await database.data["tokens"].find_one({"_id": row["_id"]})
    assert (row["name"], row["scopes"], row["user_id"], row["prefix"]) == (
        *("laptop", ["READ", "WRITE"]),
        company.ann.id,
        text[:27],
    )
    assert row["expires_at"] == expires.replace(microsecond=123_000)
    viewer = await authenticate(database, f"Bearer {text}")
    await finish_notes()
    assert viewer.user_id == company.ann.id
    assert viewer.scopes == {Permission.READ, Permission.WRITE}


async def test_bad_tokens(database: Database, settings: Settings, company: Company) -> None:
    past = utc_now() - timedelta(seconds=1)
    reader = replace(company.stranger, scopes=frozenset({Permission.READ, Permission.ADMINISTER}))
    bad: list[tuple[ErrorCode, str, dict[str, Any]]] = [
        (ErrorCode.BAD_INPUT, "name", {"name": " "}),
        (ErrorCode.BAD_INPUT, "name", {"name": "a\nb"}),
        (ErrorCode.BAD_INPUT, "name", {"name": "x" * 201}),
        (ErrorCode.BAD_INPUT, "scopes", {"scopes": []}),
        (ErrorCode.FORBIDDEN, "scopes", {"scopes": [Permission.READ, Permission.WRITE]}),
        (ErrorCode.FORBIDDEN, "scopes", {"scopes": [Permission.OPERATE]}),
        (ErrorCode.BAD_INPUT, "expiresAt", {"expires_at": past}),
        (ErrorCode.BAD_INPUT, "expiresAt", {"expires_at": past.replace(tzinfo=None)}),
        (ErrorCode.BAD_INPUT, "idempotencyKey", {"idempotency_key": "a b"}),
    ]
    for code, path, given in bad:
        async with refused(database, code, path):
            await create_api_token(
                database, reader, settings, **{"name": "x", "scopes": READ, **given}
            )
    before = await everything(database)
    with pytest.raises(Unauthenticated):
        await create_api_token(database, ANONYMOUS, settings, name="x", scopes=READ)
    with pytest.raises(Unauthenticated):
        await revoke_api_token(database, ANONYMOUS, token_id=ObjectId())
    assert await everything(database) == before


async def test_a_token_does_not_outlive_the_one_that_makes_it(
    database: Database, settings: Settings, company: Company
) -> None:
    end = utc_now() + timedelta(hours=1)
    _, text = await issue_token(database, company.ann.id, "mine", list(Permission), end)
    viewer = await authenticate(database, f"Bearer {text}")
    await finish_notes()
    assert viewer.expires_at == end
    for expires in (None, end + timedelta(milliseconds=1)):
        async with refused(
            database, ErrorCode.FORBIDDEN, "expiresAt", says=f"Your token expires at {end}"
        ):
            await create_api_token(
                database, viewer, settings, name="x", scopes=READ, expires_at=expires
            )
    for expires in (end, end - timedelta(minutes=1)):
        row, _ = await create_api_token(
            database, viewer, settings, name="x", scopes=READ, expires_at=expires
        )
        assert row["expires_at"] == expires


async def test_without_administer_a_token_makes_none_and_revokes_itself_only(
    database: Database, settings: Settings, company: Company
) -> None:
    scopes = [scope for scope in Permission if scope is not Permission.ADMINISTER]
    mine, text = await issue_token(database, company.ann.id, "mine", scopes)
    other, _ = await issue_token(database, company.ann.id, "other", READ)
    viewer = await authenticate(database, f"Bearer {text}")
    await finish_notes()
    lacks = "The token lacks the scope ADMINISTER: use one that has it."
    async with refused(database, ErrorCode.FORBIDDEN, says=lacks):
        await create_api_token(database, viewer, settings, name="x", scopes=READ)
    for token_id in (other.id, ObjectId()):
        async with refused(database, ErrorCode.FORBIDDEN, says=lacks):
            await revoke_api_token(database, viewer, token_id=token_id)
    assert await revoke_api_token(database, viewer, token_id=mine.id) == mine.id
    with pytest.raises(Unauthenticated):
        await authenticate(database, f"Bearer {text}")


async def test_a_person_has_a_hundred_live_tokens(
    database: Database, settings: Settings, company: Company
) -> None:
    for n in range(98):
        await issue_token(database, company.ann.id, f"{n}", READ)
    past = utc_now() - timedelta(seconds=1)
    await issue_token(database, company.ann.id, "expired", READ, past)
    revoked, _ = await issue_token(database, company.ann.id, "revoked", READ)
    assert await revoke_token(database, revoked.id)
    assert not await revoke_token(database, revoked.id)
    for n in range(2):
        await create_api_token(database, company.stranger, settings, name=f"{n}", scopes=READ)
    async with refused(database, ErrorCode.CONFLICT, says="You have 100 tokens: revoke one"):
        await create_api_token(database, company.stranger, settings, name="more", scopes=READ)
    assert len(await list_tokens(database, user_id=company.ann.id)) == 102
    assert "secret_sha256" not in (await list_tokens(database, user_id=company.ann.id))[0]


async def test_a_token_is_revoked_for_good(
    database: Database, company: Company, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "modelharbor")
    token, text = await issue_token(database, company.ann.id, "lost", READ)
    found = await revoke_api_token(
        database, company.stranger, token_id=token.id, comment="left on a train"
    )
    assert found == token.id
    assert f"token.revoked token_id={token.id} by={company.ann.id} comment='left on a train'" in (
        caplog.text
    )
    with pytest.raises(Unauthenticated):
        await authenticate(database, f"Bearer {text}")
    before = await everything(database)
    assert await revoke_api_token(database, company.stranger, token_id=token.id) == token.id
    assert await everything(database) == before


async def test_the_tokens_of_others_are_not_there_but_for_operators(
    database: Database, company: Company
) -> None:
    token, _ = await issue_token(database, company.ann.id, "hers", READ)
    for token_id in (token.id, ObjectId()):
        async with refused(database, ErrorCode.NOT_FOUND, "id", says="You have no such token."):
            await revoke_api_token(database, company.admin, token_id=token_id)
    operator = viewer_of(await insert_actor("operator", is_operator=True))
    async with refused(database, ErrorCode.NOT_FOUND, "id"):
        await revoke_api_token(database, operator, token_id=token.id)  # its token lacks OPERATE
    operator = replace(operator, scopes=frozenset(Permission))
    assert await revoke_api_token(database, operator, token_id=token.id) == token.id
    async with refused(database, ErrorCode.BAD_INPUT, "comment"):
        await revoke_api_token(database, operator, token_id=token.id, comment="x" * 1001)


async def test_a_repeated_secret_is_not_answered_once_it_cannot_be_right(
    database: Database, settings: Settings, company: Company
) -> None:
    async def create(with_settings: Settings) -> str:
        _, text = await create_api_token(
            database, company.stranger, with_settings, name="x", scopes=READ, idempotency_key="k"
        )
        return text

    text = await create(settings)
    assert await create(settings) == text
    other_key = settings.model_copy(update={"secret_key": SecretStr("x" * 32)})
    async with refused(database, ErrorCode.CONFLICT, "idempotencyKey"):
        await create(other_key)
    await revoke_token(database, ObjectId(text[3:27]))
    async with refused(database, ErrorCode.CONFLICT, "idempotencyKey"):
        await create(settings)
