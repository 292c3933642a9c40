"""Documents that clients name instead of sending: Apollo's APQ, `documentId` and published operations
share one store. What is validated is known in the process; texts are in Redis, published ones in MongoDB.
"""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, Literal, Protocol

from graphql import GraphQLSchema
from redis.exceptions import RedisError

from modelharbor.auth.viewer import Viewer
from modelharbor.cache.client import Cache
from modelharbor.cache.keys import persisted_document
from modelharbor.db.connection import Database
from modelharbor.db.ending import ended
from modelharbor.db.persisted import LONGEST_ID, SHA256, canonical
from modelharbor.errors import (
    BadRequest,
    HarborError,
    PayloadTooLarge,
    PersistedQueryNotFound,
    PersistedQueryNotSupported,
    PersistedQueryRequired,
)
from modelharbor.resolvers.persisted import UsageCounter, counting_usage, published_text
from modelharbor.settings import Settings

from .caching import namespace
from .documents import Document, DocumentStore, InvalidDocument
from .kept import Kept
from .published import Changes, Published, Trusted, following_published

log = logging.getLogger(__name__)
RENEW_SECONDS: Final = 6 * 3600.0  # between two renewals of one text by one process, at most
RENEWED: Final = 4096  # texts whose renewals a process remembers
WAITING: Final = 1000  # texts that wait to be renewed
PAUSE_SECONDS: Final = 0.5
By = Literal["text", "hash", "id"]


