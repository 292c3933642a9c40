"""Models are created, changed and led through their states by those who may; else nothing happens."""

import asyncio
from dataclasses import replace
from hashlib import sha256
from typing import Any

import pytest
from bson import ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer
from modelharbor.db.actors import Role
from modelharbor.db.connection import Database
from modelharbor.db.models import ModelDocument, ModelState, Visibility, trending_score
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused, Unauthenticated
from modelharbor.resolvers.models import (
    archive_model,
    changed,
    create_model,
    delete_model,
    restore_model,
    update_model,
)
from modelharbor.settings import Settings
from tests.documents import insert_model, row_of
from tests.resolvers.conftest import Company
from tests.resolvers.state import events_of, everything, refused

pytestmark = pytest.mark.anyio
FULL: dict[str, Any] = {
    "display_name": " Bert ",
    "summary": "A model of language",
    "task": "fill-mask",
    "library": "transformers",
    "license": "apache-2.0",
    "languages": ["en", "de", "en"],
    "tags": ["nlp", " bert ", "nlp"],
    "properties": {"layers": 12, "heads": {"count": 12}},
}


async def stored(database: Database, model_id: ObjectId) -> dict[str, Any]:
    row = await database.data["models"].find_one({"_id": model_id})
    assert row is not None
    return row


async def test_a_model_is_created_whole(
    database: Database, settings: Settings, company: Company
) -> None:
    row = await create_model(
        database,
        company.admin,
        settings,
        owner="aCME",
        name="Bert",
        card_markdown="# Bert\r\n",
        visibility=Visibility.INTERNAL,
        **FULL,
    )
    assert row == await stored(database, row["_id"])
    assert {key: row[key] for key in FULL} == {
        **FULL,
        "display_name": "Bert",
        "languages": ["en", "de"],
        "tags": ["nlp", "bert"],
    }
    assert (row["owner_login"], row["owner_kind"], row["owner_id"]) == (
        *("Acme", "Organization"),
        company.acme.id,
    )
    assert (row["name"], row["name_lower"], row["revision"]) == ("Bert", "bert", 1)
    assert (row["visibility"], row["state"], row["principals"]) == (
        *("INTERNAL", "ACTIVE"),
        ["internal"],
    )
    assert row["stats"]["trending_score"] == trending_score(0, 0, row["created_at"])
    card = await database.data["cards"].find_one({"_id": row["_id"]})
    assert card is not None
    assert (card["markdown"], card["html"].strip()) == ("# Bert\n", "<h1>Bert</h1>")
    assert await events_of(database) == [
        {
            "stream": "models",
            "kind": "MODEL_CREATED",
            "about": [row["_id"], company.acme.id],
            "principals": ["internal"],
            "model_id": row["_id"],
            "version_id": None,
            "organization_id": None,
            "job_id": None,
            "upload_id": None,
            "upload": None,
            "actor_id": company.members[Role.ADMIN].id,
            "before": {},
            "after": {
                "name": "Bert",
                "owner_id": company.acme.id,
                "visibility": "INTERNAL",
                "state": "ACTIVE",
            },
            "job": None,
            "pointed": None,
            "comment": None,
            "position": None,
        }
    ]


async def test_a_person_owns_private_models_without_a_card(
    database: Database, settings: Settings, company: Company
) -> None:
    row = await create_model(database, company.stranger, settings, owner="ann", name="mine")
    assert row["principals"] == [f"actor:{company.ann.id}"]
    assert row["visibility"] == "PRIVATE"
    assert await database.data["cards"].count_documents({}) == 0


