"""Models: create, change, archive, restore, delete."""

import json
from collections.abc import Mapping, Sequence
from enum import Enum
from hashlib import sha256
from typing import Any, Final, TypeAlias, TypeVar

from beanie import PydanticObjectId
from beanie.odm.utils.dump import get_dict
from bson import ObjectId
from pymongo import ReturnDocument
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import DuplicateKeyError

from modelharbor.auth.viewer import Viewer, model_principals
from modelharbor.db.actors import ActorKind
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.models import (
    CardDocument,
    ModelDocument,
    ModelState,
    Visibility,
    trending_score,
)
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused
from modelharbor.settings import Settings

from .access import (
    full_name,
    may,
    model_for,
    refuse_stale,
    refuse_unless_active,
    refuse_without,
    turn_of,
)
from .cards import Card, render_card_apart
from .idempotency import Attempt, create_once
from .names import (
    DISPLAY_NAME,
    SUMMARY,
    bad,
    changed_tags,
    valid_card,
    valid_comment,
    valid_languages,
    valid_model_name,
    valid_properties,
    valid_tags,
    valid_term,
    valid_text,
)
from .quotas import refuse_beyond
from .telling import tell_of_model
from .users import actor_by_login

T = TypeVar("T")


class Unset(Enum):
    """What was not given, where None means: clear it."""

    UNSET = "UNSET"


UNSET: Final = Unset.UNSET
Given: TypeAlias = T | Unset


async def create_model(
    database: Database,
    viewer: Viewer,
    settings: Settings,
    *,
    owner: str,
    name: str,
    display_name: str | None = None,
    summary: str | None = None,
    card_markdown: str | None = None,
    task: str | None = None,
    library: str | None = None,
    license: str | None = None,
    languages: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    properties: Any = None,
    visibility: Visibility = Visibility.PRIVATE,
    idempotency_key: str | None = None,
) -> Row:
    """`owner` is a login: the viewer's own, or an organization's in which they may WRITE."""
    user_id = viewer.person_id()
    model_fields = valid_model_fields(
        name=name,
        display_name=display_name,
        summary=summary,
        task=task,
        library=library,
        license=license,
        languages=languages,
        tags=tags,
        properties=properties,
    )
    markdown = valid_card(card_markdown, settings.max_card_bytes, "cardMarkdown")
    if markdown is not None:
        await _new_owner(database, None, viewer, owner)
    card = await rendered_card(markdown, settings)

    async def make(session: AsyncClientSession, attempt: Attempt) -> Row:
        return await create_model_in(
            database,
            session,
            viewer,
            owner=owner,
            fields=model_fields,
            card=card,
            visibility=visibility,
            model_id=attempt.id,
        )

    async def find(session: AsyncClientSession, attempt: Attempt) -> Row | None:
        row = await database.data["models"].find_one(
            {"_id": attempt.id, "state": {"$ne": ModelState.DELETED.value}},
            session=session,
            max_time_ms=database.query_timeout_ms,
        )
        return row if row is not None and viewer.on_model(row) else None

    return await create_once(
        database,
        settings,
        user_id=user_id,
        operation="createModel",
        key=idempotency_key,
        given={
            **model_fields,
            "owner": owner,
            "visibility": visibility.value,
            "card": card.markdown if card else None,
        },
        make=make,
        find=find,
    )


def valid_model_fields(
    *,
    name: str,
    display_name: str | None = None,
    summary: str | None = None,
    task: str | None = None,
    library: str | None = None,
    license: str | None = None,
    languages: Sequence[str] | None = None,
    tags: Sequence[str] | None = None,
    properties: Any = None,
) -> dict[str, Any]:
    """What `create_model_in` takes as `fields`."""
    return {
        "name": valid_model_name(name, "name"),
        "display_name": valid_text(display_name, DISPLAY_NAME, "displayName"),
        "summary": valid_text(summary, SUMMARY, "summary"),
        "task": valid_term(task, "task"),
        "library": valid_term(library, "library"),
        "license": valid_term(license, "license"),
        "languages": valid_languages(languages, "languages"),
        "tags": valid_tags(tags, "tags"),
        "properties": valid_properties(properties, "properties"),
    }


