"""Many models changed in the same way: which, what it comes to, and the job that does it."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from bson import ObjectId, decode, encode
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.permissions import PERMISSIONS
from modelharbor.auth.viewer import Viewer, job_principals
from modelharbor.db.base import Row
from modelharbor.db.conditions import NOTHING, all_of, any_of
from modelharbor.db.connection import Database
from modelharbor.db.events import EventKind
from modelharbor.db.jobs import JobKind
from modelharbor.db.keyset import Filter
from modelharbor.db.models import ModelState, Visibility
from modelharbor.db.tokens import Permission
from modelharbor.errors import ErrorCode, Refused
from modelharbor.jobs.put import put_job
from modelharbor.loaders.base import Reads
from modelharbor.loaders.models import with_holders
from modelharbor.settings import Settings

from .access import may, refuse_unless_active
from .jobs import refuse_too_many
from .models import differs, set_fields, set_state
from .names import bad, changed_tags, valid_idempotency_key, valid_tags

MOST_IDS: Final = 1000
SAMPLE: Final = 10
FIRST: Final = {"stats.trending_score": -1, "_id": -1}
"""The order of the sample: that of a list of models."""


@dataclass(frozen=True, slots=True)
class BulkChanges:
    """What is to be the same afterwards; None: as it was."""

    add_tags: list[str]
    remove_tags: list[str]
    visibility: Visibility | None
    state: ModelState | None

    @classmethod
    def stored(cls, given: Mapping[str, Any]) -> "BulkChanges":
        """As `row` made it."""
        visibility, state = given["visibility"], given["state"]
        return cls(
            given["add_tags"],
            given["remove_tags"],
            None if visibility is None else Visibility(visibility),
            None if state is None else ModelState(state),
        )

    def row(self) -> Row:
        return {
            "add_tags": self.add_tags,
            "remove_tags": self.remove_tags,
            "visibility": None if self.visibility is None else self.visibility.value,
            "state": None if self.state is None else self.state.value,
        }

    @property
    def permissions(self) -> list[Permission]:
        """Those that the mutations for one model need."""
        fields = self.add_tags or self.remove_tags or self.visibility
        administers = self.visibility or self.state
        return [
            *([Permission.WRITE] if fields else []),
            *([Permission.ADMINISTER] if administers else []),
        ]


def valid_changes(
    *,
    add_tags: Sequence[str] | None = None,
    remove_tags: Sequence[str] | None = None,
    visibility: Visibility | None = None,
    state: ModelState | None = None,
) -> BulkChanges:
    if state is ModelState.DELETED:
        raise bad("Models are deleted one by one, by `deleteModel`.", "state")
    changes = BulkChanges(
        valid_tags(add_tags, "addTags"), valid_tags(remove_tags, "removeTags"), visibility, state
    )
    if not changes.permissions:
        raise bad("Nothing is to be changed: give tags, a visibility or a state.")
    return changes


@dataclass(frozen=True, slots=True)
class Preview:
    """What a bulk change is about, as it is now."""

    matched: int
    forbidden: int  # of these: the viewer may not change them
    sample: list[Row]
    job: Row | None = None


async def start_bulk_change(
    reads: Reads,
    settings: Settings,
    *,
    ids: Sequence[ObjectId] | None = None,
    filter: Filter | None = None,
    dry_run: bool = False,
    idempotency_key: str | None = None,
    **given: Any,
) -> Preview:
    """Change those of the models with these `ids`, or that match the compiled `filter`, that the viewer
    sees and may change. `given`: what `valid_changes` takes. No job where nothing matches, nor for a
    `dry_run`, which is refused for the same reasons.

    Refused with NOT_FOUND where none of the ids is to be seen, with FORBIDDEN where none may be changed.
    """
    database, viewer = reads.database, reads.viewer
    user_id = viewer.person_id()
    changes = valid_changes(**given)
    query = _wanted(ids, filter)
    key = valid_idempotency_key(idempotency_key)
    wanted: Row = {"query": Filter(query).raw, **changes.row()}
    digest = sha256(encode(wanted)).hexdigest()
    stored_key = None if key is None or dry_run else f"{user_id}:{key}"
    if stored_key is not None:
        known = await database.data["jobs"].find_one(
            {"kind": JobKind.BULK_MUTATION.value, "idempotency_key": stored_key},
            max_time_ms=database.query_timeout_ms,
        )
        if known is not None:
            return await _again(database, viewer, known, digest)
    found = await _look(reads, query, changes)
    changeable = found.matched - found.forbidden
    path = "filter" if ids is None else "ids"
    if ids is not None and not found.matched:
        raise Refused(ErrorCode.NOT_FOUND, "There is no such model that you may see.", path)
    if found.matched and not changeable:
        needed = " and ".join(permission.value for permission in changes.permissions)
        raise Refused(
            ErrorCode.FORBIDDEN,
            f"Of {found.matched:,} models there is none that you may change: this needs {needed}, by your role and your token.",
            path,
        )
    if changeable > settings.max_bulk_models:
        raise _too_many(changeable, settings)
    if dry_run or not changeable:
        return found
    await refuse_too_many(database, user_id, settings.max_waiting_jobs)
    told = {
        "matched": found.matched,
        "forbidden": found.forbidden,
        "sample": [row["_id"] for row in found.sample],
    }

    async def work(session: AsyncClientSession) -> Row:
        return await put_job(
            database,
            session,
            kind=JobKind.BULK_MUTATION,
            input={"wanted": wanted, "digest": digest, "told": told},
            created_by_id=user_id,
            scopes=sorted(scope.value for scope in viewer.scopes),
            principals=job_principals(user_id),
            idempotency_key=stored_key,
        )

    job = await database.transaction(work)
    if (job["input"]["digest"], job["input"]["told"]) != (digest, told):  # another came first
        return await _again(database, viewer, job, digest)
    return Preview(found.matched, found.forbidden, found.sample, job)


def _wanted(ids: Sequence[ObjectId] | None, filter: Filter | None) -> Row:
    if (ids is None) == (filter is None):
        raise bad("Give `ids` or `filter`: one of them, not both.")
    if ids is None:
        assert filter is not None
        return filter.data
    if len(ids) > MOST_IDS:
        raise bad(f"{len(ids):,} ids: {MOST_IDS:,} are allowed. A filter may find more.", "ids")
    return {"_id": {"$in": sorted(set(ids))}}


async def _again(database: Database, viewer: Viewer, job: Row, digest: str) -> Preview:
    """What was answered before, with what is left of its sample."""
    if job["input"]["digest"] != digest:
        raise Refused(
            ErrorCode.CONFLICT,
            "The idempotency key was used with another input: use a new one.",
            "idempotencyKey",
        )
    told = job["input"]["told"]
    query = {"_id": {"$in": told["sample"]}, **viewer.visible}
    rows = {row["_id"]: row for row in await database.find("models", query)}
    sample = [rows[each] for each in told["sample"] if each in rows]
    return Preview(told["matched"], told["forbidden"], sample, job)


async def _look(reads: Reads, query: Row, changes: BulkChanges) -> Preview:
    database, viewer = reads.database, reads.viewer
    seen = all_of([viewer.visible, await with_holders(reads, query)])
    mine = all_of([seen, *(may_filter(viewer, each) for each in changes.permissions)])
    matched, changeable, sample = await asyncio.gather(
        database.count("models", seen),
        database.count("models", mine),
        database.find("models", mine, sort=FIRST, limit=SAMPLE),
    )
    # Between two counts models may come and go.
    return Preview(matched, max(0, matched - changeable), sample)


def may_filter(viewer: Viewer, permission: Permission) -> Row:
    """Which of the models that the viewer sees grant a permission beyond what visibility gives: the
    same as `Viewer.on_model`, for the database."""
    if permission not in viewer.scopes:
        return NOTHING
    owners = [each for each in viewer.roles if permission in viewer.on_owner(each)]
    mine = [*([] if viewer.user_id is None else [viewer.user_id]), *owners]
    roles = [role.value for role, held in PERMISSIONS.items() if permission in held]
    return any_of(
        [
            {"owner_id": {"$in": mine}},
            {"grants": {"$elemMatch": {"actor_id": {"$in": mine}, "role": {"$in": roles}}}},
        ]
    )


def _too_many(count: int, settings: Settings) -> Refused:
    return Refused(
        ErrorCode.QUOTA_EXCEEDED,
        f"It would change {count:,} models: {settings.max_bulk_models:,} are allowed at once. Narrow the filter.",
        "filter",
    )


# Within the job ---------------------------------------------------------------------------------


async def models_to_change(reads: Reads, settings: Settings, wanted: Row) -> list[ObjectId]:
    """In the order of their ids; all of them as they were at one moment. QUOTA_EXCEEDED where they have
    become too many."""
    changes = BulkChanges.stored(wanted)
    viewer, database = reads.viewer, reads.database
    query = all_of(
        [
            viewer.visible,
            await with_holders(reads, decode(wanted["query"])),
            *(may_filter(viewer, each) for each in changes.permissions),
        ]
    )
    most = settings.max_bulk_models
    # A snapshot: else one whose place in an index moves meanwhile could be found twice, or not at all.
    async with database.client.start_session(snapshot=True) as session:
        found = database.data["models"].find(
            query,
            {"_id": 1},
            limit=most + 1,
            batch_size=most + 1,
            session=session,
            max_time_ms=database.query_timeout_ms,
        )
        ids = [row["_id"] async for row in found]
    if len(ids) > most:
        raise _too_many(len(ids), settings)
    return sorted(ids)


async def change_model_in(
    database: Database,
    session: AsyncClientSession,
    viewer: Viewer,
    model: Row,
    changes: BulkChanges,
) -> bool:
    """As `updateModel`, `archiveModel` and `restoreModel` do it, within the transaction that read the
    model. False where it is so already. When it is refused nothing was written."""
    for permission in changes.permissions:
        may(viewer, permission, model)
    fields: Row = {}
    if changes.visibility is not None:
        fields["visibility"] = changes.visibility.value
    if changes.add_tags or changes.remove_tags:
        fields["tags"] = changed_tags(
            model["tags"], changes.add_tags, changes.remove_tags, "addTags"
        )
    is_changed = any(differs(model[name], value) for name, value in fields.items())
    state = ModelState(model["state"])
    goal = changes.state or state
    if is_changed and ModelState.ACTIVE not in (state, goal):
        refuse_unless_active(model)
    by, after = viewer.person_id(), model
    if goal is ModelState.ACTIVE and state is not goal:
        after = await set_state(database, session, after, goal, EventKind.MODEL_RESTORED, by=by)
    if is_changed:
        after = await set_fields(database, session, after, fields, by=by)
    if goal is ModelState.ARCHIVED and state is not goal:
        after = await set_state(database, session, after, goal, EventKind.MODEL_ARCHIVED, by=by)
    return bool(after["revision"] != model["revision"])


async def read_models(
    database: Database, session: AsyncClientSession, viewer: Viewer, ids: Collection[ObjectId]
) -> dict[ObjectId, Row]:
    """Those that the viewer sees, to be changed within the transaction."""
    found = database.data["models"].find(
        {"_id": {"$in": list(ids)}, **viewer.visible},
        session=session,
        max_time_ms=database.query_timeout_ms,
    )
    return {row["_id"]: row async for row in found}
