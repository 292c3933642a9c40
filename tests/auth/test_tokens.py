"""A token's text leads to its viewer; anything else is refused, always with the same words."""

import base64
from collections.abc import Callable
from datetime import timedelta
from hashlib import sha256

import pytest
from bson import ObjectId

from modelharbor.auth.tokens import REFUSED, authenticate, finish_notes, secret_hash, token_text
from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.db.actors import ActorKind, MembershipDocument, Role
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.tokens import Permission
from modelharbor.errors import Unauthenticated
from modelharbor.observability.commands import CommandCount, counted
from modelharbor.resolvers.tokens import issue_token
from tests.documents import insert_actor, row_of

pytestmark = pytest.mark.anyio
READ = [Permission.READ]


async def test_a_token_leads_to_its_viewer_in_one_command(database: Database) -> None:
    ann = await insert_actor("Ann")
    acme = await insert_actor("acme", ActorKind.ORGANIZATION)
    await MembershipDocument(organization_id=acme.id, user_id=ann.id, role=Role.MAINTAINER).insert()
    token, text = await issue_token(
        database, ann.id, "laptop", [Permission.WRITE, Permission.READ, Permission.READ]
    )
    count = CommandCount()
    before = counted.set(count)
    try:
        viewer = await authenticate(database, f"Bearer {text}")
        await finish_notes()
    finally:
        counted.reset(before)
    assert count.names == ["aggregate tokens"]
    row = row_of(ann)
    assert viewer.user == {**row, "created_at": row["created_at"].replace(tzinfo=None)}
    assert viewer.roles == {acme.id: Role.MAINTAINER}
    assert viewer.scopes == {Permission.READ, Permission.WRITE}
    assert viewer.token_id == token.id


async def test_only_the_hash_of_the_secret_is_stored(database: Database) -> None:
    ann = await insert_actor("Ann")
    token, text = await issue_token(database, ann.id, "laptop", READ)
    assert text[:27] == f"mh_{token.id}" == token.prefix
    secret = text[27:]
    assert len(base64.urlsafe_b64decode(secret + "=")) == 32
    row = await database.data["tokens"].find_one({"_id": token.id})
    assert row is not None
    assert row["secret_sha256"] == sha256(secret.encode()).hexdigest()
    assert secret not in str(row)


async def test_without_a_header_the_viewer_is_nobody(database: Database) -> None:
    assert await authenticate(database, None) is ANONYMOUS


CHANGED: dict[str, Callable[[str], str]] = {
    "empty": lambda text: "",
    "no token": lambda text: "Bearer",
    "only spaces": lambda text: "Bearer    ",
    "another scheme": lambda text: f"Basic {text}",
    "no scheme": lambda text: text,
    "another prefix": lambda text: f"Bearer hm_{text[3:]}",
    "too short": lambda text: f"Bearer {text[:-1]}",
    "too long": lambda text: f"Bearer {text}A",
    "very long": lambda text: f"Bearer {text}{'A' * 1_000_000}",
    "a line more": lambda text: f"Bearer {text}\n",
    "two tokens": lambda text: f"Bearer {text} {text}",
    "upper case id": lambda text: f"Bearer mh_{text[3:27].upper()}{text[27:]}",
    "not ASCII": lambda text: f"Bearer {text[:-1]}é",
    "digits of another script": lambda text: f"Bearer mh_{'٣' * 24}{text[27:]}",
    "unknown id": lambda text: f"Bearer mh_{ObjectId()}{text[27:]}",
    "another secret": lambda text: f"Bearer {text[:27]}{'A' * 43}",
    "the hash for the secret": lambda text: f"Bearer {text[:27]}{secret_hash(text[27:])}",
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
async def test_a_wrong_token_is_refused_and_never_noted_as_used(
    database: Database, change: Callable[[str], str]
) -> None:
    ann = await insert_actor("Ann")
    token, text = await issue_token(database, ann.id, "laptop", READ)
    # An id of letters, so that its upper case is another text.
    letters = ObjectId("abcdefabcdefabcdefabcdef")
    await database.data["tokens"].insert_one(
        {**row_of(token), "_id": letters, "prefix": f"mh_{letters}"}
    )
    header = change(token_text(letters, text[27:]))
    with pytest.raises(Unauthenticated) as caught:
        await authenticate(database, header)
    assert (caught.value.message, caught.value.extensions) == (REFUSED, {"code": "UNAUTHENTICATED"})
    await finish_notes()
    assert await database.data["tokens"].count_documents({"last_used_at": None}) == 2


async def test_expired_revoked_and_orphaned_tokens_are_refused_with_the_same_words(
    database: Database,
) -> None:
    ann = await insert_actor("Ann")
    now = utc_now()
    _, expired = await issue_token(database, ann.id, "old", READ, now - timedelta(seconds=1))
    token, revoked = await issue_token(database, ann.id, "lost", READ)
    await database.data["tokens"].update_one({"_id": token.id}, {"$set": {"revoked_at": now}})
    _, orphaned = await issue_token(database, ObjectId(), "of nobody", READ)
    for text in (expired, revoked, orphaned):
        with pytest.raises(Unauthenticated) as caught:
            await authenticate(database, f"Bearer {text}")
        assert caught.value.message == REFUSED
    await finish_notes()
    assert await database.data["tokens"].count_documents({"last_used_at": None}) == 3


async def test_a_token_that_will_expire_is_good_until_then(database: Database) -> None:
    ann = await insert_actor("Ann")
    _, text = await issue_token(database, ann.id, "new", READ, utc_now() + timedelta(hours=1))
    assert (await authenticate(database, f"bearer  {text} ")).user_id == ann.id
    await finish_notes()


async def test_the_last_use_is_noted_once_a_minute(database: Database) -> None:
    ann = await insert_actor("Ann")
    token, text = await issue_token(database, ann.id, "laptop", READ)

    async def use() -> object:
        await authenticate(database, f"Bearer {text}")
        await finish_notes()
        row = await database.data["tokens"].find_one({"_id": token.id})
        assert row is not None
        return row["last_used_at"]

    first = await use()
    assert first is not None
    assert await use() == first
    old = utc_now() - timedelta(seconds=61)
    await database.data["tokens"].update_one({"_id": token.id}, {"$set": {"last_used_at": old}})
    assert await use() != old


async def test_a_use_that_cannot_be_noted_is_logged(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    ann = await insert_actor("Ann")
    token, text = await issue_token(database, ann.id, "laptop", READ)
    await database.data.command(
        {
            "collMod": "tokens",
            "validator": {"last_used_at": None},
            "validationLevel": "strict",
        }
    )
    try:
        viewer = await authenticate(database, f"Bearer {text}")
        await finish_notes()
    finally:
        await database.data.command({"collMod": "tokens", "validator": {}})
    assert viewer.user_id == ann.id
    assert f"token.use_not_noted token_id={token.id}" in caplog.text
