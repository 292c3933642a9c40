"""Hundreds of users in a process of their own: `python -m bench.cache.users`.

Reads from stdin, as one line of JSON, who they are and what they do; says in a line of JSON when they
begin, and in another what came of it. A user is a bare asyncio protocol, so that the users take little
of the time that is measured; each answer is compared with what was acknowledged before it was asked for.
"""

import asyncio
import sys
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any, Final, cast

import orjson
import uvloop

from bench.live.watching import percentile

from .drawing import (
    SUMMARY,
    WRITE_SHARE,
    Catalogue,
    Drawing,
    Kind,
    Listed,
    like_body,
    update_body,
)
from .truth import Truth, number_in

CONNECT_SECONDS: Final = 30.0
LAST_SECONDS: Final = 15.0  # for what is unanswered when time is up; an operation has 10
AGAIN_SECONDS: Final = 0.05  # before a connection that ended is opened again
PROBLEMS: Final = 5  # told of all
LIMITED: Final = b"RATE_LIMITED"
ERRORS: Final = b'"errors":'
YOGA_HIT: Final = b'"responseCache":{"hit":true'


@dataclass(frozen=True, slots=True)
class Phase:
    name: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who the users are and what they do."""

    host: str
    port: int
    tokens: tuple[str, ...]
    """One for each user, with which they like."""
    signed_in: int
    """So many of them read with their token too; the others as nobody."""
    writer: str
    """The token of those who change models."""
    rate: float | None
    """Things a second that all users begin; None: each the next one with the answer to the last."""
    phases: tuple[Phase, ...]
    first: int
    """The numbers of this run's writes are not below it."""
    seed: int = 1
    write_share: float = WRITE_SHARE


@dataclass(slots=True)
class Tally:
    """What came of the things that were begun in a phase. Times in milliseconds."""

    times: "dict[str, array[float]]" = field(default_factory=dict)  # by kind
    errors: int = 0
    limited: int = 0
    stale: int = 0
    hits: int = 0  # that the server itself told of

    def report(self) -> dict[str, Any]:
        reads = _merged(self.times, [kind for kind in Kind if not kind.is_write])
        writes = _merged(self.times, [kind for kind in Kind if kind.is_write])
        return {
            "all": _figures(sorted([*reads, *writes])),
            "reads": _figures(sorted(reads)),
            "writes": _figures(sorted(writes)),
            "kinds": {kind: len(times) for kind, times in self.times.items()},
            "errors": self.errors,
            "limited": self.limited,
            "stale": self.stale,
            "hits": self.hits,
        }


class Stale:
    """Counts an answer once, however many models in it are stale."""

    def __init__(self, tally: Tally) -> None:
        self.tally: Tally | None = tally

    def __call__(self) -> None:
        if self.tally is not None:
            self.tally.stale += 1
            self.tally = None


def _merged(times: "dict[str, array[float]]", kinds: Sequence[Kind]) -> list[float]:
    return [each for kind in kinds for each in times.get(kind.value, ())]


def _figures(times: Sequence[float]) -> dict[str, float]:
    """Of sorted times."""
    if not times:
        return {"count": 0, "p50": 0.0, "p95": 0.0, "p99": 0.0, "longest": 0.0}
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "longest": 1.0}
    figures = {name: percentile(times, share) for name, share in shares.items()}
    return {"count": len(times), **figures}


@dataclass(slots=True)
class Doing:
    """What a user has sent and waits for."""

    kind: Kind
    place: int
    since: float
    """When it should have been sent, by the clock that all processes of a machine share."""
    phase: int
    moment: int
    number: int | None = None
    """Of a write of the summary."""
    likes: bool | None = None
    """From then on."""


class Response:
    """Puts the pieces of an HTTP answer together."""

    __slots__ = ("data",)

    def __init__(self) -> None:
        self.data = b""

    def add(self, data: bytes) -> tuple[int, bytes, bytes] | None:
        """Status, head in lower case and body, when it is whole."""
        self.data = data = self.data + data if self.data else data
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return None
        head = data[:end].lower()
        at = head.find(b"\r\ncontent-length:")
        if at >= 0:
            stop = head.find(b"\r\n", at + 2)
            length = int(head[at + 17 : stop if stop >= 0 else end])
            if len(data) - end - 4 < length:
                return None
            body = data[end + 4 :]
        else:  # in chunks
            if not data.endswith(b"0\r\n\r\n"):
                return None
            body = _joined(data[end + 4 :])
        self.data = b""
        return int(head[9:12]), head, body


def _joined(chunks: bytes) -> bytes:
    found: list[bytes] = []
    at = 0
    while True:
        stop = chunks.index(b"\r\n", at)
        size = int(chunks[at:stop].partition(b";")[0], 16)
        if size == 0:
            return b"".join(found)
        found.append(chunks[stop + 2 : stop + 2 + size])
        at = stop + 2 + size + 2


