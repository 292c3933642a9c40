"""Subscriptions. All that follow the same and want the same answers form a group: each change is
looked at once, each event executed and encoded once, however many receive it.

To begin is always: follow, then read, then tell, so that nothing falls between. Whoever comes back
with `after` is first told what was missed: from what its group has kept, else from the log.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from contextvars import Context as Variables
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import orjson
import strawberry
from graphql import (
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    GraphQLError,
    InlineFragmentNode,
    SelectionNode,
    VariableDefinitionNode,
    VariableNode,
    Visitor,
    visit,
)
from graphql.execution.values import VariableValues

from modelharbor.auth.viewer import Viewer
from modelharbor.context import Context
from modelharbor.db.base import Row, utc_now
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.errors import BadRequest, BadUserInput, CursorExpired, Forbidden, Unavailable
from modelharbor.events.changes import Change
from modelharbor.events.cursors import decode
from modelharbor.events.reader import Reader
from modelharbor.events.replay import missed
from modelharbor.loaders.base import Sharing
from modelharbor.observability.metrics import Metrics
from modelharbor.settings import Settings
from modelharbor.streams.base import Follower, Happening, Source, Subscribed

from .arguments import Binder, Frozen
from .declaration import Computed, Loaded, Streamed, declaration
from .documents import Document, Operation
from .execute import run
from .failures import Problem, any_problem, expected, problem
from .kept import Kept
from .plan import Plan
from .selection import BACKREF, NotPlanned, Selection

log = logging.getLogger(__name__)
KEPT: Final = 256  # events that a group keeps for those who come back
LINGER_SECONDS: Final = 30.0  # how long a group waits for somebody to come back
AGAIN_SECONDS: Final = 0.5  # after a failure that may pass
PATIENCE: Final = 20  # failures, before an event is told with what could not be read
AT_ONCE: Final = 500  # receivers of an event, some 5 ms, before others have a turn
JOINING: Final = 2**62  # above the number of any happening
PASSED_OVER: Final = ("after", "max_rate_hz")
"""Arguments that say nothing about what an event looks like."""


class Sink(Protocol):
    """Where the events of one subscription go. Nothing here waits."""

    def send(self, payload: bytes, key: Hashable) -> None:
        """An answer in JSON. With a `key` it may be dropped for a later one of that key."""

    def complete(self) -> None: ...

    def fail(self, problems: list[Problem]) -> None:
        """The subscription has ended by these errors."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A subscription as a client asks for it; all of it is valid."""

    document: Document
    operation: Operation
    variables: Mapping[str, Any]
    values: VariableValues | None
    base_url: str
    """Of links in answers: who comes by another name of the server gets other links."""
    context: Callable[[Viewer], Context]


class Place(NamedTuple):
    """How far a subscription has come."""

    position: str
    sequence: int


def moved(place: Place | None, happening: Happening) -> Place:
    """Once the happening was told."""
    if place is None:
        return Place(happening.position, happening.sequence)
    return Place(max(happening.position, place.position), max(happening.sequence, place.sequence))


@dataclass(slots=True, eq=False)
class _Told:
    """An event with its answer."""

    happening: Happening
    payload: bytes


@dataclass(slots=True, eq=False)
class Subscription:
    """One client's."""

    asked: Asked
    viewer: Viewer
    sink: Sink
    place: Place | None = None
    serial: int = 0  # of the group's happenings, the last that it has or shall not get
    group: "_Group | None" = None

    def leave(self) -> None:
        if self.group is not None:
            self.group.remove(self)
            self.group = None


