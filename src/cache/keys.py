"""The names of everything kept in Redis; before each stands `Settings.redis_prefix`: see `Cache.name`."""

from hashlib import sha256
from typing import Final


def persisted_document(document_sha256: str) -> str:
    """Text of a GraphQL document, by its SHA-256 in hexadecimal."""
    return f"document:{document_sha256}"


def model_count(filter_bytes: bytes) -> str:
    """How many models a filter (BSON, with the viewer's principals in it) finds."""
    return f"count:{sha256(filter_bytes).hexdigest()}"


def model_facets(filter_bytes: bytes, field: str, limit: int) -> str:
    return f"facet:{field}:{limit}:{sha256(filter_bytes).hexdigest()}"


WAKING_CHANNEL: Final = "jobs"
"""Where a message without content says that jobs may wait: lost ones cost a second at most."""


def acknowledged(database: str) -> str:
    """The highest cluster time, in 16 hexadecimal digits, up to which writes were acknowledged."""
    return f"{database}:acknowledged"