async def test_bad_fields_of_a_new_model(
    database: Database, settings: Settings, company: Company
) -> None:
    bad: list[tuple[str, dict[str, Any]]] = [
        ("name", {"name": "a/b"}),
        ("name", {"name": "new"}),
        ("displayName", {"display_name": "x" * 201}),
        ("summary", {"summary": "x" * 501}),
        ("summary", {"summary": "two\nlines"}),
        ("task", {"task": "$ne"}),
        ("library", {"library": "x" * 65}),
        ("license", {"license": "\u202e"}),
        ("languages", {"languages": ["not a language"]}),
        ("tags", {"tags": [str(n) for n in range(1000)]}),
        ("properties", {"properties": {"$where": 1}}),
        ("cardMarkdown", {"card_markdown": "x" * 10_000_000}),
        ("cardMarkdown", {"card_markdown": "---\na: [\n---\n"}),
        ("idempotencyKey", {"idempotency_key": ""}),
    ]
    for path, fields in bad:
        async with refused(database, ErrorCode.BAD_INPUT, path):
            await create_model(
                database, company.admin, settings, **{"owner": "acme", "name": "bert", **fields}
            )


async def test_the_owner_must_be_there(
    database: Database, settings: Settings, company: Company
) -> None:
    async with refused(database, ErrorCode.NOT_FOUND, "owner"):
        await create_model(database, company.admin, settings, owner="nobody", name="bert")


