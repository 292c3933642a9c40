"""A real uvicorn with the whole application, on the loop of the test, and jobs that move."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import pymongo
import uvicorn
from bson import ObjectId

from modelharbor.app import create_app
from modelharbor.auth.viewer import job_principals
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.jobs import JobKind, JobState
from modelharbor.db.tokens import Permission
from modelharbor.execution.live import Live
from modelharbor.http.server import options
from modelharbor.jobs.put import put_job
from modelharbor.jobs.states import change_state
from modelharbor.resolvers.tokens import issue_token
from modelharbor.schema.nodes import global_id
from modelharbor.settings import Settings
from tests.documents import insert_actor


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield  # they are pytest's


@dataclass
class Served:
    port: int
    database: Database
    live: Live
    server: uvicorn.Server
    user_id: ObjectId
    token: str

    @property
    def http(self) -> str:
        return f"http://127.0.0.1:{self.port}/graphql"

    @property
    def ws(self) -> str:
        return f"ws://127.0.0.1:{self.port}/graphql"

    async def put(self, **values: Any) -> Row:
        """A job of the user's."""

        async def work(session: Any) -> Row:
            return await put_job(
                self.database,
                session,
                kind=JobKind.REINDEX,
                input={},
                **{
                    "created_by_id": self.user_id,
                    "principals": job_principals(self.user_id),
                    **values,
                },
            )

        return await self.database.transaction(work)

    async def become(self, job: Row, *states: JobState) -> None:
        for state in states:

            async def work(session: Any, state: JobState = state) -> Row | None:
                return await change_state(self.database, session, {"_id": job["_id"]}, state)

            assert await self.database.transaction(work) is not None

    async def progress(self, job: Row, current: int, message: str | None = None) -> None:
        """As a worker writes it."""
        await self.database.data["jobs"].update_one(
            {"_id": job["_id"]},
            {
                "$set": {"progress.current": current, "progress.message": message},
                "$inc": {"progress.sequence": 1},
            },
        )

    async def another_token(self, login: str) -> str:
        user = await insert_actor(login)
        _, token = await issue_token(self.database, user.id, "t", list(Permission), None)
        return token


def id_of(job: Row) -> str:
    return global_id("Job", job["_id"])


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Served]:
    """The server, with a user of all scopes; its database is emptied at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    app = create_app(settings)
    given = options("127.0.0.1", port, 1) | {"app": app, "factory": False}
    server = _Server(uvicorn.Config(**given))
    task = asyncio.create_task(server.serve())
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    state = server.lifespan.state
    database: Database = state["database"]
    try:
        user = await insert_actor("ada")
        _, token = await issue_token(database, user.id, "test", list(Permission), None)
        yield Served(port, database, state["live"], server, user.id, token)
    finally:
        with pymongo.timeout(60):
            for name in await database.data.list_collection_names():
                if name != "migrations":
                    await database.data[name].delete_many({})
        server.should_exit = True
        await asyncio.wait_for(task, 30)
