"""A worker process with handlers that do what their job's input says: `python -m tests.faults.worker CONCURRENCY`.

Each start is noted in `starts`, each effect in `effects`, within the fenced transaction.
"""

import asyncio
import os
import sys
import time
from typing import Any

from modelharbor.db.base import Row
from modelharbor.db.jobs import JobKind
from modelharbor.settings import Settings
from modelharbor.worker.process import be_worker
from modelharbor.worker.tools import HandlerSpec, Tools


async def handler(job: Row, tools: Tools) -> Row:
    """`do`: "die", or "work" (`seconds`, with a report now and then), then one effect."""
    given = job["input"]
    data = tools.database.data
    note = {"job": job["_id"], "token": job["token"], "pid": os.getpid(), "at": time.time()}
    await data["starts"].insert_one(note)
    if given["do"] == "die":
        os._exit(9)
    until = time.monotonic() + given["seconds"]
    while time.monotonic() < until:
        tools.report(int((given["seconds"] - until + time.monotonic()) * 1000))
        await asyncio.sleep(min(0.05, max(0.0, until - time.monotonic())))

    async def effect(session: Any) -> None:
        # An earlier attempt may have come this far and died before it was settled. That two at once
        # do not both find nothing is what the fence is for.
        if await data["effects"].find_one({"job": job["_id"]}, session=session) is None:
            await data["effects"].insert_one(
                {"job": job["_id"], "token": job["token"]}, session=session
            )

    await tools.database.transaction(effect)
    return {"token": job["token"]}


if __name__ == "__main__":
    handlers = {kind: HandlerSpec(handler, at_once=100) for kind in JobKind}
    be_worker(Settings(), handlers, int(sys.argv[1]), schedule=())