async def test_nobody_changes_nothing(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    before = await everything(database)
    for attempt in (
        create_model(database, ANONYMOUS, settings, owner="acme", name="b"),
        update_model(database, ANONYMOUS, settings, model_id=model.id, summary="x"),
        archive_model(database, ANONYMOUS, model_id=model.id),
        restore_model(database, ANONYMOUS, model_id=model.id),
        delete_model(database, ANONYMOUS, model_id=model.id),
    ):
        with pytest.raises(Unauthenticated):
            await attempt
    assert await everything(database) == before


async def test_names_are_unique_whatever_their_case(
    database: Database, settings: Settings, company: Company
) -> None:
    await create_model(database, company.admin, settings, owner="acme", name="Bert")
    async with refused(
        database,
        ErrorCode.ALREADY_EXISTS,
        "name",
        says="Acme has a model of the name bERT (in whatever case): use another.",
    ):
        await create_model(database, company.admin, settings, owner="acme", name="bERT")
    await create_model(database, company.stranger, settings, owner="ann", name="bert")


async def test_of_two_creates_at_once_one_wins(
    database: Database, settings: Settings, company: Company
) -> None:
    found = await asyncio.gather(
        *[
            create_model(database, company.admin, settings, owner="acme", name=name)
            for name in ("bert", "BERT", "Bert", "berT")
        ],
        return_exceptions=True,
    )
    lost = [one for one in found if isinstance(one, Refused)]
    assert [one.code for one in lost] == [ErrorCode.ALREADY_EXISTS] * 3
    assert await ModelDocument.count() == 1
    assert len(await events_of(database)) == 1


WRITERS = {Role.CONTRIBUTOR, Role.MAINTAINER, Role.ADMIN}


@pytest.mark.parametrize("role", [*Role, None])
async def test_who_may_create(
    database: Database, settings: Settings, company: Company, role: Role | None
) -> None:
    viewer = company.member(role) if role else company.stranger
    if role in WRITERS:
        await create_model(database, viewer, settings, owner="acme", name="bert")
        return
    async with refused(
        database,
        ErrorCode.FORBIDDEN,
        "owner",
        says="This needs the permission WRITE on what Acme owns: ask its administrators.",
    ):
        await create_model(database, viewer, settings, owner="acme", name="bert")


async def update_summary(
    database: Database, settings: Settings, viewer: Viewer, id: ObjectId
) -> None:
    await update_model(database, viewer, settings, model_id=id, summary="new")


async def update_visibility(
    database: Database, settings: Settings, viewer: Viewer, id: ObjectId
) -> None:
    await update_model(database, viewer, settings, model_id=id, visibility=Visibility.PUBLIC)


async def archive(database: Database, settings: Settings, viewer: Viewer, id: ObjectId) -> None:
    await archive_model(database, viewer, model_id=id)


async def restore(database: Database, settings: Settings, viewer: Viewer, id: ObjectId) -> None:
    await restore_model(database, viewer, model_id=id)


async def delete(database: Database, settings: Settings, viewer: Viewer, id: ObjectId) -> None:
    await delete_model(database, viewer, model_id=id)


# What each needs, the state that it starts from, and the field that a refusal names.
ACTIONS = [
    (update_summary, Permission.WRITE, ModelState.ACTIVE, "id", WRITERS),
    (update_visibility, Permission.ADMINISTER, ModelState.ACTIVE, "visibility", {Role.ADMIN}),
    (archive, Permission.ADMINISTER, ModelState.ACTIVE, "id", {Role.ADMIN}),
    (restore, Permission.ADMINISTER, ModelState.ARCHIVED, "id", {Role.ADMIN}),
    (delete, Permission.ADMINISTER, ModelState.ACTIVE, "id", {Role.ADMIN}),
]


@pytest.mark.parametrize("action", ACTIONS, ids=[a[0].__name__ for a in ACTIONS])
@pytest.mark.parametrize("held", ["member", "grant"])
@pytest.mark.parametrize("role", [*Role, None])
async def test_who_may_change(
    database: Database,
    settings: Settings,
    company: Company,
    action: Any,
    held: str,
    role: Role | None,
) -> None:
    """Cell by cell: a role in the owning organization, and the same role granted on the model."""
    act, permission, state, path, allowed = action
    granted = [{"actor_id": company.ann.id, "role": role}] if held == "grant" and role else []
    model = await insert_model(
        company.acme, "bert", visibility=Visibility.PRIVATE, state=state, grants=granted
    )
    viewer = company.member(role) if role and held == "member" else company.stranger
    if role is None:
        async with refused(database, ErrorCode.NOT_FOUND, "id"):
            await act(database, settings, viewer, model.id)
    elif role not in allowed:
        if path == "visibility" and role not in WRITERS:
            permission, path = Permission.WRITE, "id"
        async with refused(
            database,
            ErrorCode.FORBIDDEN,
            path,
            says=f"This needs the permission {permission.value} on Acme/bert",
        ):
            await act(database, settings, viewer, model.id)
    else:
        await act(database, settings, viewer, model.id)
        assert (await stored(database, model.id))["revision"] == 2
        assert len(await events_of(database)) == 1


@pytest.mark.parametrize("action", ACTIONS, ids=[a[0].__name__ for a in ACTIONS])
async def test_a_token_without_the_scope_is_told_so(
    database: Database, settings: Settings, company: Company, action: Any
) -> None:
    act, permission, state, path, _ = action
    model = await insert_model(company.acme, "bert", visibility=Visibility.INTERNAL, state=state)
    viewer = replace(company.admin, scopes=frozenset(Permission) - {permission})
    async with refused(
        database,
        ErrorCode.FORBIDDEN,
        path,
        says=f"The token lacks the scope {permission.value}: use one that has it.",
    ):
        await act(database, settings, viewer, model.id)


@pytest.mark.parametrize("action", ACTIONS, ids=[a[0].__name__ for a in ACTIONS])
async def test_an_unknown_model_is_answered_like_one_that_may_not_be_seen(
    database: Database, settings: Settings, company: Company, action: Any
) -> None:
    hidden = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    deleted = await insert_model(company.acme, "gone", state=ModelState.DELETED)
    for model_id in (hidden.id, deleted.id, ObjectId()):
        async with refused(
            database, ErrorCode.NOT_FOUND, "id", says="There is no such model that you may see."
        ):
            await action[0](database, settings, company.stranger, model_id)


async def test_an_update_changes_what_is_given_and_clears_what_is_null(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await create_model(
        database, company.admin, settings, owner="acme", name="bert", card_markdown="old", **FULL
    )
    row = await update_model(
        database,
        company.admin,
        settings,
        model_id=model["_id"],
        expected_revision=1,
        summary=None,
        task="text-generation",
        languages=None,
        add_tags=["new"],
        remove_tags=["nlp"],
        properties={"layers": True},
        card_markdown="new",
    )
    assert row == await stored(database, model["_id"])
    changed = {key for key in row if row[key] != model[key]}
    assert changed == {
        *("summary", "task", "languages", "tags", "properties", "revision", "updated_at")
    }
    assert (row["summary"], row["task"], row["languages"], row["tags"], row["revision"]) == (
        *(None, "text-generation", [], ["bert", "new"], 2),
    )
    event = (await events_of(database, kind="MODEL_UPDATED"))[0]
    assert event["before"] == {
        "summary": "A model of language",
        "task": "fill-mask",
        "languages": ["en", "de"],
        "tags": ["nlp", "bert"],
        "properties": {"layers": 12, "heads": {"count": 12}},
        "card_sha256": sha256(b"old").hexdigest(),
    }
    assert event["after"] == {
        "summary": None,
        "task": "text-generation",
        "languages": [],
        "tags": ["bert", "new"],
        "properties": {"layers": True},
        "card_sha256": sha256(b"new").hexdigest(),
    }


async def test_a_card_is_made_and_taken_away_by_updates(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    for revision, markdown in enumerate(("made", None), 2):
        row = await update_model(
            database, company.admin, settings, model_id=model.id, card_markdown=markdown
        )
        assert row["revision"] == revision
        cards = await database.data["cards"].find({}, {"markdown": 1}).to_list()
        assert cards == ([{"_id": model.id, "markdown": "made"}] if markdown else [])


async def test_no_card_is_rendered_for_who_may_not_write_it(
    database: Database, settings: Settings, company: Company, monkeypatch: pytest.MonkeyPatch
) -> None:
    active = await insert_model(company.acme, "bert")
    archived = await insert_model(company.acme, "old", state=ModelState.ARCHIVED)

    async def render(*arguments: Any) -> Any:
        raise AssertionError("it was rendered")

    monkeypatch.setattr("modelharbor.resolvers.models.rendered_card", render)
    reader, admin = company.member(Role.VIEWER), company.admin
    attempts: list[tuple[ErrorCode, str, Viewer, ObjectId, dict[str, Any]]] = [
        (ErrorCode.FORBIDDEN, "id", reader, active.id, {}),
        (ErrorCode.FORBIDDEN, "id", company.stranger, active.id, {}),
        (ErrorCode.NOT_FOUND, "id", admin, ObjectId(), {}),
        (ErrorCode.INVALID_TRANSITION, "id", admin, archived.id, {}),
        (ErrorCode.STALE_REVISION, "expectedRevision", admin, active.id, {"expected_revision": 7}),
        (
            *(ErrorCode.FORBIDDEN, "visibility", company.member(Role.CONTRIBUTOR), active.id),
            {"visibility": Visibility.PRIVATE},
        ),
    ]
    for code, path, viewer, model_id, given in attempts:
        async with refused(database, code, path):
            await update_model(
                *(database, viewer, settings), model_id=model_id, card_markdown="# A", **given
            )
    for code, viewer, owner in (
        (ErrorCode.FORBIDDEN, reader, "acme"),
        (ErrorCode.FORBIDDEN, company.stranger, "acme"),
        (ErrorCode.NOT_FOUND, admin, "nobody"),
    ):
        async with refused(database, code, "owner"):
            await create_model(
                database, viewer, settings, owner=owner, name="fresh", card_markdown="# A"
            )


async def test_an_update_to_what_is_there_writes_nothing(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await create_model(
        database, company.admin, settings, owner="acme", name="bert", card_markdown="x", **FULL
    )
    before = await everything(database)
    row = await update_model(
        database,
        company.admin,
        settings,
        model_id=model["_id"],
        summary="A model of language",
        properties=FULL["properties"],
        card_markdown="x\r\n".strip(),
        add_tags=["nlp"],
        remove_tags=["unknown"],
        visibility=Visibility.PRIVATE,
    )
    assert row == model
    assert await everything(database) == before


async def test_properties_that_are_equal_in_python_only_are_a_change(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", properties={"a": 1})
    row = await update_model(
        database, company.admin, settings, model_id=model.id, properties={"a": True}
    )
    assert row["properties"]["a"] is True


async def test_a_change_of_visibility_changes_who_sees_it_and_is_told(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", visibility=Visibility.PRIVATE)
    for visibility, principals in (
        (Visibility.PUBLIC, ["public"]),
        (Visibility.INTERNAL, ["internal"]),
        (Visibility.PRIVATE, [f"actor:{company.acme.id}"]),
    ):
        row = await update_model(
            database, company.admin, settings, model_id=model.id, visibility=visibility
        )
        assert (row["visibility"], row["principals"]) == (visibility.value, principals)
    assert [(e["before"], e["after"]) for e in await events_of(database)] == [
        ({"visibility": "PRIVATE"}, {"visibility": "PUBLIC"}),
        ({"visibility": "PUBLIC"}, {"visibility": "INTERNAL"}),
        ({"visibility": "INTERNAL"}, {"visibility": "PRIVATE"}),
    ]


async def test_bad_updates(database: Database, settings: Settings, company: Company) -> None:
    model = await insert_model(company.acme, "bert", tags=[str(n) for n in range(100)])
    bad: list[tuple[str, dict[str, Any]]] = [
        ("visibility", {"visibility": None}),
        ("displayName", {"display_name": "\0"}),
        ("summary", {"summary": "x" * 501}),
        ("task", {"task": "<b>"}),
        ("library", {"library": "a/b"}),
        ("license", {"license": "x" * 65}),
        ("languages", {"languages": [""]}),
        ("addTags", {"add_tags": ["one more"]}),
        ("addTags", {"add_tags": [""]}),
        ("removeTags", {"remove_tags": ["x" * 65]}),
        ("properties", {"properties": {"a.b": 1}}),
        ("cardMarkdown", {"card_markdown": "\0"}),
    ]
    for path, fields in bad:
        async with refused(database, ErrorCode.BAD_INPUT, path):
            await update_model(database, company.admin, settings, model_id=model.id, **fields)


async def test_a_stale_revision_is_refused(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", revision=5)
    stale = ErrorCode.STALE_REVISION
    says = "It is at revision 5, not 4: read it again."
    async with refused(database, stale, "expectedRevision", says=says):
        await update_model(
            database, company.admin, settings, model_id=model.id, expected_revision=4, summary="x"
        )
    async with refused(database, stale, "expectedRevision", says=says):
        await archive_model(database, company.admin, model_id=model.id, expected_revision=4)
    async with refused(database, stale, "expectedRevision", says=says):
        await restore_model(database, company.admin, model_id=model.id, expected_revision=4)


async def test_of_updates_at_once_with_one_revision_one_wins(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert")
    found = await asyncio.gather(
        *[
            update_model(
                database,
                company.admin,
                settings,
                model_id=model.id,
                expected_revision=1,
                summary=f"{n}",
            )
            for n in range(8)
        ],
        return_exceptions=True,
    )
    won = [n for n, one in enumerate(found) if isinstance(one, dict)]
    assert len(won) == 1
    codes = [one.code for one in found if isinstance(one, Refused)]
    assert codes == [ErrorCode.STALE_REVISION] * 7
    row = await stored(database, model.id)
    assert (row["summary"], row["revision"]) == (str(won[0]), 2)
    assert len(await events_of(database)) == 1


async def test_the_life_of_a_model(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "Bert")
    admin = company.admin
    archived = await archive_model(database, admin, model_id=model.id, comment=" old ")
    assert (archived["state"], archived["principals"], archived["revision"]) == (
        *("ARCHIVED", ["public"], 2),
    )
    assert (await restore_model(database, admin, model_id=model.id))["state"] == "ACTIVE"
    assert await delete_model(database, admin, model_id=model.id) == model.id
    gone = await stored(database, model.id)
    assert (gone["state"], gone["principals"], gone["name_lower"], gone["revision"]) == (
        *("DELETED", [], f"bert#{model.id}", 4),
    )
    assert gone["deleted_at"] == gone["updated_at"]
    back = await restore_model(database, admin, model_id=model.id)
    assert back == {
        **row_of(model),
        "revision": 5,
        "updated_at": back["updated_at"],
    }
    assert [
        (e["kind"], e["before"], e["after"], e["comment"]) for e in await events_of(database)
    ] == [
        ("MODEL_ARCHIVED", {"state": "ACTIVE"}, {"state": "ARCHIVED"}, "old"),
        ("MODEL_RESTORED", {"state": "ARCHIVED"}, {"state": "ACTIVE"}, None),
        ("MODEL_DELETED", {"state": "ACTIVE"}, {"state": "DELETED"}, None),
        ("MODEL_RESTORED", {"state": "DELETED"}, {"state": "ACTIVE"}, None),
    ]


async def test_the_name_of_a_deleted_model_is_free_and_may_be_gone(
    database: Database, settings: Settings, company: Company
) -> None:
    old = await create_model(database, company.admin, settings, owner="acme", name="bert")
    await delete_model(database, company.admin, model_id=old["_id"])
    new = await create_model(database, company.admin, settings, owner="acme", name="BERT")
    async with refused(database, ErrorCode.ALREADY_EXISTS, "name"):
        await restore_model(database, company.admin, model_id=old["_id"])
    await delete_model(database, company.admin, model_id=new["_id"])
    assert (await restore_model(database, company.admin, model_id=old["_id"]))["name"] == "bert"


async def test_a_deleted_model_is_there_for_restoring_only(
    database: Database, settings: Settings, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", state=ModelState.DELETED)
    for act in (update_summary, archive, delete):
        async with refused(database, ErrorCode.NOT_FOUND, "id"):
            await act(database, settings, company.admin, model.id)
    for viewer in (company.member(Role.MAINTAINER), company.stranger):
        async with refused(database, ErrorCode.NOT_FOUND, "id"):
            await restore(database, settings, viewer, model.id)


async def test_who_restores_a_model_must_be_able_to_read_it(
    database: Database, settings: Settings, company: Company
) -> None:
    viewer = replace(company.admin, scopes=frozenset({Permission.ADMINISTER}))
    for visibility in Visibility:
        model = await insert_model(
            company.acme, visibility.value, visibility=visibility, state=ModelState.DELETED
        )
        async with refused(database, ErrorCode.NOT_FOUND, "id"):
            await restore(database, settings, viewer, model.id)


async def test_impossible_transitions(
    database: Database, settings: Settings, company: Company
) -> None:
    active = await insert_model(company.acme, "active")
    archived = await insert_model(company.acme, "archived", state=ModelState.ARCHIVED)
    for act, model in ((restore, active), (archive, archived)):
        async with refused(
            database, ErrorCode.INVALID_TRANSITION, "id", says=f"Acme/{model.name} is "
        ):
            await act(database, settings, company.admin, model.id)
    async with refused(
        database, ErrorCode.INVALID_TRANSITION, "id", says="Acme/archived is ARCHIVED: restore it"
    ):
        await update_summary(database, settings, company.admin, archived.id)
    assert await delete_model(database, company.admin, model_id=archived.id) == archived.id


async def test_a_comment_that_is_too_long(database: Database, company: Company) -> None:
    model = await insert_model(company.acme, "bert")
    async with refused(database, ErrorCode.BAD_INPUT, "comment"):
        await delete_model(database, company.admin, model_id=model.id, comment="x" * 1001)


async def test_a_change_of_what_is_no_longer_as_it_was_read(
    database: Database, company: Company
) -> None:
    model = await insert_model(company.acme, "bert", revision=2)
    async with refused(database, ErrorCode.CONFLICT, says="read it again"):
        await database.transaction(
            lambda session: changed(
                database, session, {"_id": model.id, "revision": 1}, {"$set": {"summary": "x"}}
            )
        )