async def rendered_card(markdown: str | None, settings: Settings) -> Card | None:
    """Of valid Markdown. It takes the processor up to seconds: only for who may write the card."""
    if markdown is None:
        return None
    return await render_card_apart(markdown, settings.max_card_bytes)


async def _new_owner(
    database: Database, session: AsyncClientSession | None, viewer: Viewer, login: str
) -> Row:
    """Who is to own a new model, if the viewer may WRITE there."""
    actor = await actor_by_login(database, login, None, "owner", session=session)
    refuse_without(
        viewer,
        Permission.WRITE,
        lambda viewer: viewer.on_owner(actor["_id"]),
        f"what {actor['login']} owns",
        "owner",
    )
    return actor


async def create_model_in(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    *,
    owner: str,
    fields: Mapping[str, Any],
    card: Card | None = None,
    visibility: Visibility = Visibility.PRIVATE,
    model_id: PydanticObjectId | None = None,
) -> Row:
    """Create a model within a transaction; `fields` are valid."""
    user_id = viewer.person_id()
    actor = await _new_owner(database, session, viewer, owner)
    now = utc_now()
    document = ModelDocument(
        id=model_id or PydanticObjectId(),
        owner_id=actor["_id"],
        owner_login=actor["login"],
        owner_login_lower=actor["login_lower"],
        owner_kind=ActorKind(actor["kind"]),
        name_lower=fields["name"].lower(),
        visibility=visibility,
        created_at=now,
        updated_at=now,
        **fields,
    )
    document.stats.trending_score = trending_score(0, 0, now)
    document.principals = model_principals(get_dict(document, to_db=True))
    try:
        await document.insert(session=session)
    except DuplicateKeyError:
        raise _taken(actor["login"], document.name) from None
    if card is not None:
        await _card_document(document.id, card).insert(session=session)
    row: Row = get_dict(document, to_db=True)
    await tell_of_model(
        session,
        EventKind.MODEL_CREATED,
        row,
        by=user_id,
        after={
            "name": document.name,
            "owner_id": document.owner_id,
            "visibility": visibility.value,
            "state": ModelState.ACTIVE.value,
        },
    )
    return row


def _taken(owner: str, name: str) -> Refused:
    return Refused(
        ErrorCode.ALREADY_EXISTS,
        f"{owner} has a model of the name {name} (in whatever case): use another.",
        "name",
    )


def _card_document(model_id: ObjectId, card: Card) -> CardDocument:
    return CardDocument(
        id=PydanticObjectId(model_id),
        markdown=card.markdown,
        metadata=card.metadata,
        html=card.html,
    )


async def changed(
    database: Database,
    session: AsyncClientSession,
    old: Mapping[str, Any],
    change: Mapping[str, Any] | Sequence[Mapping[str, Any]],
) -> Row:
    """Compare and set: the model after the change. `old` was read in this transaction, so it is there:
    another's write in between makes MongoDB start the transaction anew. `updated_at` never goes back,
    whichever clocks the processes go by."""
    if isinstance(change, Mapping) and "updated_at" in change.get("$set", {}):
        fields = dict(change["$set"])
        change = {**change, "$max": {"updated_at": fields.pop("updated_at")}, "$set": fields}
        if not fields:
            del change["$set"]
    row = await database.data["models"].find_one_and_update(
        old, change, session=session, return_document=ReturnDocument.AFTER
    )
    if row is None:
        raise Refused(ErrorCode.CONFLICT, "The model was changed meanwhile: read it again.")
    return row


