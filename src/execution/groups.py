"""All who follow the same and want the same answers: each change is looked at once, each event
executed and encoded once, however many receive it.

To begin is always: follow, then read, then tell, so that nothing falls between. Whoever comes back
with `after` is first told what was missed: from what the group has kept, else from the log.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import orjson

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import Row
from modelharbor.errors import CursorExpired, OperationTooComplex, Timeout, Unavailable
from modelharbor.events.changes import Change
from modelharbor.events.replay import missed
from modelharbor.streams.base import Follower, Happening, Place, Subscribed, Summing

from .execute import run
from .failures import Problem, any_problem, expected, problem
from .subscribing import Asked, RootField, Subscription, moved

if TYPE_CHECKING:
    from .live import Live

log = logging.getLogger(__name__)
KEPT, KEPT_BYTES = 256, 2**20  # events that are kept for those who come back
FRESH_SECONDS: Final = 5.0  # that an answer which hangs on rights may be told again
LINGER_SECONDS: Final = 30.0  # how long a group waits for somebody to come back
MOST_CHANGES: Final = 20_000  # that wait to be looked at
AGAIN_SECONDS: Final = 0.5  # after a failure that may pass
PATIENCE: Final = 20  # failures, before an event is told with what could not be read
TOO_SLOW: Final = 3  # looks that took too long, before those who follow are told so
SHARE: Final = 10  # of its time, at most one part in so many goes into looks that have a pace
AT_ONCE: Final = 500  # receivers of an event, some 5 ms, before others have a turn
LOOK_SECONDS: Final = 0.02  # between two looks how far the reader is
PATIENCE_SECONDS: Final = 10.0  # for what another process has told already
JOINING: Final = 2**62  # above the number of any happening


class Left(Exception):
    """The subscription has gone on to something else meanwhile."""


@dataclass(slots=True, eq=False)
class _Told:
    """An event with its answer."""

    happening: Happening
    payload: bytes
    at: float  # when the answer was made


class Group:
    def __init__(
        self,
        live: "Live",
        key: Hashable,
        field: RootField,
        asked: Asked,
        subscribed: Subscribed,
        viewer: Viewer,
        *,
        hangs_on_rights: bool,
    ) -> None:
        self.live, self.key, self.field, self.asked = live, key, field, asked
        self.source, self.rate, self.viewer = subscribed.source, subscribed.rate, viewer
        self.hangs_on_rights = hangs_on_rights
        self.is_logged = self.source.query is not None
        self.follower: Follower = self.source.follow()
        self.members: dict[Subscription, None] = {}
        self.changes: list[Change] = []
        self.changed = asyncio.Event()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unsubscribe: Callable[[], None] = lambda: None
        self.kept: deque[_Told] = deque()
        self.kept_bytes = 0
        self.kept_from = ""  # what came after this place is all kept
        self.serial = self.told = 0  # of happenings: known, and told
        self.reached = ""  # the place of the last that was told
        self.standing: dict[Hashable, tuple[Happening, float, asyncio.Future[bytes]]] = {}
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

    async def join(self, subscription: Subscription, turn: int) -> None:
        subscription.group = self
        self.stay()
        self.members.setdefault(subscription, None)  # it keeps the group, and gets nothing yet
        subscription.serial = JOINING
        try:
            await asyncio.shield(self.ready)
            self.hold(subscription, turn)
            began = Place(self.live.reader.position, 0)
            if isinstance(self.follower, Summing):
                await self.level(self.follower, subscription, turn)
            elif subscription.place is None:
                await self.tell_standing(subscription, turn)
            else:
                await self.tell_missed(subscription, turn)
            if subscription.place is None and self.is_logged:
                subscription.place = began
        except BaseException:
            if subscription.turn == turn:
                self.remove(subscription)
            raise

    def hold(self, subscription: Subscription, turn: int) -> None:
        """After each wait: is it still to be gone on with?"""
        if subscription.turn != turn:
            raise Left
        if self.is_over:
            raise self.error or Unavailable("The server is closing.")

    def remove(self, subscription: Subscription) -> None:
        self.members.pop(subscription, None)
        if not self.members and not self.is_over and self.linger is None:
            if self.is_logged:
                loop = asyncio.get_running_loop()
                self.linger = loop.call_later(LINGER_SECONDS, self.end)
            else:
                self.end()  # nobody comes back to what takes no `after`

    def stay(self) -> None:
        if self.linger is not None:
            self.linger.cancel()
            self.linger = None

    async def level(self, follower: Summing, subscription: Subscription, turn: int) -> None:
        """Tell what came after the subscription's place, up to where all others stand."""
        context, place = self.asked.context(subscription.viewer), subscription.place
        if place is None:
            async with self.live.work:
                began = await follower.newest(context)
        else:
            began = place.sequence
        self.hold(subscription, turn)
        # What is being added up is told to the others a little earlier; or another process, whose
        # cursor it is, is ahead of this one.
        until = time.monotonic() + PATIENCE_SECONDS
        while follower.place.sequence < began:
            if time.monotonic() > until:
                raise Unavailable("This server has not come so far yet; try again.")
            follower.hurry()
            self.changed.set()
            await asyncio.sleep(LOOK_SECONDS)
            self.hold(subscription, turn)
        if place is None:
            subscription.place = follower.place
        while subscription.place is not None and subscription.place != follower.place:
            place, reached = subscription.place, follower.place
            found = []
            if place.sequence < reached.sequence:
                async with self.live.replays:
                    found = await follower.missed(context, place, reached)
            for happening in found:
                self.hold(subscription, turn)
                payload = await self.payload(happening)
                self.hold(subscription, turn)
                self.hand(subscription, happening, payload)
                await subscription.sink.room()
            self.hold(subscription, turn)
            subscription.place = reached
        subscription.serial = self.serial

    async def tell_standing(self, subscription: Subscription, turn: int) -> None:
        """What stands now, once it is encoded and still what stands."""
        handed: dict[Hashable, Happening] = {}
        while (standing := self.news(handed)) is not None:
            payload = await self.standing_payload(standing)
            self.hold(subscription, turn)
            if standing in self.follower.standings():
                self.hand(subscription, standing, payload)
                handed[standing.key] = standing
        subscription.serial = self.serial
        if self.follower.is_over:
            self.finish(subscription)

    def news(self, handed: dict[Hashable, Happening]) -> Happening | None:
        """Something that stands and is not among these."""
        standings = self.follower.standings()
        return next((each for each in standings if handed.get(each.key) is not each), None)

    async def standing_payload(self, standing: Happening) -> bytes:
        """Made once for all who come; anew where rights may have changed since."""
        now = asyncio.get_running_loop().time()
        known = self.standing.get(standing.key)
        is_old = known is not None and self.hangs_on_rights and known[1] < now - FRESH_SECONDS
        if known is None or known[0] is not standing or is_old:
            answer = asyncio.ensure_future(self.payload(standing))
            known = self.standing[standing.key] = standing, now, answer
        return await asyncio.shield(known[2])

    async def tell_missed(self, subscription: Subscription, turn: int) -> None:
        """What came after the subscription's place, then what stands where that is newer."""
        assert subscription.place is not None
        while self.live.reader.position < self.follower.ahead:
            await asyncio.sleep(LOOK_SECONDS)
            self.hold(subscription, turn)
        while True:
            self.keep_fresh()
            if subscription.place.position >= self.kept_from:
                break
            if await self.tell_logged(subscription, turn):
                return
        for told in self.kept:
            self.hold(subscription, turn)
            if self.is_for(subscription, told.happening):
                self.hand(subscription, told.happening, told.payload)
                if told.happening.is_final:
                    self.finish(subscription)
                    return
        subscription.serial = self.told
        if self.serial != self.told:  # it is about to be told
            return
        standing = self.follower.standing()
        if standing is not None:
            payload = await self.standing_payload(standing)
            self.hold(subscription, turn)
            if standing.sequence > subscription.place.sequence:
                self.hand(subscription, standing, payload)
            is_over = standing.is_final
        else:
            is_over = self.follower.is_over
        if is_over and not subscription.is_closed:
            self.finish(subscription)

    async def tell_logged(self, subscription: Subscription, turn: int) -> bool:
        """From the log, as fast as the client takes it; whether that was all there will be."""
        assert subscription.place is not None
        assert self.source.query is not None
        reader = self.live.reader
        covered = reader.position
        after = subscription.place.position
        batches = aiter(missed(self.live.database, reader, self.source.query, after))
        while True:
            async with self.live.replays:
                batch = await anext(batches, None)
                if batch is None:
                    break
                context = self.asked.context(subscription.viewer)
                found = await self.source.of_events(context, batch)
            for happening in found:
                self.hold(subscription, turn)
                if self.is_for(subscription, happening):
                    payload = await self.payload(happening)
                    self.hold(subscription, turn)
                    self.hand(subscription, happening, payload)
                    if happening.is_final:
                        self.finish(subscription)
                        return True
                    await subscription.sink.room()
            self.hold(subscription, turn)
        self.hold(subscription, turn)
        place = subscription.place
        subscription.place = Place(max(place.position, covered), place.sequence)
        return False

    def is_for(self, subscription: Subscription, happening: Happening) -> bool:
        return self.is_news(subscription, happening) and self.source.permits(
            subscription.viewer, happening
        )

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
        self.give(subscription, payload, happening.key if happening.is_passing else None)

    def give(self, subscription: Subscription, payload: bytes, key: Hashable) -> None:
        """What goes wrong with one client is nothing to the others."""
        try:
            subscription.sink.send(payload, key)
        except Exception:
            log.exception("subscription.not_sent")
            subscription.close()

    def finish(self, subscription: Subscription) -> None:
        subscription.close()
        with suppress(Exception):
            subscription.sink.complete()

    # ---- what is followed

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.begin()
            while not self.is_over:
                await self.wait()
                started = loop.time()
                if self.changes or self.is_due(loop.time()):
                    await self.look()
                await self.tell_pending(only_due=True)
                if self.source.pace:
                    took = loop.time() - started
                    await asyncio.sleep(max(self.source.pace, SHARE * took))
        except asyncio.CancelledError:
            self.end()
            raise
        except Exception as error:
            self.end([any_problem(error, f"subscription {self.field.name}")], error)

    async def begin(self) -> None:
        reader = self.live.reader
        await reader.ready()
        self.unsubscribe = reader.subscribe(self.source.topics, self.take, self.lost)
        self.kept_from = self.reached = reader.position
        async with self.live.work:
            await self.follower.begin(self.asked.context(self.viewer), reader.position)
        self.kept_from = max(self.kept_from, self.follower.ahead)
        self.ready.set_result(None)

    def take(self, change: Change) -> None:
        if self.source.pace:
            self.changes = [change]  # that there was one is all that is looked at
        else:
            self.changes.append(change)
            if len(self.changes) > MOST_CHANGES:
                self.give_up(Unavailable("Too much happens at once: come back with `after`."))
        self.changed.set()

    def lost(self) -> None:
        self.give_up(
            CursorExpired("What happened is no longer kept: read anew, then subscribe again.")
        )

    def give_up(self, error: CursorExpired | Unavailable | Timeout) -> None:
        self.end([problem(error)], error)

    async def wait(self) -> None:
        """Until something changed, or something is due."""
        timeout, moments = None, [self.due.get(key, 0.0) for key in self.pending]
        if self.follower.due is not None:
            moments.append(self.follower.due)
        if moments:
            timeout = max(0.0, min(moments) - asyncio.get_running_loop().time())
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self.changed.wait()
        self.changed.clear()

    def is_due(self, now: float) -> bool:
        return self.follower.due is not None and self.follower.due <= now

    async def look(self) -> None:
        changes, self.changes = self.changes, []
        found = await self.found(changes)
        first, self.serial = self.serial + 1, self.serial + len(found)
        for serial, happening in enumerate(found, first):
            if happening.is_passing and self.rate is not None:
                self.pending[happening.key] = happening
                self.told = max(self.told, serial)
            else:
                self.pending.pop(happening.key, None)
                await self.tell(serial, happening)
        if isinstance(self.follower, Summing):
            for member in self.members:
                if member.serial != JOINING:
                    member.place = self.follower.place  # also where nothing of it was for them

    async def found(self, changes: list[Change]) -> list[Happening]:
        """Again, as long as something is not there that may come back."""
        slow = 0
        while True:
            try:
                async with self.live.work:
                    return await self.follower.happenings(self.asked.context(self.viewer), changes)
            except Exception as error:
                known = expected(error)
                if known is None:
                    raise
                slow += isinstance(known, Timeout)
                if slow == TOO_SLOW:
                    raise known from error
            await asyncio.sleep(AGAIN_SECONDS)

    async def tell_pending(self, *, only_due: bool = False) -> None:
        now = asyncio.get_running_loop().time()
        for key in list(self.pending):
            if key in self.pending and (not only_due or self.due.get(key, 0.0) <= now):
                happening = self.pending.pop(key)
                if self.rate is not None:
                    self.due[key] = now + 1 / self.rate
                self.serial += 1
                # It stands where it is told: what was told before it is behind it.
                position = max(happening.position, self.reached)
                await self.tell(self.serial, replace(happening, position=position))
        if len(self.due) > len(self.pending) + KEPT:
            self.due = {key: at for key, at in self.due.items() if at > now}

    async def tell(self, serial: int, happening: Happening) -> None:
        """To everyone who takes part, and has not been told more already."""
        payload = await self.payload(happening)
        if self.is_logged and not happening.is_passing:
            self.keep(happening, payload)
        self.told = max(self.told, serial)
        self.reached = max(self.reached, happening.position)
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
                # Told by the log, which does not know what the others have come to.
                if happening.is_final and not happening.sequence:
                    self.finish(member)
                continue
            viewer = member.viewer
            is_permitted = permitted.get(id(viewer))
            if is_permitted is None:
                is_permitted = self.source.permits(viewer, happening)
                permitted[id(viewer)] = is_permitted
            if is_permitted:
                member.serial, member.place = serial, after
                self.give(member, payload, key)
                delivered += 1
                if happening.is_final:
                    self.finish(member)
        self.live.metrics.deliveries.inc(delivered)

    def keep(self, happening: Happening, payload: bytes) -> None:
        self.kept.append(_Told(happening, payload, asyncio.get_running_loop().time()))
        self.kept_bytes += len(payload)
        while len(self.kept) > KEPT or self.kept_bytes > KEPT_BYTES:
            self.forget_first()

    def keep_fresh(self) -> None:
        """Answers that hang on rights are told again for some seconds only: rights change."""
        old = asyncio.get_running_loop().time() - FRESH_SECONDS
        while self.hangs_on_rights and self.kept and self.kept[0].at < old:
            self.forget_first()

    def forget_first(self) -> None:
        told = self.kept.popleft()
        self.kept_bytes -= len(told.payload)
        self.kept_from = told.happening.position

    async def payload(self, happening: Happening) -> bytes:
        """The answer for one event; again where something is not there that may come back."""
        row: Row = {
            **happening.row,
            "stream": self.source.stream,
            "position": happening.position,
            "sequence": happening.sequence,
        }
        asked, live = self.asked, self.live
        live.metrics.encodings.inc()
        for attempt in range(PATIENCE):
            context = asked.context(self.viewer)
            async with live.work:
                loop = asyncio.get_running_loop()
                answer = await run(
                    live.schema,
                    asked.document,
                    asked.operation,
                    asked.variables,
                    context,
                    loop.time() + live.settings.operation_timeout_seconds,
                    asked.values,
                    {self.field.name: row},
                )
            codes = {each["extensions"].get("code") for each in answer.errors}
            if happening.is_passing or Unavailable.code not in codes:
                break
            if attempt + 1 < PATIENCE:
                await asyncio.sleep(AGAIN_SECONDS)
        content: dict[str, Any] = {"data": answer.data}
        if answer.errors:
            content["errors"] = [_marked(made, context.request_id) for made in answer.errors]
        try:
            made = orjson.dumps(content)
        except TypeError as error:  # a value that JSON does not have came out of a JSON scalar
            return _failed(any_problem(error, "encoding"), context.request_id)
        size, limit = len(made), live.settings.max_answer_bytes
        if size > limit:
            message = f"The answer has {size} bytes; the limit is {limit}: ask for less at once."
            too_large = OperationTooComplex(message, measure="answer", value=size, limit=limit)
            return _failed(problem(too_large), context.request_id)
        return made

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
                    with suppress(Exception):
                        member.sink.fail(problems)
        self.members.clear()
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


def _marked(made: Problem, request_id: str) -> Problem:
    """With the id of the request of whoever came first: the log has it."""
    return {**made, "extensions": {**made["extensions"], "requestId": request_id}}


def _failed(made: Problem, request_id: str) -> bytes:
    return orjson.dumps({"data": None, "errors": [_marked(made, request_id)]})
