"""What the client sees."""

from collections.abc import Iterator
from typing import Final

import strawberry
from graphql import (
    GraphQLArgument,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLObjectType,
    GraphQLSchema,
    Undefined,
)
from strawberry.schema.config import StrawberryConfig

from modelharbor.execution.declaration import read

from . import enums  # noqa: F401  # describes the enums of the database, before any type names them
from .actors import ApiToken, Membership, Organization, User
from .files import ModelFile
from .jobs import Job
from .models import Model
from .mutation import Mutation
from .query import Query
from .scalars import SCALARS
from .subscription import Subscription
from .uploads import Upload
from .versions import Alias, ModelVersion

TYPES: Final = (
    Alias,
    ApiToken,
    Job,
    Membership,
    Model,
    ModelFile,
    ModelVersion,
    Organization,
    Upload,
    User,
)
"""Those that interfaces and unions may answer: nothing else names them all."""
CONFIG: Final = StrawberryConfig(default_resolver=read, scalar_map=SCALARS)

schema: Final = strawberry.Schema(Query, Mutation, Subscription, types=TYPES, config=CONFIG)


core: Final[GraphQLSchema] = schema._schema
"""graphql-core's side of the same schema; Strawberry has no public name for it."""


def _inputs() -> Iterator[GraphQLArgument | GraphQLInputField]:
    for kind in core.type_map.values():
        if isinstance(kind, GraphQLInputObjectType):
            yield from kind.fields.values()
        elif isinstance(kind, GraphQLObjectType | GraphQLInterfaceType):
            for field in kind.fields.values():
                yield from field.args.values()


# `= null` behind every optional argument tells a reader nothing: what is left out is null anyway,
# by the defaults of the Python functions and classes.
for _input in _inputs():
    if _input.default_value is None:
        _input.default_value = Undefined