async def update_model(
    database: Database,
    viewer: Viewer,
    settings: Settings,
    *,
    model_id: ObjectId,
    expected_revision: int | None = None,
    display_name: Given[str | None] = UNSET,
    summary: Given[str | None] = UNSET,
    card_markdown: Given[str | None] = UNSET,
    task: Given[str | None] = UNSET,
    library: Given[str | None] = UNSET,
    license: Given[str | None] = UNSET,
    languages: Given[Sequence[str] | None] = UNSET,
    add_tags: Sequence[str] | None = None,
    remove_tags: Sequence[str] | None = None,
    properties: Any = UNSET,
    visibility: Given[Visibility | None] = UNSET,
) -> Row:
    """None clears a field, UNSET leaves it. Nothing is written, and the revision stays, where all is equal.

    Needs WRITE, and `visibility` ADMINISTER too.
    """
    user_id = viewer.person_id()
    wanted: dict[str, Any] = {}
    if display_name is not UNSET:
        wanted["display_name"] = valid_text(display_name, DISPLAY_NAME, "displayName")
    if summary is not UNSET:
        wanted["summary"] = valid_text(summary, SUMMARY, "summary")
    for field, term in (("task", task), ("library", library), ("license", license)):
        if term is not UNSET:
            wanted[field] = valid_term(term, field)
    if languages is not UNSET:
        wanted["languages"] = valid_languages(languages, "languages")
    if properties is not UNSET:
        wanted["properties"] = valid_properties(properties, "properties")
    if visibility is None:
        raise bad("A model always has a visibility: give one, or leave it out.", "visibility")
    if visibility is not UNSET:
        wanted["visibility"] = visibility.value
    add, remove = valid_tags(add_tags, "addTags"), valid_tags(remove_tags, "removeTags")
    markdown = None
    if card_markdown is not UNSET:
        markdown = valid_card(card_markdown, settings.max_card_bytes, "cardMarkdown")

    async def model_to_update(session: AsyncClientSession | None) -> Row:
        model = await model_for(database, session, viewer, model_id, Permission.WRITE, "id")
        if visibility is not UNSET:
            may(viewer, Permission.ADMINISTER, model, "visibility")
        refuse_stale(model, expected_revision)
        refuse_unless_active(model, "id")
        return model

    if markdown is not None:
        await model_to_update(None)
    card = await rendered_card(markdown, settings)

    async def work(session: AsyncClientSession) -> Row:
        model = await model_to_update(session)
        fields = dict(wanted)
        if add or remove:
            fields["tags"] = changed_tags(model["tags"], add, remove, "addTags")
        given = UNSET if card_markdown is UNSET else card
        return await set_fields(database, session, model, fields, by=user_id, card=given)

    return await database.transaction(work, turn=turn_of(model_id))


async def set_fields(
    database: Database,
    session: AsyncClientSession,
    model: Row,
    fields: Mapping[str, Any],
    *,
    by: ObjectId,
    card: Given[Card | None] = UNSET,
) -> Row:
    """Within the transaction that read the model; `fields` are valid. The same row where all is equal."""
    after = {field: value for field, value in fields.items() if differs(model[field], value)}
    before = {field: model[field] for field in after}
    told = dict(after)
    if card is not UNSET:
        was, now = await _put_card(database, session, model["_id"], card)
        if was != now:
            before["card_sha256"], told["card_sha256"] = was, now
    if not told:
        return model
    model = await advance(database, session, model, after)
    await tell_of_model(session, EventKind.MODEL_UPDATED, model, by=by, before=before, after=told)
    return model


def differs(old: Any, new: Any) -> bool:
    """As JSON: Python holds 1, 1.0 and true for equal."""
    return json.dumps(old, default=str) != json.dumps(new, default=str)


async def _put_card(
    database: Database, session: AsyncClientSession, model_id: ObjectId, card: Card | None
) -> tuple[str | None, str | None]:
    """SHA-256 of the card's text before and after."""
    cards = database.data["cards"]
    old = await cards.find_one(
        {"_id": model_id}, {"markdown": 1}, session=session, max_time_ms=database.query_timeout_ms
    )
    was = sha256(old["markdown"].encode()).hexdigest() if old else None
    if card is None:
        await cards.delete_one({"_id": model_id}, session=session)
        return was, None
    now = sha256(card.markdown.encode()).hexdigest()
    if was != now:
        row = get_dict(_card_document(model_id, card), to_db=True)
        await cards.replace_one({"_id": model_id}, row, upsert=True, session=session)
    return was, now


async def advance(
    database: Database, session: AsyncClientSession, model: Row, fields: Mapping[str, Any]
) -> Row:
    """Set `fields` and what follows from them: principals, revision, time."""
    return await changed(
        database,
        session,
        {"_id": model["_id"], "state": model["state"], "revision": model["revision"]},
        {
            "$set": {
                "updated_at": utc_now(),
                **fields,
                "principals": model_principals({**model, **fields}),
            },
            "$inc": {"revision": 1},
        },
    )


