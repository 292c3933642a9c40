"""BULK_MUTATION: many models are changed in the same way, each exactly once.

Which ones is fixed first, in `bulk_batches`: what is changed may be what the filter asks for. Each batch
is one transaction, which changes its models, removes it and counts it: so whoever goes on after a crash
finds those that are left, and nothing of them done.
"""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.db.jobs import Level
from modelharbor.errors import ErrorCode, Refused, Unavailable
from modelharbor.execution.failures import expected
from modelharbor.loaders.base import Reads
from modelharbor.resolvers.access import full_name
from modelharbor.resolvers.bulk import (
    BulkChanges,
    change_model_in,
    models_to_change,
    read_models,
)
from modelharbor.schema.nodes import global_id
from modelharbor.worker.outcomes import unexpected
from modelharbor.worker.tools import JobCancelled, LeaseLost, Tools

from .checkpoints import Checkpoint

MODELS_AT_ONCE: Final = (
    20  # changed in one transaction: who changes one of them meanwhile waits for it
)
BATCHES_AT_ONCE: Final = 50  # read in one command
LIST_SECONDS: Final = 55.0  # to write the list; MongoDB ends a transaction after 60
CHANGE_SECONDS: Final = 8.0  # to change some, others' changes waited for
MOST_FAILURES: Final = 100  # that the result tells one by one
COUNTED: Final = ("changed", "unchanged", "failed")


async def change_models(job: Row, tools: Tools) -> Row:
    """Input: {wanted: {query, add_tags, remove_tags, visibility, state}}. Result: {changed, unchanged,
    failed, failures: [{id, fullName, code, message}]}, over all attempts."""
    wanted: Row = job["input"]["wanted"]
    beginning: Row = {"total": None, **dict.fromkeys(COUNTED, 0), "failures": []}
    work = _Changing(tools, Checkpoint(tools, beginning), BulkChanges.stored(wanted), tools.viewer)
    if work.done.values["total"] is None:
        await work.fix(wanted)
    while batches := await work.next_batches():
        for batch in batches:
            work.report()
            await work.change(batch)
    work.report()
    return {name: work.done.values[name] for name in (*COUNTED, "failures")}


@dataclass(slots=True)
class _Came:
    """What a transaction came to."""

    changed: int = 0
    unchanged: int = 0
    failures: list[Row] = field(default_factory=list)


def _failure(model_id: ObjectId, model: Row | None, code: str, message: str) -> Row:
    return {
        "id": str(global_id("Model", model_id)),
        "fullName": None if model is None else full_name(model),
        "code": code,
        "message": message,
    }


def _is_of_models(error: Exception) -> bool:
    """Whether it might not have happened without one of the models: others change it all the time, or
    it is stored as it should not be. Not when the job is to end."""
    if isinstance(error, JobCancelled | LeaseLost | Refused):
        return False
    return isinstance(error, Unavailable) or expected(error) is None


class _Changing:
    def __init__(
        self, tools: Tools, done: Checkpoint, changes: BulkChanges, viewer: Viewer
    ) -> None:
        self.done = done
        self._tools, self._changes, self._viewer = tools, changes, viewer
        self._database, self._mine = tools.database, {"job_id": tools.job["_id"]}
        self._batches = tools.database.data["bulk_batches"]

    def report(self) -> None:
        """Raises when the job was cancelled."""
        values = self.done.values
        self._tools.report(sum(values[name] for name in COUNTED), values["total"], unit="models")

    async def fix(self, wanted: Row) -> None:
        """Write down which models are to be changed."""
        reads = Reads(
            database=self._database,
            cache=self._tools.cache,
            viewer=self._viewer,
            links=DownloadLinks(b"", ""),  # none are made
        )
        ids = await models_to_change(reads, self._tools.settings, wanted)
        starts = range(0, len(ids), MODELS_AT_ONCE)

        async def write(session: AsyncClientSession) -> Row:
            # Of before it was cancelled, or given up, and then put again.
            await self._batches.delete_many(self._mine, session=session)
            batches = [
                {
                    "_id": ObjectId(),
                    **self._mine,
                    "number": number,
                    "model_ids": ids[start : start + MODELS_AT_ONCE],
                }
                for number, start in enumerate(starts)
            ]
            if batches:
                await self._batches.insert_many(batches, session=session)
            return {"total": len(ids)}

        await self.done.advance(write, LIST_SECONDS)

    async def next_batches(self) -> list[Row]:
        return await self._database.find(
            "bulk_batches", self._mine, sort={"number": 1}, limit=BATCHES_AT_ONCE
        )

    async def change(self, batch: Row) -> None:
        """The models of a batch together; where something stands in the way, each by itself."""
        ids: list[ObjectId] = batch["model_ids"]
        try:
            await self._advance(batch, [], partial(self._change, ids))
        except Exception as error:
            if not _is_of_models(error):
                raise
            for place, model_id in enumerate(ids):
                self.report()
                await self._alone(batch, model_id, ids[place + 1 :])

    async def _alone(self, batch: Row, model_id: ObjectId, left: Sequence[ObjectId]) -> None:
        try:
            await self._advance(batch, left, partial(self._change, [model_id]))
        except Exception as error:
            if not _is_of_models(error):
                raise
            if isinstance(error, Unavailable):
                code, message = ErrorCode.UNAVAILABLE.value, error.message
            else:
                code, message = unexpected(error, self._tools.job)
            failure = _failure(model_id, None, code, message)

            async def given_up(session: AsyncClientSession) -> _Came:
                return _Came(failures=[failure])

            await self._advance(batch, left, given_up)

    async def _advance(
        self,
        batch: Row,
        left: Sequence[ObjectId],
        change: Callable[[AsyncClientSession], Awaitable[_Came]],
    ) -> None:
        """Change models of a batch, of which these are left then."""
        came = _Came()

        async def work(session: AsyncClientSession) -> Row:
            nonlocal came
            came = await change(session)
            mine = {"_id": batch["_id"]}
            if left:
                only = {"$set": {"model_ids": list(left)}}
                await self._batches.update_one(mine, only, session=session)
            else:
                await self._batches.delete_one(mine, session=session)
            values = self.done.values
            return {
                "changed": values["changed"] + came.changed,
                "unchanged": values["unchanged"] + came.unchanged,
                "failed": values["failed"] + len(came.failures),
                "failures": [*values["failures"], *came.failures][:MOST_FAILURES],
            }

        await self.done.advance(work, CHANGE_SECONDS)
        for each in came.failures:
            name = each["fullName"] or each["id"]
            self._tools.log(f"{name}: {each['message']} [{each['code']}]", Level.WARNING)

    async def _change(self, ids: Sequence[ObjectId], session: AsyncClientSession) -> _Came:
        """One that is refused was not written to, and is no reason for the others."""
        viewer = await self._tools.viewer_now()
        models = await read_models(self._database, session, viewer, ids)
        came = _Came()
        for model_id in ids:
            model = models.get(model_id)
            try:
                if model is None:
                    raise Refused(ErrorCode.NOT_FOUND, "There is no such model that you may see.")
                is_changed = await change_model_in(
                    self._database, session, viewer, model, self._changes
                )
            except Refused as refused:
                code, message = refused.code.value, refused.message
                came.failures.append(_failure(model_id, model, code, message))
            else:
                came.changed += is_changed
                came.unchanged += not is_changed
        return came