class Live:
    """All subscriptions of one process."""

    def __init__(
        self,
        schema: strawberry.Schema,
        database: Database,
        reader: Reader,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self.schema, self.database, self.reader = schema, database, reader
        self.settings, self.metrics = settings, metrics
        metrics.subscriptions.set_function(
            lambda: sum(len(g.members) for g in self.groups.values())
        )
        self.frozen: Frozen = Kept(256, 2**16)
        self.groups: dict[Hashable, _Group] = {}
        self.fields: Kept[object, _Field] = Kept(1000, 1000)
        self.checks: dict[Hashable, asyncio.Task[None]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.shut_down: dict[Callable[[], None], None] = {}
        """Called when the process is about to end: whoever holds a connection closes it then."""
        self.is_closing = False

    def shut(self) -> None:
        """Tell everyone to go elsewhere, after what waits to be told. More calls change nothing."""
        if self.is_closing:
            return
        self.is_closing = True

        async def shut() -> None:
            for group in list(self.groups.values()):
                with suppress(Exception):
                    await group.tell_pending()
            for close in list(self.shut_down):
                close()

        self.begin(shut())

    async def close(self) -> None:
        """End what still runs."""
        await ended(*self.tasks)

    def begin(self, work: Any) -> "asyncio.Task[None]":
        """A task of the process's own: no operation's count of commands sees what it does."""
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work, context=Variables())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def subscribe(self, asked: Asked, viewer: Viewer, sink: Sink) -> Subscription:
        """Follow from now on, or from `after` on. Raises a HarborError where that may not be."""
        subscription = Subscription(asked, viewer, sink)
        await self.join(subscription)
        return subscription

    async def renew(self, subscription: Subscription, viewer: Viewer) -> None:
        """Go on with other rights, from where it is. Raises where it no longer may."""
        subscription.leave()
        subscription.viewer = viewer
        await self.join(subscription)

    async def join(self, subscription: Subscription) -> None:
        asked, viewer = subscription.asked, subscription.viewer
        spot = self.field(asked.operation, asked.document)
        subscribed = spot.subscribed(asked)
        source = subscribed.source
        await self.check(source, asked, viewer)
        if subscription.place is None and subscribed.after is not None:
            if source.query is None:
                raise BadUserInput(
                    "This subscription takes no `after`: it begins with all there is."
                )
            subscription.place = Place(
                *decode(
                    source.stream,
                    subscribed.after,
                    now=utc_now(),
                    days=self.settings.event_days,
                )
            )
        elif subscription.place is not None and source.query is None:
            raise Forbidden("Your rights have changed: subscribe again.")
        key = (
            asked.operation,
            spot.varying(asked.variables),
            source,
            subscribed.rate,
            asked.base_url,
            self.rights(spot, source, asked, viewer),
        )
        group = self.groups.get(key)
        if group is None:
            group = self.groups[key] = _Group(self, key, spot, asked, subscribed, viewer)
            group.start()
        await group.join(subscription)

    async def check(self, source: Source, asked: Asked, viewer: Viewer) -> None:
        """May the viewer watch it? Many who come at once, after a server went down, ask once."""
        key = source, viewer.token_id, viewer.principals, viewer.scopes
        asking = self.checks.get(key)
        if asking is None:
            asking = self.checks[key] = self.begin(source.check(asked.context(viewer)))
            asking.add_done_callback(lambda done: self.checks.pop(key, None))
        await asyncio.shield(asking)

    def rights(self, spot: "_Field", source: Source, asked: Asked, viewer: Viewer) -> Hashable:
        """What of a viewer the answers hang on: who is equal in it shares them."""
        sharing = spot.sharing(self.schema, asked)
        if Sharing.NEVER in (sharing, source.sharing):
            return viewer.token_id, viewer.principals, viewer.scopes
        if Sharing.EQUAL_RIGHTS in (sharing, source.sharing):
            return viewer.principals
        return None

    def field(self, operation: Operation, document: Document) -> "_Field":
        found = self.fields.get(operation)
        if found is None:
            found = _Field(self.schema, operation, document, self.frozen)
            self.fields.put(operation, found, 1)
        return found


class _Field:
    """The one root field of a subscription."""

    def __init__(
        self, schema: strawberry.Schema, operation: Operation, document: Document, frozen: Frozen
    ) -> None:
        self.operation = operation
        root = schema._schema.subscription_type
        assert root is not None  # validated
        node = _root_field(document, operation)
        self.definition = root.fields.get(node.name.value) if node else None
        if node is None or self.definition is None:
            raise BadRequest("A subscription has one field, which is none of introspection.")
        own = self.definition.extensions[BACKREF]
        what = declaration(own)
        assert isinstance(what, Streamed)  # every field of Subscription is
        self.name: str = own.python_name
        self.binder = Binder(schema, self.definition, own, node, what.subscribed, frozen)
        self.ignored = _only_used_in(operation, document, node, own)
        self._sharing: Sharing | None = None

    def subscribed(self, asked: Asked) -> Subscribed:
        """Raises BadUserInput, in the words of whatever reads the arguments."""
        if asked.values is None:
            raise BadUserInput("The variables do not fit the operation.")
        try:
            found = self.binder(asked.values, asked.variables)
        except (
            GraphQLError
        ) as error:  # such as null where the variable may be null, not the argument
            raise BadUserInput(error.message) from None
        assert isinstance(found, Subscribed)
        return found

    def varying(self, variables: Mapping[str, Any]) -> bytes:
        """The variables on which answers hang."""
        kept = {name: value for name, value in variables.items() if name not in self.ignored}
        return orjson.dumps(kept, option=orjson.OPT_SORT_KEYS)

    def sharing(self, schema: strawberry.Schema, asked: Asked) -> Sharing:
        """The narrowest of all that is read for an answer, over all ways through the document."""
        if self._sharing is None:
            self._sharing = self._narrowest(schema, asked)
        return self._sharing

    def _narrowest(self, schema: strawberry.Schema, asked: Asked) -> Sharing:
        plan = asked.operation.plan(schema, asked.values) if asked.values else ""
        if not isinstance(plan, Plan) or asked.operation.has_switches:
            return Sharing.NEVER
        assert asked.values is not None
        try:
            selection = Selection(
                schema._schema, asked.operation.document, asked.operation.node, asked.values
            )
        except NotPlanned:
            return Sharing.NEVER
        found = Sharing.EVERYBODY
        for each in selection.fields:
            if isinstance(each.what, Computed) and "viewer" in each.what.parameters:
                return Sharing.NEVER
            if isinstance(each.what, Loaded):
                if each.what.loader.sharing is Sharing.NEVER:
                    return Sharing.NEVER
                if each.what.loader.sharing is Sharing.EQUAL_RIGHTS:
                    found = Sharing.EQUAL_RIGHTS
        return found


def _root_field(document: Document, operation: Operation) -> FieldNode | None:
    """Through fragments, too; None where there are several or none."""
    found: dict[str, FieldNode] = {}
    fragments = {
        each.name.value: each
        for each in document.node.definitions
        if isinstance(each, FragmentDefinitionNode)
    }
    waiting: list[SelectionNode] = list(operation.node.selection_set.selections)
    while waiting:
        node = waiting.pop()
        if isinstance(node, FieldNode):
            found[(node.alias or node.name).value] = node
        elif isinstance(node, InlineFragmentNode):
            waiting += node.selection_set.selections
        elif isinstance(node, FragmentSpreadNode):
            waiting += fragments[node.name.value].selection_set.selections
    return next(iter(found.values())) if len(found) == 1 else None


def _only_used_in(
    operation: Operation, document: Document, root: FieldNode, own: Any
) -> frozenset[str]:
    """Variables that stand nowhere but in arguments that say nothing about what an event looks like."""
    names = {argument.python_name for argument in own.arguments} & set(PASSED_OVER)
    ignored = {
        argument.value.name.value
        for argument in root.arguments or ()
        if isinstance(argument.value, VariableNode)
        and argument.name.value in {"after", "maxRateHz"}
        and names
    }
    uses: dict[str, int] = {}

    class Uses(Visitor):
        def enter_variable(self, node: Any, _key: Any, parent: Any, *_: Any) -> None:
            if not isinstance(parent, VariableDefinitionNode):
                uses[node.name.value] = uses.get(node.name.value, 0) + 1

    visit(document.node, Uses())
    return frozenset(name for name in ignored if uses.get(name) == 1)


class _Group:
    """Follows one source, for all who want equal answers."""

    def __init__(
        self,
        live: Live,
        key: Hashable,
        spot: _Field,
        asked: Asked,
        subscribed: Subscribed,
        viewer: Viewer,
    ) -> None:
        self.live, self.key, self.spot, self.asked = live, key, spot, asked
        self.source, self.rate, self.viewer = subscribed.source, subscribed.rate, viewer
        self.is_logged = self.source.query is not None
        self.follower: Follower = self.source.follow()
        self.members: dict[Subscription, None] = {}
        self.changes: list[Change] = []
        self.changed = asyncio.Event()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unsubscribe: Callable[[], None] = lambda: None
        self.kept: deque[_Told] = deque()
        self.kept_from = ""  # what came after this place is all kept
        self.serial = self.told = 0  # of happenings: known, and told
        self.standing: tuple[Happening, asyncio.Future[bytes]] | None = None
        self.pending: dict[Hashable, Happening] = {}
        self.due: dict[Hashable, float] = {}
        self.task: asyncio.Task[None] | None = None
        self.linger: asyncio.TimerHandle | None = None
        self.is_over = False
        self.error: Exception | None = None  # that ended it

    # ---- those who take part

    def start(self) -> None:
        self.task = self.live.begin(self.run())
        self.ready.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def join(self, subscription: Subscription) -> None:
        subscription.group = self
        self.stay()
        self.members.setdefault(subscription, None)  # it keeps the group, and gets nothing yet
        subscription.serial = JOINING
        try:
            await asyncio.shield(self.ready)
            if subscription.place is None:
                await self.tell_standing(subscription)
            else:
                await self.tell_missed(subscription)
            if self.is_over and subscription.group is self:
                raise self.error or Unavailable("The server is closing.")
        except BaseException:
            self.remove(subscription)
            raise

    def remove(self, subscription: Subscription) -> None:
        self.members.pop(subscription, None)
        if not self.members and not self.is_over and self.linger is None:
            loop = asyncio.get_running_loop()
            self.linger = loop.call_later(LINGER_SECONDS, self.end)

    def stay(self) -> None:
        if self.linger is not None:
            self.linger.cancel()
            self.linger = None

    async def tell_standing(self, subscription: Subscription) -> None:
        """What stands now, once it is encoded and still what stands."""
        while True:
            standing = self.follower.standing()
            if standing is None:
                break
            payload = await self.standing_payload(standing)
            if self.follower.standing() is standing:
                self.hand(subscription, standing, payload)
                break
        subscription.serial = self.serial
        if standing is not None and standing.is_final:
            self.finish(subscription)

    async def standing_payload(self, standing: Happening) -> bytes:
        if self.standing is None or self.standing[0] is not standing:
            answer: asyncio.Future[bytes] = asyncio.ensure_future(self.payload(standing))
            self.standing = standing, answer
        return await asyncio.shield(self.standing[1])

    async def tell_missed(self, subscription: Subscription) -> None:
        """What came after the subscription's place, then what stands where that is newer."""
        assert subscription.place is not None
        while subscription.place.position < self.kept_from:
            if await self.tell_logged(subscription):
                return None
        for told in self.kept:
            if self.is_news(subscription, told.happening) and self.source.permits(
                subscription.viewer, told.happening
            ):
                self.hand(subscription, told.happening, told.payload)
                if told.happening.is_final:
                    return self.finish(subscription)
        subscription.serial = self.told
        standing = self.follower.standing()
        if standing is not None and self.serial == self.told:  # else it is about to be told
            if standing.sequence > subscription.place.sequence:
                await self.tell_standing(subscription)
            elif standing.is_final:
                self.finish(subscription)
        return None

    async def tell_logged(self, subscription: Subscription) -> bool:
        """From the log; whether that was all there will be."""
        assert subscription.place is not None
        assert self.source.query is not None
        covered = self.live.reader.position
        context = self.asked.context(subscription.viewer)
        after = subscription.place.position
        reader = self.live.reader
        async for batch in missed(self.live.database, reader, self.source.query, after):
            for happening in await self.source.of_events(context, batch):
                if self.is_news(subscription, happening) and self.source.permits(
                    subscription.viewer, happening
                ):
                    self.hand(subscription, happening, await self.payload(happening))
                    if happening.is_final:
                        self.finish(subscription)
                        return True
            context = self.asked.context(subscription.viewer)
        place = subscription.place
        subscription.place = Place(max(place.position, covered), place.sequence)
        return False

    def is_news(self, subscription: Subscription, happening: Happening) -> bool:
        place = subscription.place
        if place is None or not self.is_logged:
            return True
        if happening.sequence and happening.sequence <= place.sequence:
            return False
        if happening.is_passing:
            return happening.position >= place.position
        return happening.position > place.position

    def hand(self, subscription: Subscription, happening: Happening, payload: bytes) -> None:
        subscription.place = moved(subscription.place, happening)
        self.live.metrics.deliveries.inc()
        subscription.sink.send(payload, happening.key if happening.is_passing else None)

    def finish(self, subscription: Subscription) -> None:
        subscription.leave()
        subscription.sink.complete()

    # ---- what is followed

    async def run(self) -> None:
        try:
            await self.begin()
            while not self.is_over:
                await self.wait()
                if self.changes:
                    await self.look()
                await self.tell_pending(only_due=True)
                if self.source.pace:
                    await asyncio.sleep(self.source.pace)
        except asyncio.CancelledError:
            self.end()
            raise
        except Exception as error:
            self.end([any_problem(error, f"subscription {self.spot.name}")], error)

    async def begin(self) -> None:
        reader = self.live.reader
        await reader.ready()
        self.unsubscribe = reader.subscribe(self.source.topics, self.take, self.lost)
        self.kept_from = reader.position
        await self.follower.begin(self.asked.context(self.viewer), reader.position)
        self.ready.set_result(None)

    def take(self, change: Change) -> None:
        self.changes.append(change)
        self.changed.set()

    def lost(self) -> None:
        error = CursorExpired("What happened is no longer kept: read anew, then subscribe again.")
        self.end([problem(error)], error)

    async def wait(self) -> None:
        """Until something changed, or something pending is due."""
        timeout = None
        if self.pending:
            now = asyncio.get_running_loop().time()
            timeout = max(0.0, min(self.due.get(key, 0.0) for key in self.pending) - now)
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.changed.wait()
        self.changed.clear()

    async def look(self) -> None:
        changes, self.changes = self.changes, []
        while True:
            try:
                context = self.asked.context(self.viewer)
                found = await self.follower.happenings(context, changes)
                break
            except Exception as error:
                if expected(error) is None:
                    raise
                await asyncio.sleep(AGAIN_SECONDS)
        first, self.serial = self.serial + 1, self.serial + len(found)
        for serial, happening in enumerate(found, first):
            if happening.is_passing and self.rate is not None:
                self.pending[happening.key] = happening
                self.told = max(self.told, serial)
            else:
                self.pending.pop(happening.key, None)
                await self.tell(serial, happening)

    async def tell_pending(self, *, only_due: bool = False) -> None:
        now = asyncio.get_running_loop().time()
        for key in list(self.pending):
            if not only_due or self.due.get(key, 0.0) <= now:
                happening = self.pending.pop(key)
                if self.rate is not None:
                    self.due[key] = now + 1 / self.rate
                self.serial += 1
                await self.tell(self.serial, happening)
        if len(self.due) > len(self.pending) + KEPT:
            self.due = {key: at for key, at in self.due.items() if at > now}

    async def tell(self, serial: int, happening: Happening) -> None:
        """To everyone who takes part, and has not been told more already."""
        payload = await self.payload(happening)
        if not happening.is_passing:
            self.kept.append(_Told(happening, payload))
            if len(self.kept) > KEPT:
                self.kept_from = self.kept.popleft().happening.position
        self.told = max(self.told, serial)
        key = happening.key if happening.is_passing else None
        permitted: dict[int, bool] = {}
        # Most stand at the same place, and come to the same: it is worked out once.
        before: Place | None = None
        after, is_news, delivered = moved(None, happening), True, 0
        for number, member in enumerate(list(self.members), 1):
            if number % AT_ONCE == 0:
                await asyncio.sleep(0)
                permitted.clear()  # a viewer may be gone, and another one be in its place
            if member.group is not self or member.serial >= serial:
                continue
            if member.place != before:
                before = member.place
                after, is_news = moved(before, happening), self.is_news(member, happening)
            if not is_news:
                continue
            viewer = member.viewer
            is_permitted = permitted.get(id(viewer))
            if is_permitted is None:
                is_permitted = self.source.permits(viewer, happening)
                permitted[id(viewer)] = is_permitted
            if is_permitted:
                member.serial, member.place = serial, after
                member.sink.send(payload, key)
                delivered += 1
                if happening.is_final:
                    self.finish(member)
        self.live.metrics.deliveries.inc(delivered)

    async def payload(self, happening: Happening) -> bytes:
        """The answer for one event; again where something is not there that may come back."""
        row: Row = {
            **happening.row,
            "stream": self.source.stream,
            "position": happening.position,
            "sequence": happening.sequence,
        }
        asked, schema = self.asked, self.live.schema
        self.live.metrics.encodings.inc()
        for attempt in range(PATIENCE):
            loop = asyncio.get_running_loop()
            deadline = loop.time() + self.live.settings.operation_timeout_seconds
            answer = await run(
                schema,
                asked.document,
                asked.operation,
                asked.variables,
                asked.context(self.viewer),
                deadline,
                asked.values,
                {self.spot.name: row},
            )
            codes = {each["extensions"].get("code") for each in answer.errors}
            if happening.is_passing or not codes & {"UNAVAILABLE", "TIMEOUT"}:
                break
            if attempt + 1 < PATIENCE:
                await asyncio.sleep(AGAIN_SECONDS)
        content: dict[str, Any] = {"data": answer.data}
        if answer.errors:
            first = asked.context(self.viewer).request_id  # of whoever came first
            content["errors"] = [
                {**made, "extensions": {**made["extensions"], "requestId": first}}
                for made in answer.errors
            ]
        try:
            return orjson.dumps(content)
        except TypeError as error:  # a value that JSON does not have came out of a JSON scalar
            return orjson.dumps({"data": None, "errors": [any_problem(error, "encoding")]})

    def end(self, problems: list[Problem] | None = None, error: Exception | None = None) -> None:
        """Nobody follows any more, or nobody can."""
        if self.is_over:
            return
        self.is_over, self.error = True, error
        self.stay()
        self.unsubscribe()
        if self.live.groups.get(self.key) is self:
            del self.live.groups[self.key]
        if not self.ready.done():
            self.ready.set_exception(error or Unavailable("The server is closing."))
        for member in list(self.members):
            if member.serial != JOINING:  # who joins just now finds out
                member.group = None
                if problems:
                    member.sink.fail(problems)
        self.members.clear()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
