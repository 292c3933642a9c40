"""Who holds the tokens of open connections: read again every few seconds, so that a token that was
revoked, and a role that was taken, end what they opened."""

import asyncio
import hmac
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Final

from bson import ObjectId
from pymongo.errors import PyMongoError

from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.errors import HarborError

from .tokens import authenticate, credentials_of, read_tokens, secret_hash, viewer_of
from .viewer import ANONYMOUS, Viewer

log = logging.getLogger(__name__)
EVERY_SECONDS: Final = 2.0  # what was revoked has ended within 5
TOKENS_AT_ONCE: Final = 500
Told = Callable[[Viewer | None], None]
"""Called with what the viewer has become; None: the token is no longer good."""


@dataclass(slots=True, eq=False)
class _Held:
    """A token that somebody holds a connection with."""

    viewer: Viewer
    secret_sha256: str
    told: dict[Told, None] = field(default_factory=dict)


class ViewerWatch:
    """The tokens of one process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._held: dict[ObjectId, _Held] = {}
        self._asking: dict[str, asyncio.Future[Viewer]] = {}

    async def enter(self, authorization: str | None, told: Told) -> Viewer:
        """The viewer behind an `Authorization` header; `told` is called whenever that changes, until
        `leave`. Raises Unauthenticated."""
        if authorization is None:
            return ANONYMOUS
        token = credentials_of(authorization)
        held = self._held.get(token.id) if token else None
        if (
            token is not None
            and held is not None
            and hmac.compare_digest(held.secret_sha256, secret_hash(token.secret))
        ):
            # As fresh as what everybody goes by who came before.
            held.told[told] = None
            return held.viewer
        viewer = await self._authenticated(authorization)
        assert token is not None
        held = self._held.setdefault(token.id, _Held(viewer, secret_hash(token.secret)))
        held.told[told] = None
        return held.viewer

    async def _authenticated(self, authorization: str) -> Viewer:
        """Many who come at once with one token, after a server went down, ask once."""
        asking = self._asking.get(authorization)
        if asking is None:
            asking = asyncio.ensure_future(authenticate(self._database, authorization))
            self._asking[authorization] = asking
            asking.add_done_callback(lambda done: self._answered(authorization, done))
        return await asyncio.shield(asking)

    def _answered(self, authorization: str, done: asyncio.Future[Viewer]) -> None:
        del self._asking[authorization]
        if not done.cancelled():
            done.exception()  # looked at, for all who asked may have gone

    def leave(self, viewer: Viewer, told: Told) -> None:
        held = self._held.get(viewer.token_id) if viewer.token_id else None
        if held is not None:
            held.told.pop(told, None)
            if not held.told and viewer.token_id:
                del self._held[viewer.token_id]

    async def look(self) -> None:
        """Read all tokens that are held, and tell those whose viewer has changed."""
        ids = list(self._held)
        for start in range(0, len(ids), TOKENS_AT_ONCE):
            some = ids[start : start + TOKENS_AT_ONCE]
            rows = await read_tokens(self._database, some)
            for token_id in some:
                held = self._held.get(token_id)
                if held is None:
                    continue
                viewer = _understood(token_id, rows.get(token_id))
                if viewer is None:
                    del self._held[token_id]
                elif rights_of(viewer) == rights_of(held.viewer):
                    continue
                else:
                    held.viewer = viewer
                for told in list(held.told):
                    try:
                        told(viewer)
                    except Exception:
                        log.exception("viewers.not_told token_id=%s", token_id)

    async def run(self) -> None:
        """Look for ever: whoever holds a connection goes by it."""
        while True:
            await asyncio.sleep(EVERY_SECONDS)
            if self._held:
                try:
                    await self.look()
                except (PyMongoError, HarborError) as error:
                    log.warning("viewers.not_read error=%s", error)
                except Exception:
                    log.exception("viewers.look_failed")


def _understood(token_id: ObjectId, row: Row | None) -> Viewer | None:
    """Who holds the token now. What a later version wrote may be of no meaning here: then nobody,
    for what it allows is not known, and the others are to be told of theirs."""
    try:
        return viewer_of(row) if row is not None else None
    except Exception:
        log.exception("viewers.not_understood token_id=%s", token_id)
        return None


def rights_of(viewer: Viewer) -> tuple[object, ...]:
    return viewer.user_id, viewer.scopes, dict(viewer.roles), viewer.operates, viewer.expires_at


@asynccontextmanager
async def watching_viewers(database: Database) -> AsyncIterator[ViewerWatch]:
    watch = ViewerWatch(database)
    task = asyncio.get_running_loop().create_task(watch.run(), context=Context())
    try:
        yield watch
    finally:
        await ended(task)
