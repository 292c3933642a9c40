"""The shared database fixture gives an empty, migrated database to each test."""

import pytest

from modelharbor.db.connection import Database
from modelharbor.db.migrations import pending
from modelharbor.db.tokens import TokenDocument

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("turn", [1, 2])
async def test_each_test_finds_an_empty_database_with_its_indexes(
    database: Database, turn: int
) -> None:
    assert await TokenDocument.count() == 0
    assert await pending(database) == []
    assert "login" in await database.data["actors"].index_information()
    token = TokenDocument(
        user_id=TokenDocument.model_construct().id,
        name=f"{turn}",
        prefix="",
        secret_sha256="",
        scopes=[],
    )
    await token.insert()
    assert await TokenDocument.count() == 1
