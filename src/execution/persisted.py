"""Documents that clients name by hash instead of sending: Apollo's APQ and `documentId` share one store.

Known in the process, else in Redis; without Redis a process still knows what it was sent itself.
"""

import re
from hashlib import sha256
from typing import Any

from modelharbor.cache.client import Cache
from modelharbor.cache.keys import persisted_document
from modelharbor.errors import BadRequest, PersistedQueryNotFound

from .documents import Document, DocumentStore, InvalidDocument

KEPT_SECONDS = 30 * 24 * 3600
HEXADECIMAL = re.compile(r"[0-9a-f]{64}", re.ASCII)


def named_hash(document_id: object, extensions: dict[str, Any] | None) -> str | None:
    """The SHA-256, in small hexadecimal digits, by which a request names its document; None: it does not."""
    apollo = (extensions or {}).get("persistedQuery")
    named = None
    if apollo is not None:
        if not isinstance(apollo, dict) or not isinstance(apollo.get("sha256Hash"), str):
            raise BadRequest("`persistedQuery` takes `version` and `sha256Hash`.")
        if type(apollo.get("version")) is not int or apollo["version"] != 1:
            raise BadRequest("`persistedQuery` is understood in version 1 only.")
        named = apollo["sha256Hash"].lower()
        if not HEXADECIMAL.fullmatch(named):
            raise BadRequest("`sha256Hash` takes 64 hexadecimal digits.")
    if document_id is None:
        return named
    if not isinstance(document_id, str):
        raise BadRequest("`documentId` takes a string.")
    if not document_id.startswith("sha256:") or not HEXADECIMAL.fullmatch(document_id[7:]):
        raise BadRequest("`documentId` takes `sha256:` and 64 hexadecimal digits in small letters.")
    if named not in {None, document_id[7:]}:
        raise BadRequest("`documentId` and `persistedQuery` name different documents.")
    return document_id[7:]


async def find(documents: DocumentStore, cache: Cache, named: str) -> Document:
    """PersistedQueryNotFound asks the client to send the text once."""
    found = documents.known(named)
    if found is not None:
        return found
    stored = await cache.get(persisted_document(named))
    if stored is None or sha256(stored).hexdigest() != named:
        raise PersistedQueryNotFound("PersistedQueryNotFound")
    try:
        return documents.get(stored.decode())
    except InvalidDocument:  # of another version of the schema
        raise PersistedQueryNotFound("PersistedQueryNotFound") from None


async def keep(cache: Cache, document: Document) -> None:
    await cache.put(persisted_document(document.sha256), document.text.encode(), KEPT_SECONDS)


def check_hash(text: str, named: str) -> None:
    if sha256(text.encode()).hexdigest() != named:
        raise BadRequest("provided sha does not match query")  # Apollo's words
