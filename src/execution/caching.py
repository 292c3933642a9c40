"""Under which key the answer to an operation is kept."""

from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

import orjson
from graphql import GraphQLSchema, print_schema

import modelharbor

from .documents import Document, Operation

KEY_BYTES: Final = 20


@lru_cache(maxsize=8)
def namespace(schema: GraphQLSchema) -> bytes:
    """Of all keys: another schema, or another version of the server, may answer otherwise."""
    told = f"{modelharbor.__version__}\0{print_schema(schema)}"
    return blake2b(told.encode(), digest_size=KEY_BYTES).digest()


def answer_key(
    schema: GraphQLSchema, document: Document, operation: Operation, given: Mapping[str, Any]
) -> bytes:
    """Equal for equal texts, operations and values of declared variables, in whatever order they come.

    A value that is written otherwise (`1.0` for `1`) has another key, as it may be another value for a
    custom scalar.
    """
    declared = {
        name: given[name]
        for node in operation.node.variable_definitions or ()
        if (name := node.variable.name.value) in given
    }
    made = blake2b(namespace(schema), digest_size=KEY_BYTES)
    for part in (
        document.sha256.encode(),
        (operation.name or "").encode(),
        orjson.dumps(declared, option=orjson.OPT_SORT_KEYS),
    ):
        made.update(len(part).to_bytes(4, "big"))
        made.update(part)
    return made.digest()
