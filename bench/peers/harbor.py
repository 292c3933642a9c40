"""Our own server with one field more in its schema: a stored series, which the house itself does not have."""

import argparse
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Final

import strawberry
import uvicorn
from starlette.applications import Starlette

from modelharbor import app
from modelharbor.db.base import Row
from modelharbor.execution.declaration import loaded
from modelharbor.http.server import options
from modelharbor.loaders.base import Loader, Sharing
from modelharbor.schema import CONFIG, TYPES
from modelharbor.schema.mutation import Mutation
from modelharbor.schema.query import Query as HouseQuery
from modelharbor.schema.scalars import BigInt

COLLECTION: Final = "bench_series"


@dataclass(frozen=True, slots=True)
class SeriesWanted:
    libraries: tuple[str, ...]


class SeriesLoader(Loader[str, list[Row], SeriesWanted]):
    """Rows {library, points: [{day, downloads}]}, in the order of the libraries that are wanted."""

    sharing = Sharing.EVERYBODY

    async def batch_load(self, keys: list[str]) -> list[list[Row]]:
        wanted = self.arguments.libraries
        query = {"library": {"$in": list(wanted)}}
        rows = await self.find(COLLECTION, query, ["library", "points"])
        by_library = {row["library"]: row for row in rows}
        found = [by_library[library] for library in wanted if library in by_library]
        return [found for _ in keys]


def series_wanted(
    libraries: Annotated[list[str], strawberry.argument(description="Which libraries.")],
) -> SeriesWanted:
    return SeriesWanted(tuple(libraries))


@strawberry.type(description="Downloads of one day.")
class SeriesPoint:
    day: datetime = strawberry.field(description="When the day began.")
    downloads: BigInt = strawberry.field(description="How many.")


@strawberry.type(description="The downloads of one library, by days.")
class LibrarySeries:
    library: str = strawberry.field(description="The library.")
    points: list[SeriesPoint] = strawberry.field(description="Its days, in order.")


@strawberry.type(name="Query", description="What can be asked.")
class Query(HouseQuery):
    series: list[LibrarySeries] = loaded(
        SeriesLoader, arguments=series_wanted, description="Downloads of libraries, by days."
    )


def make_schema() -> strawberry.Schema:
    return strawberry.Schema(Query, Mutation, types=TYPES, config=CONFIG)


def create_app() -> Starlette:
    """As `modelharbor serve` makes it: settings from the environment."""
    return app.create_app(schema=make_schema())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    wanted = options(arguments.host, arguments.port, workers=1)
    uvicorn.run(**wanted | {"app": f"{__spec__.name}:create_app"})


if __name__ == "__main__":
    main()
