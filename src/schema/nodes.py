"""Global ids, and the two interfaces: `Node` has one, `Actor` owns things."""

import binascii
from base64 import b64decode
from typing import Any, ClassVar

import strawberry
from bson import ObjectId

from modelharbor.errors import ErrorCode, Refused
from modelharbor.execution.declaration import computed, is_row_of
from modelharbor.loaders.nodes import Reference

from .scalars import URL


def global_id(typename: str, _id: ObjectId) -> strawberry.ID:
    # As Strawberry writes them, in half the time: exports make millions of them.
    return strawberry.ID(binascii.b2a_base64(f"{typename}:{_id}".encode(), newline=False).decode())


def parse_global_id(value: str) -> Reference | None:
    """None for anything that is not one of ours."""
    if len(value) > 256:
        return None
    try:
        typename, _, rest = b64decode(value, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError, ValueError):
        return None
    hexadecimal, _, name = rest.partition("/")
    if len(hexadecimal) != 24 or not ObjectId.is_valid(hexadecimal):
        return None
    return Reference(typename, ObjectId(hexadecimal), name or None)


def object_id(value: str, typename: str, *path: str) -> ObjectId:
    """The id of an input. Refused as NOT_FOUND, like the id of something that is not there."""
    found = parse_global_id(value)
    if found is None or found.typename != typename:
        raise Refused(ErrorCode.NOT_FOUND, f"There is no such {typename}.", *path)
    return found.id


@strawberry.interface(description="An object with a global id.")
class Node:
    id: strawberry.ID = computed(global_id, description="Global id, opaque.")

    is_type_of: ClassVar[Any] = classmethod(is_row_of)


@strawberry.interface(description="Whoever can own models: a person or an organization.")
class Actor(Node):
    login: str = strawberry.field(description="Unique name, as it stands in references.")
    display_name: str | None = strawberry.field(description="Name to show.")
    avatar_url: URL | None = strawberry.field(description="Address of a picture.")