async def archive_model(
    database: Database,
    viewer: Viewer,
    *,
    model_id: ObjectId,
    expected_revision: int | None = None,
    comment: str | None = None,
) -> Row:
    """ACTIVE → ARCHIVED: seen as before, its contents fixed. Needs ADMINISTER."""
    return await _transition(
        database,
        viewer,
        model_id,
        {ModelState.ACTIVE},
        ModelState.ARCHIVED,
        EventKind.MODEL_ARCHIVED,
        expected_revision,
        comment,
    )


async def restore_model(
    database: Database,
    viewer: Viewer,
    *,
    model_id: ObjectId,
    expected_revision: int | None = None,
    comment: str | None = None,
    settings: Settings | None = None,
) -> Row:
    """ARCHIVED or DELETED → ACTIVE. Needs ADMINISTER. ALREADY_EXISTS where the name was given away.
    `settings`: whose quotas it is held to, QUOTA_EXCEEDED; None: to none."""
    return await _transition(
        database,
        viewer,
        model_id,
        {ModelState.ARCHIVED, ModelState.DELETED},
        ModelState.ACTIVE,
        EventKind.MODEL_RESTORED,
        expected_revision,
        comment,
        settings,
    )


async def delete_model(
    database: Database, viewer: Viewer, *, model_id: ObjectId, comment: str | None = None
) -> ObjectId:
    """ACTIVE or ARCHIVED → DELETED: gone for everyone, its name free, to be restored. Needs ADMINISTER."""
    await _transition(
        database,
        viewer,
        model_id,
        {ModelState.ACTIVE, ModelState.ARCHIVED},
        ModelState.DELETED,
        EventKind.MODEL_DELETED,
        None,
        comment,
    )
    return model_id


async def _transition(
    database: Database,
    viewer: Viewer,
    model_id: ObjectId,
    old: set[ModelState],
    new: ModelState,
    kind: EventKind,
    expected_revision: int | None,
    comment: str | None,
    settings: Settings | None = None,
) -> Row:
    user_id = viewer.person_id()
    comment = valid_comment(comment)

    async def work(session: AsyncClientSession) -> Row:
        model = await model_for(
            database,
            session,
            viewer,
            model_id,
            Permission.ADMINISTER,
            "id",
            deleted=ModelState.DELETED in old,
        )
        refuse_stale(model, expected_revision)
        if ModelState(model["state"]) not in old:
            raise Refused(
                ErrorCode.INVALID_TRANSITION,
                f"{full_name(model)} is {model['state']}: it cannot become {new.value}.",
                "id",
            )
        return await set_state(
            database, session, model, new, kind, by=user_id, comment=comment, settings=settings
        )

    return await database.transaction(work, turn=turn_of(model_id))


async def set_state(
    database: Database,
    session: AsyncClientSession,
    model: Row,
    new: ModelState,
    kind: EventKind,
    *,
    by: ObjectId,
    comment: str | None = None,
    settings: Settings | None = None,
) -> Row:
    """Within the transaction that read the model, from whose state `new` may follow; `settings` as for
    `restore_model`."""
    if settings is not None and model["state"] == ModelState.DELETED.value:
        owner = {
            "_id": model["owner_id"],
            "login": model["owner_login"],
            "login_lower": model["owner_login_lower"],
        }
        size_bytes = model["stats"]["size_bytes"]
        await refuse_beyond(database, session, settings, owner, size_bytes, "id")
    fields: dict[str, Any] = {
        "state": new.value,
        "name_lower": model["name"].lower(),
        "deleted_at": None,
    }
    if new is ModelState.DELETED:
        fields["name_lower"] += f"#{model['_id']}"
        fields["deleted_at"] = fields["updated_at"] = utc_now()
    try:
        now = await advance(database, session, model, fields)
    except DuplicateKeyError:
        raise _taken(model["owner_login"], model["name"]) from None
    await tell_of_model(
        session,
        kind,
        model if new is ModelState.DELETED else now,
        by=by,
        before={"state": model["state"]},
        after={"state": new.value},
        comment=comment,
    )
    return now
