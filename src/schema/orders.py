"""Orders of lists: what each field is stored as, with an index for each."""

from enum import Enum
from typing import Final

import strawberry

from modelharbor.db.keyset import Order, Sorted
from modelharbor.loaders.search import RELEVANCE

BY_PATH: Final = Order("path", Sorted.TEXT, ascending=True, unique=True)


@strawberry.enum(description="Which way a list is sorted.")
class OrderDirection(Enum):
    ASC = strawberry.enum_value("ASC", description="The least first.")
    DESC = strawberry.enum_value("DESC", description="The greatest first.")


@strawberry.enum(description="What models are sorted by; equal ones by their id.")
class ModelOrderField(Enum):
    TRENDING = strawberry.enum_value("TRENDING", description="Recent and popular first.")
    RELEVANCE = strawberry.enum_value(
        "RELEVANCE",
        description="How well the words of `search` fit; without `search` not possible.",
    )
    DOWNLOADS_30D = strawberry.enum_value(
        "DOWNLOADS_30D", description="Downloads in the last 30 days."
    )
    DOWNLOADS_ALL_TIME = strawberry.enum_value("DOWNLOADS_ALL_TIME", description="All downloads.")
    LIKES = strawberry.enum_value("LIKES", description="How many people like it.")
    UPDATED_AT = strawberry.enum_value("UPDATED_AT", description="When it was last changed.")
    CREATED_AT = strawberry.enum_value("CREATED_AT", description="When it was made.")
    NAME = strawberry.enum_value("NAME", description="Its name, in any case.")
    SIZE = strawberry.enum_value("SIZE", description="The sum of its files' lengths.")
    PARAMETERS = strawberry.enum_value(
        "PARAMETERS", description="Parameters of the latest version; unknown ones are the least."
    )


@strawberry.input(description="How models are sorted.")
class ModelOrder:
    field: ModelOrderField = strawberry.field(description="By what.")
    direction: OrderDirection = strawberry.field(
        default=OrderDirection.DESC, description="Which way."
    )


@strawberry.enum(description="What the versions of a model are sorted by; equal ones by their id.")
class ModelVersionOrderField(Enum):
    NUMBER = strawberry.enum_value("NUMBER", description="Its number.")
    CREATED_AT = strawberry.enum_value("CREATED_AT", description="When it was made.")
    SIZE = strawberry.enum_value("SIZE", description="The sum of its files' lengths.")


@strawberry.input(description="How the versions of a model are sorted.")
class ModelVersionOrder:
    field: ModelVersionOrderField = strawberry.field(description="By what.")
    direction: OrderDirection = strawberry.field(
        default=OrderDirection.DESC, description="Which way."
    )


MODEL_ORDERS: Final = {
    ModelOrderField.TRENDING: ("stats.trending_score", Sorted.NUMBER),
    ModelOrderField.RELEVANCE: (RELEVANCE.path, RELEVANCE.kind),
    ModelOrderField.DOWNLOADS_30D: ("stats.downloads_30d", Sorted.WHOLE),
    ModelOrderField.DOWNLOADS_ALL_TIME: ("stats.downloads_all", Sorted.WHOLE),
    ModelOrderField.LIKES: ("stats.likes", Sorted.WHOLE),
    ModelOrderField.UPDATED_AT: ("updated_at", Sorted.TIME),
    ModelOrderField.CREATED_AT: ("created_at", Sorted.TIME),
    ModelOrderField.NAME: ("name_lower", Sorted.TEXT),
    ModelOrderField.SIZE: ("stats.size_bytes", Sorted.WHOLE),
    ModelOrderField.PARAMETERS: ("parameters", Sorted.WHOLE),
}
VERSION_ORDERS: Final = {
    ModelVersionOrderField.NUMBER: ("number", Sorted.WHOLE, True),
    ModelVersionOrderField.CREATED_AT: ("created_at", Sorted.TIME, False),
    ModelVersionOrderField.SIZE: ("size_bytes", Sorted.WHOLE, False),
}


def model_order(given: ModelOrder | None, default: ModelOrderField) -> Order:
    path, kind = MODEL_ORDERS[given.field if given else default]
    return Order(path, kind, given is not None and given.direction is OrderDirection.ASC)


def version_order(given: ModelVersionOrder | None) -> Order:
    path, kind, unique = VERSION_ORDERS[given.field if given else ModelVersionOrderField.NUMBER]
    ascending = given is not None and given.direction is OrderDirection.ASC
    return Order(path, kind, ascending, unique)
