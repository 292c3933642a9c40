"""Search over models and those who own them."""

from enum import Enum
from typing import Annotated, Any, TypeAlias

import strawberry

from modelharbor.db.base import Row
from modelharbor.db.keyset import Window
from modelharbor.execution.declaration import computed, loaded, rows
from modelharbor.loaders.pages import TotalLoader
from modelharbor.loaders.search import HIGHLIGHTED

from .actors import Organization, User
from .directives import KEPT, Cost
from .models import Highlight, Model, row_highlights
from .pages import PageInfo, page_info
from .scalars import Cursor

SearchResult: TypeAlias = Annotated[
    Model | User | Organization,
    strawberry.union("SearchResult", description="What a search finds."),
]


@strawberry.enum(description="Kinds of things that can be searched.")
class SearchType(Enum):
    MODEL = strawberry.enum_value("Model", description="Models.")
    USER = strawberry.enum_value("User", description="People.")
    ORGANIZATION = strawberry.enum_value("Organization", description="Organizations.")


def search_edges(nodes: list[Row], window: Window) -> Any:
    return [
        {
            "cursor": window.cursor(row),
            "node": row,
            "score": row["score"],
            "search": window.search,
        }
        for row in nodes
    ]


@strawberry.type(description="Something found, and its place in the list.", directives=(KEPT,))
class SearchEdge:
    cursor: Cursor = strawberry.field(description="The place.")
    node: SearchResult = rows(description="What was found.")
    score: float = strawberry.field(description="How well it fits; the best comes first.")
    highlights: list[Highlight] = computed(
        row_highlights, of_rows=HIGHLIGHTED, description="Where the words stand in it."
    )


@strawberry.type(description="A page of what a search finds.")
class SearchConnection:
    edges: list[SearchEdge] = computed(
        search_edges, of_rows=("score",), description="What was found, with places."
    )
    nodes: list[SearchResult] = rows(description="What was found.")
    page_info: PageInfo = computed(page_info, description="Where the page begins and ends.")
    total_count: int = loaded(
        TotalLoader,
        key="total",
        description="How much was found.",
        directives=(Cost(weight=5), KEPT),
    )
