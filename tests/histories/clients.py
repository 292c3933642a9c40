"""Those who read and those who write, and the log of what they were told."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Final, Protocol

import orjson
from beanie import PydanticObjectId
from pymongo.errors import PyMongoError

from modelharbor.auth.viewer import model_principals
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.files import FileDocument
from modelharbor.schema.nodes import global_id, parse_global_id
from tests.documents import row_of

from .asked import Asking, Question, Told
from .checker import NEVER, Read, Register, Value, Write
from .wire import Answer, Broken, Connections, Socket
from .world import (
    ACTIVE,
    ALIASES,
    ANYBODY,
    ARCHIVED,
    COMING,
    DELETED,
    LIKING,
    ORGANIZATION,
    OUTSIDER,
    TAGS,
    TASKS,
    WORDS,
    Known,
    World,
    stored,
)

READERS: Final = (ANYBODY, ANYBODY, "ada", "bob", COMING, "dan", OUTSIDER, "ops")
ON_SOCKETS: Final = (ANYBODY, "ada", "bob")
"""Whose roles stay: an open socket has a few seconds to hear of a change."""
SETTLE_SECONDS: Final = 1.5
"""After a broken write, until what it came to stands in the database."""
SAMPLES: Final = 5
MOST_MADE: Final = 20
"""Models at a time, so that a page has all."""


class Process(Protocol):
    """A server, as clients see it."""

    @property
    def name(self) -> str: ...

    @property
    def port(self) -> int: ...

    @property
    def is_up(self) -> bool:
        """It answers, or will: connections to it that break are worth a count."""


@dataclass
class Log:
    """All that happened, by one clock."""

    writes: list[Write] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    layers: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    """Requests without an answer, by what the server was."""
    errors: Counter[str] = field(default_factory=Counter)
    """Answers with errors, by code."""
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    happened: list[tuple[float, str]] = field(default_factory=list)
    slowest: tuple[float, float, str] = (0.0, 0.0, "")
    """How many seconds, since when, and what it was."""

    def took(self, begin: float, end: float, what: str) -> None:
        self.slowest = max(self.slowest, (end - begin, begin, what))

    @property
    def hits(self) -> int:
        return self.layers["l1"] + self.layers["l2"]

    def example(self, text: str) -> None:
        if len(self.examples) < SAMPLES:
            self.examples.append(text[:600])


@dataclass
class Clients:
    world: World
    database: Database
    processes: list[Process]
    log: Log
    after_writes: float = 0.7
    """How often a write is followed at once by reads of the same, by every process."""
    by_socket: float = 0.15
    """How often a question goes by WebSocket."""
    connections: dict[str, Connections] = field(default_factory=dict)
    sockets: dict[tuple[str, str], Socket] = field(default_factory=dict)
    believed: dict[Register, Value] = field(default_factory=dict)
    """Of registers that are written by one at a time."""
    locks: dict[Register, asyncio.Lock] = field(default_factory=dict)
    numbers: "count[int]" = field(default_factory=lambda: count(1))
    created: "count[int]" = field(default_factory=count)
    kept: dict[tuple[str, bytes], Answer] = field(default_factory=dict)
    """What was answered last to a GET, by the one who asked and the address."""
    is_over: bool = False
    """All end what they are at, and begin nothing more."""

    def up(self) -> list[Process]:
        return [process for process in self.processes if process.is_up] or self.processes

    def authorization(self, login: str) -> str | None:
        return None if login == ANYBODY else f"Bearer {self.world.people[login].token}"

    # Reading

    async def read(
        self,
        login: str,
        question: Question,
        process: Process | None = None,
        token: tuple[str, Register] | None = None,
    ) -> None:
        """Ask, and write down what was told. `token`: another than the usual, and its register."""
        chance = self.world.chance
        process = process or chance.choice(self.up())
        authorization = f"Bearer {token[0]}" if token else self.authorization(login)
        can_be_by_socket = token is None and login in ON_SOCKETS and not question.is_of_person
        is_by_socket = can_be_by_socket and chance.random() < self.by_socket
        way = "ws" if is_by_socket else chance.choice(("get", "get", "post", "text"))
        begin = time.monotonic()
        was_up = process.is_up
        try:
            answer = await self._ask(process, question, authorization, login, way)
        except Broken:
            is_behind = way == "ws" and self.sockets[process.name, login].is_behind
            is_down = not (was_up and process.is_up) or is_behind
            self.log.broken["down" if is_down else "up"] += 1
            if not is_down:
                self.log.example(f"broken: {login} by {way} from {process.name}")
            await asyncio.sleep(0.05)
            return
        end = time.monotonic()
        self.log.took(begin, end, f"{login} by {way} from {process.name}")
        self.log.layers[answer.layer] += 1
        told = Told()
        codes = answer.codes
        if token is not None and set(codes) <= {"UNAUTHENTICATED"}:
            told.seen[token[1]] = not codes
        if codes:
            if token is None or codes != ["UNAUTHENTICATED"]:
                self.log.errors.update(codes)
                self.log.example(f"{login} by {way}: {answer.body.decode()}")
        else:
            question.understand(answer.json["data"], told)
        by = f"{login} by {way} from {process.name} ({answer.layer}): {question.document.split('(')[0].split('{')[0].strip()} {dict(question.variables)}"
        self.log.reads.append(
            Read(begin, end, told.seen, told.facts, told.members, told.counts, by)
        )

    async def _ask(
        self, process: Process, question: Question, authorization: str | None, login: str, way: str
    ) -> Answer:
        if way == "ws":
            key = (process.name, login)
            if key not in self.sockets:
                self.sockets[key] = Socket(partial(getattr, process, "port"), authorization)
            operation = {"query": question.document, "variables": dict(question.variables)}
            return await self.sockets[key].ask(operation)
        connections = self.connections[process.name]
        headers = {"authorization": authorization} if authorization else {}
        if way == "text":
            operation = {"query": question.document, "variables": dict(question.variables)}
            return await connections.post(operation, headers)
        if self.world.chance.random() < 0.3:
            headers["accept-encoding"] = "gzip"
        named = {"persistedQuery": {"version": 1, "sha256Hash": question.hash}}
        known = {"variables": dict(question.variables), "extensions": named}
        if way == "get":
            texts = {name: orjson.dumps(value).decode() for name, value in known.items()}
            answer = await self._get(connections, texts, headers)
        else:
            answer = await connections.post(known, headers)
        if answer.codes == ["PERSISTED_QUERY_NOT_FOUND"]:
            return await connections.post({"query": question.document, **known}, headers)
        return answer

    async def _get(
        self, connections: Connections, parameters: dict[str, str], headers: dict[str, str]
    ) -> Answer:
        """As a browser does, that has what it was answered last."""
        key = (headers.get("authorization", ""), orjson.dumps(parameters))
        kept = self.kept.get(key)
        if kept is not None and self.world.chance.random() < 0.7:
            headers = {**headers, "if-none-match": kept.headers["etag"]}
        answer = await connections.get(parameters, headers)
        if answer.status == 304:
            assert kept is not None
            self.log.layers["304"] += 1
            return replace(kept, headers=answer.headers)
        if "etag" in answer.headers:
            self.kept[key] = answer
        return answer

    async def go_on_reading(self, pause: float) -> None:
        chance = self.world.chance
        while not self.is_over:
            if self.world.tokens and chance.random() < 0.1:
                given = chance.choice(self.world.tokens[:4] + self.world.tokens)
                question = Asking(self.world, given.login).one(self.world.models["m0"])
                await self.read(given.login, question, token=(given.text, given.register))
            else:
                login = chance.choice(READERS)
                await self.read(login, Asking(self.world, login).draw())
            await asyncio.sleep(chance.uniform(0, 2 * pause))

    async def look(self, registers: list[Register]) -> None:
        """Read what was written, at once, by every process."""
        chance = self.world.chance
        register = chance.choice(registers)
        reads = []
        for process in self.up():
            if register[0] == "token":
                given = next(each for each in self.world.tokens if each.register == register)
                question = Asking(self.world, given.login).one(self.world.models["m0"])
                token = (given.text, given.register)
                reads.append(self.read(given.login, question, process, token))
            else:
                login = chance.choice(READERS)
                reads.append(self.read(login, Asking(self.world, login).about(register), process))
        await asyncio.gather(*reads)

    # Writing

    async def write(
        self,
        values: dict[Register, Value],
        work: Callable[[Write], Awaitable[None]],
        is_direct: bool = False,
        by: str = "",
    ) -> None:
        """`work` says in the write what came of it. Registers whose values come again are written by
        one at a time, who knows what they were."""
        write = Write(values, time.monotonic(), is_direct=is_direct, by=by)
        self.log.writes.append(write)
        await work(write)
        if write.end == NEVER and not write.is_refused:
            await asyncio.sleep(SETTLE_SECONDS)
            await self._settle(write)
        if not write.is_refused:
            self.believed.update(values)
        if write.end < NEVER and self.world.chance.random() < self.after_writes:
            await self.look(list(values))

    async def _settle(self, write: Write) -> None:
        """What came of a write that was not answered, from the database itself."""
        while True:
            begin = time.monotonic()
            try:
                found = {
                    each: await stored(self.database, self.world, each) for each in write.values
                }
            except PyMongoError:
                await asyncio.sleep(0.1)
                continue
            break
        if all(found[each] == value for each, value in write.values.items()):
            write.there_by = time.monotonic()
            self.log.reads.append(Read(begin, write.there_by, found, by="the database"))
        elif len(write.values) == 1 and next(iter(write.values)) in self.locks:
            write.is_refused = True

    def lock(self, register: Register) -> asyncio.Lock:
        return self.locks.setdefault(register, asyncio.Lock())

    def now(self, register: Register) -> Any:
        return self.believed.get(register, self.world.initial[register])

    def by_api(
        self,
        login: str,
        field: str,
        given: dict[str, Any],
        then: Callable[[dict[str, Any]], None] = lambda payload: None,
        selection: str = "",
    ) -> Callable[[Write], Awaitable[None]]:
        kind = f"{field[0].upper()}{field[1:]}Input"
        document = f"mutation M($input: {kind}!) {{ {field}(input: $input) {{ {selection} userErrors {{ code message }} }} }}"

        async def work(write: Write) -> None:
            process = self.world.chance.choice(self.up())
            write.by = f"{field} by {login} to {process.name}"
            headers = {"authorization": str(self.authorization(login))}
            body = {"query": document, "variables": {"input": given}}
            was_up = process.is_up
            write.begin = time.monotonic()
            try:
                answer = await self.connections[process.name].post(body, headers)
            except Broken:
                self.log.broken["up" if was_up and process.is_up else "down"] += 1
                return
            end = time.monotonic()
            self.log.took(write.begin, end, write.by)
            if answer.codes:
                self.log.errors.update(answer.codes)
                self.log.example(f"{field} {given}: {answer.body.decode()}")
                return
            payload = answer.json["data"][field]
            if payload["userErrors"]:
                write.is_refused = True
                self.log.refused.update(each["code"] for each in payload["userErrors"])
                if payload["userErrors"][0]["code"] not in ("INVALID_TRANSITION", "CONFLICT"):
                    self.log.example(f"{field} {given}: {payload['userErrors']}")
                return
            write.end = end
            then(payload)

        return work

    def directly(
        self, change: Callable[[Any], Awaitable[Any]], *, together: bool = False
    ) -> Callable[[Write], Awaitable[None]]:
        """Past the API; `together`: in a transaction."""

        async def work(write: Write) -> None:
            write.begin = time.monotonic()
            try:
                if together:
                    await self.database.transaction(change)
                else:
                    await change(None)
            except Exception as error:
                self.log.errors[f"direct {type(error).__name__}"] += 1
                return
            write.end = time.monotonic()

        return work

    async def go_on_writing(self, pause: float) -> None:
        chance = self.world.chance
        ways: list[tuple[Callable[[], Awaitable[None]], float]] = [
            (self.summary, 5.0),
            (self.tags, 3.0),
            (self.task, 2.0),
            (self.like, 2.0),
            (self.alias, 2.0),
            (self.label, 1.0),
            (self.card, 1.0),
            (self.visibility, 1.5),
            (self.state, 1.0),
            (self.create, 1.5),
            (self.delete, 1.0),
            (self.undelete, 0.5),
            (self.version, 0.5),
            (self.grant, 1.5),
            (self.membership, 1.0),
            (self.revoke, 1.0),
        ]
        while not self.is_over:
            [way] = chance.choices([each for each, _ in ways], [weight for _, weight in ways])
            await way()
            await asyncio.sleep(chance.uniform(0, 2 * pause))

    async def go_on_writing_directly(self, pause: float) -> None:
        chance = self.world.chance
        ways = [
            self.direct_summary,
            self.direct_tags,
            self.direct_display,
            self.direct_file,
            self.direct_summaries,
            self.direct_visibility,
            self.direct_membership,
            self.direct_revoke,
        ]
        while not self.is_over:
            await chance.choice(ways)()
            await asyncio.sleep(chance.uniform(0, 2 * pause))

    def new(self, word: str) -> str:
        return f"{word} {next(self.numbers)}"

    def word(self) -> str:
        return self.new(self.world.chance.choice(WORDS))

    async def summary(self) -> None:
        """Several at once may write it: each value is another."""
        model, text = self.world.draw(), self.word()
        given = {"id": model.global_id, "summary": text}
        await self.write(
            {model.register("summary"): text}, self.by_api("ada", "updateModel", given)
        )

    async def tags(self) -> None:
        model, tag = self.world.draw(), self.world.chance.choice(TAGS)
        register = model.register("tags")
        async with self.lock(register):
            change = "removeTags" if tag in self.now(register) else "addTags"
            given = {"id": model.global_id, change: [tag]}
            values = {register: self.now(register) ^ {tag}}
            await self.write(values, self.by_api("ada", "updateModel", given))

    async def task(self) -> None:
        model = self.world.draw()
        register = model.register("task")
        async with self.lock(register):
            others = sorted({None, *TASKS} - {self.now(register)}, key=str)
            task = self.world.chance.choice(others)
            given = {"id": model.global_id, "task": task}
            await self.write({register: task}, self.by_api("ada", "updateModel", given))

    async def like(self) -> None:
        model, login = self.world.draw(), self.world.chance.choice(LIKING)
        register = model.register("like", login)
        async with self.lock(register):
            liked = not self.now(register)
            if login not in ("ada",) and model.key[0] in "pq":
                return
            field = "likeModel" if liked else "unlikeModel"
            await self.write({register: liked}, self.by_api(login, field, {"id": model.global_id}))

    async def alias(self) -> None:
        model, alias = self.world.draw(), self.world.chance.choice(ALIASES)
        register = model.register("alias", alias)
        async with self.lock(register):
            was = self.now(register)
            if was is not None and self.world.chance.random() < 0.2:
                given: dict[str, Any] = {"modelId": model.global_id, "name": alias}
                await self.write({register: None}, self.by_api("ada", "deleteModelAlias", given))
                return
            number = (was or 0) % 3 + 1
            given = {
                "modelId": model.global_id,
                "name": alias,
                "versionId": model.version_id(number),
            }
            await self.write({register: number}, self.by_api("ada", "setModelAlias", given))

    async def label(self) -> None:
        model, number = self.world.draw(), self.world.chance.randint(1, 3)
        text = self.new(f"{model.key} {number}")
        given = {"id": model.version_id(number), "label": text}
        await self.write(
            {model.register("label", str(number)): text},
            self.by_api("ada", "updateModelVersion", given),
        )

    async def card(self) -> None:
        model, text = self.world.draw(), self.new("Card")
        given = {"id": model.global_id, "cardMarkdown": text}
        await self.write({model.register("card"): text}, self.by_api("ada", "updateModel", given))

    async def visibility(self) -> None:
        model = self.world.models[self.world.chance.choice(("q0", "q0", "p1", "m3"))]
        register = model.register("visibility")
        async with self.lock(register):
            others = {"PUBLIC", "PRIVATE", "INTERNAL"} - {self.now(register)}
            value = self.world.chance.choice(sorted(others))
            given = {"id": model.global_id, "visibility": value}
            await self.write({register: value}, self.by_api("ada", "updateModel", given))

    async def state(self) -> None:
        model = self.world.models[self.world.chance.choice(("m5", "m4", "p1"))]
        register = model.register("state")
        async with self.lock(register):
            is_active = self.now(register) == ACTIVE
            field = "archiveModel" if is_active else "restoreModel"
            value = ARCHIVED if is_active else ACTIVE
            given = {"id": model.global_id}
            await self.write({register: value}, self.by_api("ada", field, given))

    async def create(self) -> None:
        model = self.world.models.get(f"c{next(self.created)}")
        if model is None or len(self.made()) >= MOST_MADE:
            await self.delete()
            return
        text = self.word()
        tags = self.world.chance.choice(([], [TAGS[0]]))
        if self.world.chance.random() < 0.7:
            # Nobody finds it, and everybody is to find it as soon as it is there.
            asking = Asking(self.world, ANYBODY)
            await asyncio.gather(*[self.read(ANYBODY, asking.one(model), p) for p in self.up()])
        given = {
            "owner": model.owner,
            "name": model.name,
            "summary": text,
            "tags": tags,
            "visibility": "PUBLIC",
        }
        values: dict[Register, Value] = {
            model.register("state"): ACTIVE,
            model.register("summary"): text,
            model.register("tags"): frozenset(tags),
        }

        def made(payload: dict[str, Any]) -> None:
            found = parse_global_id(payload["model"]["id"])
            assert found is not None
            model.id = found.id

        model.is_begun = True
        async with self.lock(model.register("state")):
            await self.write(values, self.by_api("ada", "createModel", given, made, "model { id }"))

    def made(self) -> list[Known]:
        """Models that came to be meanwhile, and are there."""
        found = [each for each in self.world.begun() if each.key[0] == "c"]
        return [each for each in found if self.now(each.register("state")) == ACTIVE and each.id]

    async def delete(self) -> None:
        there = self.made()
        if len(there) < 3:
            return
        model = self.world.chance.choice(there)
        register = model.register("state")
        async with self.lock(register):
            if self.now(register) != ACTIVE:
                return
            given = {"id": model.global_id}
            await self.write({register: DELETED}, self.by_api("ada", "deleteModel", given))

    async def undelete(self) -> None:
        """Found by its name again."""
        if len(self.made()) >= MOST_MADE:
            return
        made = [each for each in self.world.begun() if each.key[0] == "c"]
        gone = [each for each in made if self.now(each.register("state")) == DELETED]
        if not gone:
            return
        model = self.world.chance.choice(gone)
        register = model.register("state")
        async with self.lock(register):
            if self.now(register) == DELETED:
                given = {"id": model.global_id}
                await self.write({register: ACTIVE}, self.by_api("ada", "restoreModel", given))

    async def version(self) -> None:
        model = self.world.draw()
        register = model.register("versions")
        async with self.lock(register):
            numbers = self.now(register)
            if len(numbers) > 40:
                return
            given = {"modelId": model.global_id}
            await self.write(
                {register: numbers | {max(numbers) + 1}},
                self.by_api("ada", "createModelVersion", given),
            )

    async def grant(self) -> None:
        """To one person, on a model that is private or becomes it."""
        model = self.world.models[self.world.chance.choice(("p0", "p0", "q0"))]
        register = model.register("grant", OUTSIDER)
        async with self.lock(register):
            role = (
                None if self.now(register) else self.world.chance.choice(("VIEWER", "MAINTAINER"))
            )
            given = {
                "subjectId": model.global_id,
                "actorId": global_id("User", self.world.people[OUTSIDER].id),
                "role": role,
            }
            await self.write({register: role}, self.by_api("ada", "grantRole", given))

    async def membership(self) -> None:
        register = ("member", COMING)
        async with self.lock(register):
            role = None if self.now(register) else self.world.chance.choice(("VIEWER", "ADMIN"))
            given = {
                "subjectId": global_id("Organization", self.world.organization_id),
                "actorId": global_id("User", self.world.people[COMING].id),
                "role": role,
            }
            await self.write({register: role}, self.by_api("ada", "grantRole", given))

    async def revoke(self) -> None:
        there = [each for each in self.world.tokens if self.now(each.register)]
        if len(there) < 3:
            return
        given = there[0]
        async with self.lock(given.register):
            if not self.now(given.register):
                return
            # Whom every process knows, as far as it keeps who holds a token.
            question = Asking(self.world, given.login).one(self.world.models["m0"])
            token = (given.text, given.register)
            await asyncio.gather(
                *[self.read(given.login, question, process, token) for process in self.up()]
            )
            asked = {"id": global_id("ApiToken", given.id)}
            await self.write(
                {given.register: False}, self.by_api(given.login, "revokeApiToken", asked)
            )

    # Past the API

    async def direct_summary(self) -> None:
        model, text = self.world.draw(), self.word()

        async def change(session: Any) -> None:
            await self.database.data["models"].update_one(
                {"_id": model.id}, {"$set": {"summary": text}, "$inc": {"revision": 1}}
            )

        values: dict[Register, Value] = {model.register("summary"): text}
        await self.write(values, self.directly(change), True, "a direct summary")

    async def direct_summaries(self) -> None:
        """Of several models, in one command or in one transaction."""
        models = [self.world.models[key] for key in ("m0", "m2", "p0")]
        text, together = self.word(), self.world.chance.random() < 0.5

        async def change(session: Any) -> None:
            if not together:
                await self.database.data["models"].update_many(
                    {"_id": {"$in": [model.id for model in models]}}, {"$set": {"summary": text}}
                )
                return
            for model in models:
                await self.database.data["models"].update_one(
                    {"_id": model.id}, {"$set": {"summary": text}}, session=session
                )

        values: dict[Register, Value] = {model.register("summary"): text for model in models}
        await self.write(values, self.directly(change, together=together), True, "summaries")

    async def direct_tags(self) -> None:
        model, tag = self.world.draw(), self.world.chance.choice(TAGS)
        register = model.register("tags")
        async with self.lock(register):
            wanted = self.now(register) ^ {tag}

            async def change(session: Any) -> None:
                await self.database.data["models"].update_one(
                    {"_id": model.id}, {"$set": {"tags": sorted(wanted)}}
                )

            await self.write({register: wanted}, self.directly(change), True, "direct tags")

    async def direct_display(self) -> None:
        login = self.world.chance.choice(("ada", ORGANIZATION, "bob"))
        text = self.new(login)

        async def change(session: Any) -> None:
            await self.database.data["actors"].update_one(
                {"login_lower": login}, {"$set": {"display_name": text}}
            )

        values: dict[Register, Value] = {("display", login): text}
        await self.write(values, self.directly(change), True, "a direct display name")

    async def direct_file(self) -> None:
        model, number = self.world.draw(), 3
        register = model.register("files", str(number))
        async with self.lock(register):
            paths = self.now(register)
            if len(paths) > 2:
                gone = sorted(paths)[-1]
                wanted = paths - {gone}

                async def change(session: Any) -> None:
                    await self.database.data["files"].delete_one(
                        {"version_id": model.versions[number], "path": gone}
                    )
            else:
                path = f"f{next(self.numbers):06}"
                wanted = paths | {path}
                row = row_of(
                    FileDocument(
                        version_id=PydanticObjectId(model.versions[number]),
                        model_id=PydanticObjectId(model.id),
                        path=path,
                        size_bytes=1,
                        sha256=f"{1:064x}",
                    )
                )

                async def change(session: Any) -> None:
                    await self.database.data["files"].insert_one(row)

            await self.write({register: wanted}, self.directly(change), True, "a direct file")

    async def direct_visibility(self) -> None:
        model = self.world.models["q0"]
        register, grants = model.register("visibility"), model.register("grant", OUTSIDER)
        async with self.lock(register), self.lock(grants):
            value = "PRIVATE" if self.now(register) != "PRIVATE" else "PUBLIC"
            role = self.now(grants)
            granted = [{"actor_id": self.world.people[OUTSIDER].id, "role": role}] if role else []
            principals = model_principals(
                {
                    "state": ACTIVE,
                    "visibility": value,
                    "owner_id": model.owner_id,
                    "grants": granted,
                }
            )

            async def change(session: Any) -> None:
                await self.database.data["models"].update_one(
                    {"_id": model.id}, {"$set": {"visibility": value, "principals": principals}}
                )

            await self.write({register: value}, self.directly(change), True, "direct visibility")

    async def direct_membership(self) -> None:
        register = ("member", COMING)
        mine = {
            "organization_id": self.world.organization_id,
            "user_id": self.world.people[COMING].id,
        }
        async with self.lock(register):
            role = None if self.now(register) else "VIEWER"

            async def change(session: Any) -> None:
                memberships = self.database.data["memberships"]
                if role is None:
                    await memberships.delete_one(mine)
                else:
                    await memberships.insert_one({**mine, "role": role, "created_at": utc_now()})

            await self.write({register: role}, self.directly(change), True, "direct membership")

    async def direct_revoke(self) -> None:
        there = [each for each in self.world.tokens if self.now(each.register)]
        if len(there) < 3:
            return
        given = there[-1]
        async with self.lock(given.register):
            if not self.now(given.register):
                return

            async def change(session: Any) -> None:
                await self.database.data["tokens"].update_one(
                    {"_id": given.id}, [{"$set": {"revoked_at": "$$NOW"}}]
                )

            await self.write({given.register: False}, self.directly(change), True, "revoked")


@asynccontextmanager
async def opened(
    world: World, database: Database, processes: list[Process], log: Log, by_socket: float
) -> AsyncIterator[Clients]:
    clients = Clients(world, database, processes, log, by_socket=by_socket)
    async with AsyncExitStack() as stack:
        for process in processes:
            connections = Connections(partial(getattr, process, "port"))
            clients.connections[process.name] = await stack.enter_async_context(connections)
        try:
            yield clients
        finally:
            for socket in clients.sockets.values():
                await socket.close()