class User(asyncio.Protocol):
    """One person over one connection, which does one thing at a time."""

    def __init__(self, fleet: "Fleet", number: int) -> None:
        self.fleet = fleet
        self.number = number
        self.transport: asyncio.Transport | None = None
        self.response = Response()
        self.doing: Doing | None = None
        self.due = 0.0
        self.is_resting = False  # it has nothing more to do

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        whole = self.response.add(data)
        if whole is not None:
            doing, self.doing = self.doing, None
            if doing is not None:
                self.fleet.answered(self, doing, *whole)

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self.response = Response()
        doing, self.doing = self.doing, None
        if doing is not None:
            self.fleet.broken(self, doing)

    def send(self, doing: Doing, token: str | None, body: bytes) -> None:
        if self.transport is None:
            self.fleet.reconnect(self, doing, token, body)
            return
        self.doing = doing
        authorization = "" if token is None else f"authorization: Bearer {token}\r\n"
        head = f"{self.fleet.head}{authorization}content-length: {len(body)}\r\n\r\n"
        self.transport.write(head.encode() + body)


class Fleet:
    """All users."""

    def __init__(self, crowd: Crowd, catalogue: Catalogue) -> None:
        self.crowd = crowd
        self.drawing = Drawing(catalogue, crowd.seed, crowd.write_share)
        self.models = catalogue.models
        self.truth = Truth(crowd.first)
        self.head = (
            f"POST /graphql HTTP/1.1\r\nhost: {crowd.host}:{crowd.port}\r\n"
            "content-type: application/json\r\naccept: application/json\r\n"
        )
        self.users = [User(self, number) for number in range(len(crowd.tokens))]
        self.bodies: dict[Any, bytes] = {}
        self.likes: set[tuple[int, int]] = set()
        self.tallies = [Tally() for _ in crowd.phases]
        self.problems: list[str] = []
        self.tasks: set[asyncio.Task[None]] = set()
        self.begins = 0.0
        self.ends: list[float] = []
        self.at_work = 0
        self.is_done = asyncio.Event()

    async def connect(self) -> None:
        async with asyncio.timeout(CONNECT_SECONDS):
            for user in self.users:
                await self.open(user)

    async def open(self, user: User) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: user, self.crowd.host, self.crowd.port)

    async def run(self, begins: float) -> None:
        """From `begins` through all phases, and until what was sent is answered."""
        self.begins, end = begins, begins
        for phase in self.crowd.phases:
            end += phase.seconds
            self.ends.append(end)
        self.at_work = len(self.users)
        random = self.drawing.random
        for user in self.users:
            # At a rate, they do not all begin at once.
            wait = 0.0 if self.crowd.rate is None else random.random() * self.pause
            user.due = begins + wait
            self._at(user.due, user)
        try:
            async with asyncio.timeout(end - monotonic() + LAST_SECONDS):
                await self.is_done.wait()
        except TimeoutError:
            for user in self.users:
                if user.doing is not None:
                    self._problem(user.doing, "no answer")
        for user in self.users:
            if user.transport is not None:
                user.doing = None
                user.transport.close()

    @property
    def pause(self) -> float:
        """Seconds between the things of one user, on average."""
        assert self.crowd.rate is not None
        return len(self.users) / self.crowd.rate

    def _at(self, due: float, user: User) -> None:
        asyncio.get_running_loop().call_later(max(0.0, due - monotonic()), self.turn, user)

    def turn(self, user: User) -> None:
        now = monotonic()
        if now >= self.ends[-1]:
            self._rest(user)
            return
        drawing, crowd = self.drawing, self.crowd
        kind, place = drawing.kind(), drawing.model()
        since, phase = self._since(user.due, now), self._phase(now)
        doing = Doing(kind, place, since, phase, self.truth.moment)
        if kind is Kind.UPDATE:
            doing.number = self.truth.begin()
            update = update_body(self.models[place], doing.number)
            user.send(doing, crowd.writer, orjson.dumps(update))
        elif kind is Kind.LIKE:
            doing.likes = (user.number, place) not in self.likes
            like = like_body(self.models[place], likes=doing.likes)
            user.send(doing, crowd.tokens[user.number], orjson.dumps(like))
        else:
            token = crowd.tokens[user.number] if user.number < crowd.signed_in else None
            user.send(doing, token, self.body(kind, place))

    def body(self, kind: Kind, place: int) -> bytes:
        key = self.drawing.read_key(kind, place)
        found = self.bodies.get(key)
        if found is None:
            found = self.bodies[key] = orjson.dumps(self.drawing.read(kind, place))
        return found

    def _since(self, due: float, now: float) -> float:
        """Timers go to the millisecond: who has waited for nothing but one has waited for nothing."""
        return due if self.crowd.rate is not None and now - due > 0.002 else now

    def _phase(self, now: float) -> int:
        for number, end in enumerate(self.ends):
            if now < end:
                return number
        return len(self.ends) - 1

    def answered(self, user: User, doing: Doing, status: int, head: bytes, body: bytes) -> None:
        now = monotonic()
        tally = self.tallies[doing.phase]
        times = tally.times.get(doing.kind.value)
        if times is None:
            times = tally.times[doing.kind.value] = array("d")
        times.append((now - doing.since) * 1000)
        if status != 200 or ERRORS in body:
            if LIMITED in body:
                tally.limited += 1
            self._problem(doing, f"{status} {body[:300].decode(errors='replace')}")
        else:
            data = orjson.loads(body)["data"]
            if doing.kind.is_write:
                self.wrote(user, doing, next(iter(data.values())))
            else:
                self.read(doing, data)
                if b"\r\nage:" in head or YOGA_HIT in body:
                    tally.hits += 1
        self._next(user)

    def read(self, doing: Doing, data: dict[str, Any]) -> None:
        nodes = data["models"]["nodes"] if "models" in data else [data["model"]]
        if not nodes or nodes[0] is None:
            self._problem(doing, "nothing")
            return
        known, first = self.truth.models, self.crowd.first
        shown = [
            (node["id"], number_in(node["summary"], SUMMARY, first))
            for node in nodes
            if node["id"] in known
        ]
        if shown:
            self.truth.judge(shown, doing.moment, Stale(self.tallies[doing.phase]))

    def wrote(self, user: User, doing: Doing, payload: dict[str, Any]) -> None:
        model = payload["model"]
        if payload["userErrors"] or model is None:
            self._problem(doing, f"{payload['userErrors']}")
        elif doing.number is not None:
            self.truth.end(model["id"], doing.number, model["revision"])
        elif doing.likes:
            self.likes.add((user.number, doing.place))
        else:
            self.likes.discard((user.number, doing.place))

    def broken(self, user: User, doing: Doing) -> None:
        """The connection ended before the answer came."""
        self._problem(doing, "the connection ended")
        self._next(user)

    def reconnect(self, user: User, doing: Doing, token: str | None, body: bytes) -> None:
        """Servers may close connections between two requests."""

        async def connect() -> None:
            while user.transport is None:
                try:
                    await self.open(user)
                except OSError:
                    if monotonic() > self.ends[-1]:
                        self.broken(user, doing)
                        return
                    await asyncio.sleep(AGAIN_SECONDS)
            user.send(doing, token, body)

        task = asyncio.get_running_loop().create_task(connect())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _problem(self, doing: Doing, told: str) -> None:
        self.tallies[doing.phase].errors += 1
        if len(self.problems) < PROBLEMS:
            self.problems.append(f"{doing.kind.value}: {told}")

    def _next(self, user: User) -> None:
        if self.crowd.rate is None:
            user.due = monotonic()
            self.turn(user)
            return
        user.due += self.drawing.random.expovariate(1 / self.pause)
        if user.due <= monotonic():
            self.turn(user)
        else:
            self._at(user.due, user)

    def _rest(self, user: User) -> None:
        if not user.is_resting:
            user.is_resting = True
            self.at_work -= 1
            if self.at_work == 0:
                self.is_done.set()

    def report(self) -> dict[str, Any]:
        phases = zip(self.crowd.phases, self.tallies, strict=True)
        return {
            "phases": {phase.name: tally.report() for phase, tally in phases},
            "written": len(self.truth.models),
            "problems": self.problems,
        }


def to_line(crowd: Crowd, catalogue: Catalogue) -> bytes:
    """For stdin."""
    return orjson.dumps({"crowd": asdict(crowd), "catalogue": asdict(catalogue)}) + b"\n"


def from_line(line: bytes) -> tuple[Crowd, Catalogue]:
    given = orjson.loads(line)
    crowd, catalogue = given["crowd"], given["catalogue"]
    crowd["phases"] = tuple(Phase(**phase) for phase in crowd["phases"])
    crowd["tokens"] = tuple(crowd["tokens"])
    models = tuple(Listed(**model) for model in catalogue["models"])
    return Crowd(**crowd), Catalogue(models, tuple(catalogue["places"]))


async def _main() -> None:
    fleet = Fleet(*from_line(await asyncio.to_thread(sys.stdin.buffer.readline)))
    await fleet.connect()
    begins = monotonic() + 0.5
    _tell({"begins": begins})
    await fleet.run(begins)
    _tell(fleet.report())


def _tell(told: dict[str, Any]) -> None:
    sys.stdout.buffer.write(orjson.dumps(told) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_main())
