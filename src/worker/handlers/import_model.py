"""IMPORT_MODEL: a folder below an import root becomes a version, as `modelharbor import` does it."""

import asyncio
from contextlib import AbstractAsyncContextManager
from typing import Final

from pymongo.asynchronous.client_session import AsyncClientSession

from modelharbor.db.base import Row
from modelharbor.db.jobs import Level
from modelharbor.errors import Unavailable
from modelharbor.resolvers.folders import allowed_folder
from modelharbor.resolvers.imports import ImportResult, Phase, Progress, import_folder
from modelharbor.resolvers.jobs import model_subject
from modelharbor.schema.nodes import global_id
from modelharbor.worker.tools import Tools

STEPS: Final = {
    Phase.HASHING: "hash",
    Phase.STORING: "store",
    Phase.INSPECTING: "inspect",
    Phase.PUBLISHING: "publish",
}
DOING: Final = {
    Phase.HASHING: "Reading",
    Phase.STORING: "Storing",
    Phase.INSPECTING: "Inspecting",
}


PRECEDING: Final[dict[Phase, tuple[Phase, ...]]] = {
    Phase.HASHING: (),
    Phase.STORING: (Phase.HASHING,),
    Phase.INSPECTING: (Phase.HASHING, Phase.STORING),
}


async def import_model(job: Row, tools: Tools) -> Row:
    """Input: {source, folder, owner, name}. Twice is once: the folder is recognised by its contents."""
    given = job["input"]
    if given["source"] not in tools.settings.import_roots:
        raise Unavailable(
            "This worker has not got the source: give MODELHARBOR_IMPORT_ROOTS to all workers."
        )
    viewer = tools.viewer  # with the rights of now
    root, folder = await asyncio.to_thread(
        allowed_folder, tools.settings, given["source"], given["folder"]
    )
    totals: dict[Phase, int] = {}  # bytes of each phase, as far as they are known

    def report(progress: Progress) -> None:
        """What is stored and inspected was hashed before, and is as much at most: so the sum only
        grows."""
        if progress.phase is Phase.HASHING:
            totals.update(dict.fromkeys(DOING, progress.total))
        totals[progress.phase] = progress.total
        before = sum(totals[each] for each in PRECEDING[progress.phase])
        tools.report(
            before + progress.done,
            sum(totals.values()),
            unit="bytes",
            message=f"{DOING[progress.phase]} {progress.path}",
        )

    def phase(phase: Phase) -> AbstractAsyncContextManager[None]:
        return tools.step(STEPS[phase])

    result = await import_folder(
        tools.database,
        tools.storage,
        tools.fence,
        viewer,
        folder,
        given["owner"],
        given["name"],
        settings=tools.settings,
        max_card_bytes=tools.settings.max_card_bytes,
        report=report,
        within=root,
        phase=phase,
    )
    for note in result.notes:
        tools.log(note)
    for each in result.troubled:
        tools.log(str(each), Level.WARNING)

    async def name_subject(session: AsyncClientSession) -> None:
        await tools.database.data["jobs"].update_one(
            {"_id": job["_id"]},
            {"$set": {"subject": model_subject(result.model_id)}},
            session=session,
        )

    await tools.database.transaction(name_subject)
    tools.report(sum(totals.values()), sum(totals.values()))
    return _told(result)


def _told(result: ImportResult) -> Row:
    return {
        "modelId": str(global_id("Model", result.model_id)),
        "versionId": str(global_id("ModelVersion", result.version_id)),
        "number": result.number,
        "digest": result.digest,
        "status": result.status.value,
        "statusReason": result.status_reason,
        "isNew": result.is_new,
        "files": result.files,
        "sizeBytes": result.size_bytes,
        "storedBytes": result.stored_bytes,
        "notes": list(result.notes),
    }
