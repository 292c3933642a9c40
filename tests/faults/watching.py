"""Those who watch jobs over sockets and come back, those who move the jobs, and what one heard of the other."""

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bson import ObjectId
from pymongo.errors import PyMongoError
from websockets.asyncio.client import ClientConnection, connect

from modelharbor.db.base import Row
from modelharbor.db.jobs import ENDED, JobState
from modelharbor.errors import HarborError
from modelharbor.jobs.states import TRANSITIONS, change_state
from tests.live.serving import Served, id_of

WALKED = frozenset({JobState.QUEUED, JobState.RUNNING, JobState.RETRYING})
EVENT = "{ cursor job { id state progress { sequence } } }"
ONE = f"""subscription One($id: ID!, $after: Cursor) {{
  jobProgress(id: $id, after: $after, maxRateHz: 50) {EVENT}
}}"""
ALL = f"subscription All($after: Cursor) {{ jobs(after: $after) {EVENT} }}"


@dataclass
class Moved:
    """A job that a test moves, and the states that it was given: sequence and state, as committed."""

    served: Served
    row: Row
    states: list[tuple[int, str]] = field(default_factory=list)

    @property
    def job_id(self) -> ObjectId:
        found: ObjectId = self.row["_id"]
        return found

    @property
    def state(self) -> JobState:
        return JobState(self.row["state"])

    async def become(self, state: JobState) -> None:
        async def work(session: Any) -> Row | None:
            return await change_state(self.served.database, session, {"_id": self.job_id}, state)

        row = await self.served.database.transaction(work)
        assert row is not None
        self.row = row
        self.states.append((row["progress"]["sequence"], state.value))

    @property
    def goes_on(self) -> bool:
        return self.state not in ENDED

    async def look(self) -> None:
        """What it has become, where that was not told; as soon as somebody can say it."""
        while True:
            try:
                [self.row] = await self.served.database.find("jobs", {"_id": self.job_id})
            except (PyMongoError, HarborError):
                await asyncio.sleep(0.1)
            else:
                return

    async def look_back(self) -> None:
        """Take its states from the log."""
        rows = await self.served.database.find("events", {"job_id": self.job_id})
        jobs = [row["job"] for row in rows]
        self.states = [(job["progress"]["sequence"], job["state"]) for job in jobs]

    async def step(self, chance: random.Random) -> None:
        """Progress, most of the time, or another state, none that leads to the end."""
        if self.state is JobState.RUNNING and chance.random() < 0.7:
            await self.served.progress(self.row, chance.randrange(1000))
        else:
            await self.become(chance.choice(sorted(TRANSITIONS[self.state] & WALKED, key=str)))

    async def end(self, chance: random.Random) -> None:
        if self.state is not JobState.RUNNING:
            await self.become(JobState.RUNNING)
        while self.goes_on:
            await self.become(chance.choice(sorted(TRANSITIONS[self.state] - WALKED, key=str)))


async def moved(served: Served) -> Moved:
    row = await served.put()
    return Moved(served, row, [(row["progress"]["sequence"], row["state"])])


@dataclass
class Heard:
    """Of one job."""

    events: list[tuple[int, str]] = field(default_factory=list)  # sequence and state

    def compare(self, states: Sequence[tuple[int, str]]) -> "Counts":
        """With what was committed, from the first that was heard on."""
        if not self.events:
            return Counts(missed=len(states))
        begin, _ = self.events[0]
        committed = {each for each in states if each[0] >= begin}
        known = {sequence for sequence, _ in committed}
        told = [each for each in self.events if each[0] in known]
        pairs = zip(self.events, self.events[1:], strict=False)
        return Counts(
            missed=len(committed - set(told)),
            repeated=len(told) - len({sequence for sequence, _ in told}),
            backwards=sum(after[0] < before[0] for before, after in pairs),
        )


@dataclass
class Counts:
    missed: int = 0
    repeated: int = 0
    backwards: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            self.missed + other.missed,
            self.repeated + other.repeated,
            self.backwards + other.backwards,
        )


@dataclass
class Watcher:
    """Follows one job until its end, or all jobs until it is told to leave; comes back with `after`."""

    served: Served
    job: Row | None = None
    heard: dict[str, Heard] = field(default_factory=dict)  # by the global id of the job
    cursor: str | None = None
    is_complete: bool = False
    events: int = 0

    async def connected(
        self, seconds: float | None = None, enough: Callable[[], bool] = lambda: False
    ) -> bool:
        """One connection, until the end, or `enough` after some event, or until it is cut off after so
        many seconds: whether it was."""
        connection: ClientConnection | None = None
        try:
            async with asyncio.timeout(seconds):
                connection = await connect(
                    self.served.ws,
                    subprotocols=["graphql-transport-ws"],  # type: ignore[list-item]  # it wants a NewType
                    compression=None,
                    ping_interval=None,
                )
                await self._follow(connection, enough)
        except TimeoutError:
            return True
        finally:
            if connection is not None:
                connection.transport.abort()
                await connection.wait_closed()
        return False

    async def _follow(self, connection: ClientConnection, enough: Callable[[], bool]) -> None:
        payload = {"authorization": f"Bearer {self.served.token}"}
        await connection.send(json.dumps({"type": "connection_init", "payload": payload}))
        assert json.loads(await connection.recv()) == {"type": "connection_ack"}
        asked = (
            {"after": self.cursor}
            if self.job is None
            else {"after": self.cursor, "id": id_of(self.job)}
        )
        operation = {"query": ONE if self.job else ALL, "variables": asked}
        await connection.send(json.dumps({"type": "subscribe", "id": "1", "payload": operation}))
        while not (self.is_complete or enough()):
            self._take(json.loads(await connection.recv()))

    def _take(self, message: dict[str, Any]) -> None:
        if message["type"] == "complete":
            self.is_complete = True
            return
        assert message["type"] == "next", message
        assert "errors" not in message["payload"], message
        [event] = message["payload"]["data"].values()
        self.cursor = event["cursor"]
        job = event["job"]
        heard = self.heard.setdefault(job["id"], Heard())
        heard.events.append((int(job["progress"]["sequence"]), job["state"]))
        self.events += 1

    def has_heard_of(self, jobs: Sequence[Moved]) -> bool:
        return all(id_of(job.row) in self.heard for job in jobs)

    def has_heard_ends_of(self, jobs: Sequence[Moved]) -> bool:
        ends = {state.value for state in ENDED}
        return self.has_heard_of(jobs) and all(
            self.heard[id_of(job.row)].events[-1][1] in ends for job in jobs
        )

    def compare(self, jobs: Sequence[Moved]) -> Counts:
        """With those of the jobs that it followed."""
        followed = [job for job in jobs if self.job is None or job.row["_id"] == self.job["_id"]]
        return sum(
            (self.heard.get(id_of(job.row), Heard()).compare(job.states) for job in followed),
            Counts(),
        )
