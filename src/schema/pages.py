"""Relay connections by keyset: https://relay.dev/graphql/connections.htm"""

from typing import Annotated, Any, Generic, TypeAlias, TypeVar

import strawberry

from modelharbor.db.base import Row
from modelharbor.db.keyset import (
    DEFAULT_PAGE,
    EVERYTHING,
    MAX_PAGE,
    Filter,
    Order,
    Window,
    decode_cursor,
)
from modelharbor.errors import BadUserInput
from modelharbor.execution.declaration import computed, loaded, rows
from modelharbor.loaders.pages import TotalLoader

from .directives import KEPT, Cost
from .scalars import Cursor

T = TypeVar("T")

First: TypeAlias = Annotated[
    int | None,
    strawberry.argument(
        description="The first so many, 1 to 100; 20 when neither `first` nor `last` is given."
    ),
]
Last: TypeAlias = Annotated[
    int | None,
    strawberry.argument(description="The last so many, 1 to 100; not together with `first`."),
]
After: TypeAlias = Annotated[
    Cursor | None, strawberry.argument(description="Only what comes after this place.")
]
Before: TypeAlias = Annotated[
    Cursor | None, strawberry.argument(description="Only what comes before this place.")
]

PER_ROW = (Cost(weight=1, multipliers=["first", "last"]),)
"""A page costs its rows and what is selected in them."""


def window(
    order: Order,
    first: int | None,
    after: Cursor | None,
    last: int | None,
    before: Cursor | None,
    query: Filter = EVERYTHING,
    search: str | None = None,
) -> Window:
    """The window that the four arguments of a connection ask for; BadUserInput for what they may not."""
    if first is not None and last is not None:
        raise BadUserInput("Give `first` or `last`, not both.")
    for name, value in (("first", first), ("last", last)):
        if value is not None and not 1 <= value <= MAX_PAGE:
            raise BadUserInput(f"`{name}` is {value}; it takes 1 to {MAX_PAGE}.")
    return Window(
        order,
        limit=first or last or DEFAULT_PAGE,
        backward=last is not None,
        after=decode_cursor(order, after) if after is not None else None,
        before=decode_cursor(order, before) if before is not None else None,
        query=query,
        search=search,
    )


def page_edges(nodes: list[Row], window: Window) -> Any:
    return [{"cursor": window.cursor(row), "node": row} for row in nodes]


def page_info(nodes: list[Row], window: Window, has_next: bool, has_previous: bool) -> Any:
    return {
        "has_next_page": has_next,
        "has_previous_page": has_previous,
        "start_cursor": window.cursor(nodes[0]) if nodes else None,
        "end_cursor": window.cursor(nodes[-1]) if nodes else None,
    }


@strawberry.type(description="Where a page begins and ends.", directives=(KEPT,))
class PageInfo:
    has_next_page: bool = strawberry.field(description="Whether more follow.")
    has_previous_page: bool = strawberry.field(description="Whether something stands before it.")
    start_cursor: Cursor | None = strawberry.field(
        description="Place of its first row; give it to `before`."
    )
    end_cursor: Cursor | None = strawberry.field(
        description="Place of its last row; give it to `after`."
    )


@strawberry.type(description="A row and its place in the list.", directives=(KEPT,))
class Edge(Generic[T]):
    cursor: Cursor = strawberry.field(description="The place.")
    node: T = rows(description="What stands there.")


@strawberry.type(description="A page of a list.")
class Connection(Generic[T]):
    edges: list[Edge[T]] = computed(
        page_edges, description="The rows of the page with their places."
    )
    nodes: list[T] = rows(description="The rows of the page.")
    page_info: PageInfo = computed(page_info, description="Where the page begins and ends.")
    total_count: int = loaded(
        TotalLoader,
        key="total",
        description="How many rows the whole list has.",
        directives=(Cost(weight=5), KEPT),
    )