class Parameters(Protocol):
    """What of a request says which document it means."""

    @property
    def query(self) -> str | None: ...
    @property
    def document_id(self) -> object: ...
    @property
    def extensions(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Resolved:
    """The document that a request means. `trusted`: the published operation that it is."""

    document: Document
    trusted: Trusted | None
    by: By


def named(document_id: object, extensions: dict[str, Any]) -> str | None:
    """The name that a request gives its document: 64 hexadecimal digits are the SHA-256 of its text,
    anything else the id of a published operation; None: it has none."""
    apollo = extensions.get("persistedQuery")
    by_apollo = None if apollo is None else _of_apollo(apollo)
    if document_id is None:
        return by_apollo
    if not isinstance(document_id, str):
        raise BadRequest("`documentId` takes a string.")
    if not 0 < len(document_id) <= LONGEST_ID:
        raise BadRequest(f"`documentId` takes 1 to {LONGEST_ID} characters.")
    found = canonical(document_id)
    if found is None:
        raise BadRequest("`sha256:` takes 64 hexadecimal digits in small letters behind it.")
    if by_apollo not in {None, found}:
        raise BadRequest("`documentId` and `persistedQuery` name different documents.")
    return found


def _of_apollo(apollo: object) -> str:
    if not isinstance(apollo, dict) or type(apollo.get("version")) is not int:
        raise BadRequest("`persistedQuery` takes `version` and `sha256Hash`.")
    if apollo["version"] != 1:
        raise PersistedQueryNotSupported("PersistedQueryNotSupported")
    found = apollo.get("sha256Hash")
    if not isinstance(found, str) or not 0 < len(found) <= LONGEST_ID:
        raise BadRequest(f"`sha256Hash` takes a string of 1 to {LONGEST_ID} characters.")
    lower = found.lower()
    return lower if SHA256.fullmatch(lower) else canonical(found) or found


def text_key(schema: GraphQLSchema, text_sha256: str) -> str:
    """Where Redis has a text. Another version of the schema, or of the server, has keys of its own."""
    return persisted_document(f"{namespace(schema).hex()[:16]}:{text_sha256}")


class Persisted:
    """Finds documents by text, hash or id, and keeps the texts of those that clients name by hash."""

    def __init__(
        self,
        database: Database,
        cache: Cache,
        documents: DocumentStore,
        settings: Settings,
        published: Published,
        usage: UsageCounter,
        counts: Counter[str],
    ) -> None:
        self.documents, self.published = documents, published
        self.settings = settings
        self.counts = counts
        """Operations that ran by `text`, `hash` or `id`; and those that were not known by their name
        (`missed`), were none of the published ones (`required`), or not what Redis had (`poisoned`)."""
        self._database, self._cache, self._usage = database, cache, usage
        self._seconds = max(1, round(settings.persisted_days * 24 * 3600))
        self._renew_seconds = min(RENEW_SECONDS, self._seconds / 4)
        self._renewed: Kept[str, float] = Kept(RENEWED, RENEWED)
        self._waiting: dict[str, str] = {}

    def key(self, text_sha256: str) -> str:
        return text_key(self.documents.schema, text_sha256)

    async def resolve(self, parameters: Parameters, *, is_person: bool) -> Resolved:
        """Raises InvalidDocument and HarborErrors. `is_person`: a token was presented; where only
        published operations run, others are refused before anything is parsed."""
        name = named(parameters.document_id, parameters.extensions)
        text = parameters.query
        # Clients of graphql-ws have to send a text: an empty one beside a name is none.
        if text is not None and (text or name is None):
            return await self._by_text(text, name, is_person)
        if name is None:
            raise BadRequest("The request has no `query`.")
        return await self._by_name(name, parameters.document_id is None, is_person)

    def check(self, resolved: Resolved, viewer: Viewer) -> None:
        """PersistedQueryRequired where the viewer may run published operations only, and this is none."""
        if self.settings.trusted_only and resolved.trusted is None and not viewer.operates:
            raise self._required()

    def used(self, resolved: Resolved) -> None:
        """Count an operation that runs, and keep its text for longer where a client named it."""
        self.counts[resolved.by] += 1
        if resolved.trusted is not None:
            self._usage.count(resolved.trusted.id)
        if resolved.by != "text":
            self._renew(resolved.document)

    # ---- by text

    async def _by_text(self, text: str, name: str | None, is_person: bool) -> Resolved:
        trusted, limit = None, self.settings.max_query_bytes
        if name is not None or len(self.published) or self.settings.trusted_only:
            if len(text) > limit:  # it has as many bytes at least
                raise PayloadTooLarge(f"The query is longer than {limit} bytes, the limit.")
            digest = sha256(text.encode()).hexdigest()
            if name is not None:
                self._check_name(name, digest)
            trusted = self.published.by_text(digest)
            if trusted is None and self.settings.trusted_only:
                await self.published.known()
                trusted = self.published.by_text(digest)
                if trusted is None and not is_person:
                    raise self._required()
        document = self.documents.get(text)
        # Where only published operations run, nobody who may be no operator leaves anything.
        if name is not None and not self.settings.trusted_only:
            self._renewed.put(document.sha256, time.monotonic(), 1)
            await self._put(document.sha256, text)
        return Resolved(document, trusted, "text")

    def _check_name(self, name: str, digest: str) -> None:
        trusted = self.published.by_id(name)
        if (trusted.sha256 if trusted else name) != digest:
            raise BadRequest("provided sha does not match query")  # Apollo's words

    # ---- by name

    async def _by_name(self, name: str, is_apollo: bool, is_person: bool) -> Resolved:
        trusted = self.published.by_id(name) or self.published.by_text(name)
        is_hash = SHA256.fullmatch(name) is not None
        if trusted is None and (self.settings.trusted_only or not is_hash):
            await self.published.known()
            trusted = self.published.by_id(name) or self.published.by_text(name)
        if trusted is not None:
            return Resolved(await self._of_published(trusted), trusted, "hash" if is_hash else "id")
        if self.settings.trusted_only and not is_person:
            raise self._required()
        if not is_hash and is_apollo:
            raise BadRequest("`sha256Hash` takes 64 hexadecimal digits.")
        document = self.documents.known(name)
        if document is None and is_hash:
            text = await self._stored(name)
            # What no longer validates is asked for again, and told what is wrong then.
            with suppress(InvalidDocument):
                document = None if text is None else self.documents.get(text)
        if document is None:
            self.counts["missed"] += 1
            raise PersistedQueryNotFound("PersistedQueryNotFound")
        return Resolved(document, None, "hash")

    async def _of_published(self, trusted: Trusted) -> Document:
        document = self.documents.known(trusted.sha256)
        if document is None:
            text = await self._stored(trusted.sha256)
            if text is None:
                text = await published_text(self._database, trusted.row_id)
                if text is None or sha256(text.encode()).hexdigest() != trusted.sha256:
                    self.counts["missed"] += 1
                    raise PersistedQueryNotFound("PersistedQueryNotFound")
            try:
                document = self.documents.get(text)
            except InvalidDocument as error:
                raise _outdated(trusted, error) from None
            except HarborError as error:
                raise type(error)(f"{_named(trusted)}: {error.message}", **error.details) from None
        return document

    # ---- Redis

    async def _stored(self, text_sha256: str) -> str | None:
        """A text out of Redis, if it is the right one: others can write there."""
        stored = await self._cache.get(self.key(text_sha256), self.settings.max_query_bytes)
        if stored is None:
            return None
        is_short = len(stored) <= self.settings.max_query_bytes
        if is_short and sha256(stored).hexdigest() == text_sha256:
            with suppress(UnicodeDecodeError):
                return stored.decode()
        self.counts["poisoned"] += 1
        log.warning("persisted.poisoned sha256=%s bytes=%d", text_sha256, len(stored))
        with suppress(RedisError, OSError, TimeoutError):
            await self._cache.redis.delete(self._cache.name(self.key(text_sha256)))
        return None

    async def _put(self, text_sha256: str, text: str) -> None:
        await self._cache.put(self.key(text_sha256), text.encode(), self._seconds)

    def _renew(self, document: Document) -> None:
        """Have Redis keep its text longer: a process says so once in some hours."""
        now = time.monotonic()
        renewed = self._renewed.get(document.sha256)
        if renewed is not None and now - renewed < self._renew_seconds:
            return
        if len(self._waiting) < WAITING:
            self._renewed.put(document.sha256, now, 1)
            self._waiting[document.sha256] = document.text

    async def renew(self) -> None:
        """Write what waits for it."""
        while self._waiting:
            await self._put(*self._waiting.popitem())

    async def renewing(self) -> None:
        """For ever."""
        while True:
            await asyncio.sleep(PAUSE_SECONDS)
            await self.renew()

    def _required(self) -> PersistedQueryRequired:
        self.counts["required"] += 1
        return PersistedQueryRequired("This server runs published operations only.")


def _named(trusted: Trusted) -> str:
    name = f"{trusted.name} ({trusted.id})" if trusted.name else trusted.id
    return f"The published operation {name} of {trusted.client} does not run here any more"


def _outdated(trusted: Trusted, error: InvalidDocument) -> InvalidDocument:
    first, *others = error.problems
    return InvalidDocument(
        ({**first, "message": f"{_named(trusted)}: {first['message']}"}, *others)
    )


@asynccontextmanager
async def open_persisted(
    database: Database,
    cache: Cache,
    documents: DocumentStore,
    settings: Settings,
    freshness: Changes | None,
    counts: Counter[str] | None = None,
) -> AsyncIterator[Persisted]:
    """`freshness`: who tells of changes. `counts`: see `Persisted.counts`."""
    async with (
        counting_usage(database) as usage,
        following_published(database, freshness) as published,
    ):
        persisted = Persisted(
            database,
            cache,
            documents,
            settings,
            published,
            usage,
            Counter() if counts is None else counts,
        )
        task = asyncio.get_running_loop().create_task(persisted.renewing(), context=Context())
        try:
            yield persisted
        finally:
            await ended(task)
