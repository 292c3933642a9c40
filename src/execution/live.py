"""The subscriptions of one process: who joins which group, and how all of them end."""

import asyncio
from collections.abc import Callable, Hashable
from contextlib import suppress
from contextvars import Context as Variables
from typing import Any, Final

import strawberry

from modelharbor.auth.viewer import Viewer
from modelharbor.db.base import utc_now
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.errors import BadUserInput, Forbidden, RateLimited
from modelharbor.events.cursors import decode
from modelharbor.events.reader import Reader
from modelharbor.loaders.base import Sharing
from modelharbor.observability.metrics import Metrics
from modelharbor.settings import Settings
from modelharbor.streams.base import Place, Source, Subscribed

from .arguments import Frozen
from .documents import Document, Operation
from .groups import Group, Left
from .kept import Kept
from .subscribing import Asked, RootField, Subscription

AT_WORK: Final = 8  # looks and answers at the same time: requests come first
REPLAYS: Final = 4  # reads of the log at the same time
LAST_SECONDS: Final = 1.0  # for what waits to be told when the process ends


class Live:
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
            lambda: sum(len(group.members) for group in self.groups.values())
        )
        self.frozen: Frozen = Kept(256, 2**16)
        self.groups: dict[Hashable, Group] = {}
        self.fields: Kept[object, RootField] = Kept(1000, 1000)
        self.checks: dict[Hashable, asyncio.Task[None]] = {}
        self.tasks: set[asyncio.Task[None]] = set()
        self.work, self.replays = asyncio.Semaphore(AT_WORK), asyncio.Semaphore(REPLAYS)
        self.shut_down: dict[Callable[[], None], None] = {}
        """Called when the process is about to end: whoever holds a connection closes it then."""
        self.is_closing = False

    def shut(self) -> None:
        """Tell everyone to go elsewhere, after what waits to be told. More calls change nothing."""
        if self.is_closing:
            return
        self.is_closing = True

        async def shut() -> None:
            groups = list(self.groups.values())
            with suppress(TimeoutError):
                async with asyncio.timeout(LAST_SECONDS):
                    await asyncio.gather(
                        *[group.tell_pending() for group in groups], return_exceptions=True
                    )
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

    async def renew(self, subscription: Subscription, viewer: Viewer) -> None:
        """Go on with other rights, from where it is. Raises where it no longer may."""
        subscription.leave()
        subscription.viewer = viewer
        await self.join(subscription)

    async def join(self, subscription: Subscription) -> None:
        """Follow from now on, or from `after` on. Raises a HarborError where that may not be.

        Back when what was missed is told; or when it was closed, or joined anew, meanwhile.
        """
        subscription.turn += 1
        turn = subscription.turn
        subscribed = await self.admit(subscription)
        await self.follow(subscription, subscribed, turn)

    async def follow(self, subscription: Subscription, subscribed: Subscribed, turn: int) -> None:
        """The rest of `join`, once it was admitted in that turn."""
        if subscription.turn == turn and not subscription.is_closed:
            with suppress(Left):
                await self.group(subscription, subscribed).join(subscription, turn)

    async def admit(self, subscription: Subscription) -> Subscribed:
        """What is asked for, once the viewer may have it."""
        asked = subscription.asked
        subscribed = self.field(asked.operation, asked.document).subscribed(asked)
        source = subscribed.source
        await self.check(source, asked, subscription.viewer)
        if subscription.place is None and subscribed.after is not None:
            if not source.takes_after:
                raise BadUserInput(
                    "This subscription takes no `after`: it begins with all there is."
                )
            days = source.kept_days or self.settings.event_days
            found = decode(source.stream, subscribed.after, now=utc_now(), days=days)
            subscription.place = Place(*found)
        elif subscription.place is not None and not source.takes_after:
            raise Forbidden("Your rights have changed: subscribe again.")
        return subscribed

    def group(self, subscription: Subscription, subscribed: Subscribed) -> Group:
        asked, viewer = subscription.asked, subscription.viewer
        field = self.field(asked.operation, asked.document)
        rights = self.rights(field, subscribed.source, asked, viewer)
        key = (
            asked.operation,
            field.varying(asked.variables),
            subscribed.source,
            subscribed.rate,
            asked.base_url,
            rights,
        )
        group = self.groups.get(key)
        if group is None:
            self.make_room()
            group = Group(
                self, key, field, asked, subscribed, viewer, hangs_on_rights=rights is not None
            )
            self.groups[key] = group
            group.start()
        return group

    def make_room(self) -> None:
        """For one more group: those go that nobody follows. RateLimited where all are followed."""
        most = self.settings.max_streams
        if len(self.groups) < most:
            return
        for group in list(self.groups.values()):
            if group.linger is not None:
                group.end()
        if len(self.groups) >= most:
            raise RateLimited(f"This server follows {most} different subscriptions, no more.")

    async def check(self, source: Source, asked: Asked, viewer: Viewer) -> None:
        """May the viewer watch it? Many who come at once, after a server went down, ask once."""
        key = source, viewer.token_id, viewer.principals, viewer.scopes
        asking = self.checks.get(key)
        if asking is None:
            asking = self.checks[key] = self.begin(source.check(asked.context(viewer)))
            asking.add_done_callback(lambda done: self.checks.pop(key, None))
        await asyncio.shield(asking)

    def rights(self, field: RootField, source: Source, asked: Asked, viewer: Viewer) -> Hashable:
        """What of a viewer the answers hang on: who is equal in it shares them."""
        sharing = field.sharing(self.schema, asked)
        if Sharing.NEVER in (sharing, source.sharing):
            roles = frozenset(viewer.roles.items())
            return viewer.token_id, viewer.principals, viewer.scopes, roles
        if Sharing.EQUAL_RIGHTS in (sharing, source.sharing):
            return viewer.principals
        return None

    def field(self, operation: Operation, document: Document) -> RootField:
        found = self.fields.get(operation)
        if found is None:
            found = RootField(self.schema, operation, document, self.frozen)
            self.fields.put(operation, found, 1)
        return found
