"""The yardstick: the five operations written out by hand, each for itself, with no GraphQL in between.

A body {operationName, variables} is answered with the JSON that our server gives to that operation: the
same commands to MongoDB, as many, in the same order; only what stands in the answer is read.
"""

import argparse
import asyncio
import gc
import os
from base64 import urlsafe_b64decode, urlsafe_b64encode
from binascii import b2a_base64
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Final, TypeAlias

import orjson
import uvicorn
from bson import ObjectId
from bson.codec_options import CodecOptions
from pymongo import AsyncMongoClient
from pymongo.asynchronous.database import AsyncDatabase
from starlette.applications import Starlette
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

Row: TypeAlias = dict[str, Any]
Operation: TypeAlias = Callable[[AsyncDatabase[Row], Row], Awaitable[Row]]

GARBAGE_THRESHOLDS: Final = (5000, 10, 1_000_000)  # as our own server has them
CONNECTIONS: Final = 100  # to MongoDB, as our own server
PLACES: Final = 100  # operations at once, likewise
TIMEOUT_MILLISECONDS: Final = 5_000  # of each command, likewise
MAJORITY: Final = {"level": "majority"}  # likewise
VISIBLE: Final = {"state": "ACTIVE", "principals": "public"}
LISTED: Final = {"$ne": "DELETED"}
TRENDING: Final = "-stats.trending_score"

MODEL: Final = dict.fromkeys(
    (
        *("owner_login", "name", "summary", "task", "library", "license", "tags"),
        *("created_at", "updated_at", "stats.downloads_30d"),
    ),
    1,
)
LISTED_MODEL: Final = dict.fromkeys(
    (
        *("owner_id", "owner_login", "name", "summary", "task", "library", "license", "tags"),
        *("created_at", "updated_at", "latest_version_id"),
        *("stats.downloads_30d", "stats.likes", "stats.trending_score"),
    ),
    1,
)
OWNER: Final = {"kind": 1, "login": 1, "display_name": 1}
VERSION: Final = {"number": 1, "size_bytes": 1, "file_count": 1, "published_at": 1}
FILE: Final = {"_id": 0, "path": 1, "size_bytes": 1, "sha256": 1, "format": 1}
FILTERED_MODEL: Final = dict.fromkeys(
    ("owner_login", "name", "task", "license", "updated_at", "stats.downloads_30d"), 1
)
FOUND_MODEL: Final = dict.fromkeys(("owner_login", "name", "summary", "task", "score"), 1)
SERIES: Final = {"_id": 0, "library": 1, "points": 1}


def global_id(typename: str, object_id: ObjectId) -> str:
    text = f"{typename}:{object_id.binary.hex()}"
    return b2a_base64(text.encode(), newline=False).decode()


def moment(value: datetime) -> str:
    """Of a naive time in UTC."""
    return value.isoformat("T", "milliseconds") + "Z"


async def find(
    database: AsyncDatabase[Row], collection: str, query: Row, **options: Any
) -> list[Row]:
    told = await database.command(
        {
            "find": collection,
            "filter": query,
            **options,
            "batchSize": 10_000,
            "singleBatch": True,
            "maxTimeMS": TIMEOUT_MILLISECONDS,
            "readConcern": MAJORITY,
        }
    )
    found: list[Row] = told["cursor"]["firstBatch"]
    return found


async def aggregate(
    database: AsyncDatabase[Row], collection: str | int, pipeline: list[Row]
) -> list[Row]:
    told = await database.command(
        {
            "aggregate": collection,
            "pipeline": pipeline,
            "cursor": {"batchSize": 10_000},
            "maxTimeMS": TIMEOUT_MILLISECONDS,
            "readConcern": MAJORITY,
        }
    )
    found: list[Row] = told["cursor"]["firstBatch"]
    return found


async def model(database: AsyncDatabase[Row], variables: Row) -> Row:
    query = {
        "owner_login_lower": variables["owner"].lower(),
        "name_lower": variables["name"].lower(),
        "principals": "public",
    }
    rows = await find(database, "models", query, projection=MODEL)
    if not rows:
        return {"model": None}
    row = rows[0]
    return {
        "model": {
            "id": global_id("Model", row["_id"]),
            "fullName": f"{row['owner_login']}/{row['name']}",
            "summary": row["summary"],
            "task": row["task"],
            "library": row["library"],
            "license": row["license"],
            "tags": row["tags"],
            "createdAt": moment(row["created_at"]),
            "updatedAt": moment(row["updated_at"]),
            "stats": {"downloads30d": str(row["stats"]["downloads_30d"])},
        }
    }


def place_of(row: Row) -> str:
    packed = orjson.dumps([TRENDING, row["stats"]["trending_score"], str(row["_id"])])
    return urlsafe_b64encode(packed).decode().rstrip("=")


def beyond(cursor: str | None) -> Row:
    """The filter of what comes after a place in the order of trends."""
    if cursor is None:
        return VISIBLE
    _, score, hexadecimal = orjson.loads(urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    return {
        "$or": [
            {**VISIBLE, "stats.trending_score": {"$lt": score}},
            {
                **VISIBLE,
                "stats.trending_score": score,
                "_id": {"$lt": ObjectId(hexadecimal)},
            },
        ]
    }


async def owners_of(database: AsyncDatabase[Row], rows: list[Row]) -> dict[ObjectId, Row]:
    ids = list({row["owner_id"] for row in rows})
    found = await find(database, "actors", {"_id": {"$in": ids}}, projection=OWNER)
    return {
        row["_id"]: {
            "id": global_id(row["kind"], row["_id"]),
            "login": row["login"],
            "displayName": row["display_name"],
        }
        for row in found
    }


async def versions_of(
    database: AsyncDatabase[Row], rows: list[Row], files: int
) -> dict[ObjectId, Row]:
    ids = [row["latest_version_id"] for row in rows if row["latest_version_id"] is not None]
    if not ids:
        return {}
    query = {"_id": {"$in": ids}, "status": LISTED}
    versions = await find(database, "versions", query, projection=VERSION)
    if not versions:
        return {}
    pipeline: list[Row] = [
        {"$documents": [{"key": version["_id"]} for version in versions]},
        {
            "$lookup": {
                "from": "files",
                "localField": "key",
                "foreignField": "version_id",
                "pipeline": [{"$sort": {"path": 1}}, {"$limit": files + 1}, {"$project": FILE}],
                "as": "rows",
            }
        },
    ]
    listed = {row["key"]: row["rows"] for row in await aggregate(database, 1, pipeline)}
    return {
        version["_id"]: {
            "id": global_id("ModelVersion", version["_id"]),
            "number": version["number"],
            "sizeBytes": str(version["size_bytes"]),
            "fileCount": version["file_count"],
            "publishedAt": moment(version["published_at"]) if version["published_at"] else None,
            "files": {
                "nodes": [
                    {
                        "path": row["path"],
                        "sizeBytes": str(row["size_bytes"]),
                        "sha256": row["sha256"],
                        "format": row["format"],
                    }
                    for row in listed[version["_id"]][:files]
                ]
            },
        }
        for version in versions
    }


async def page(database: AsyncDatabase[Row], variables: Row) -> Row:
    first = variables["first"]
    found = await find(
        database,
        "models",
        beyond(variables.get("after")),
        projection=LISTED_MODEL,
        sort={"stats.trending_score": -1, "_id": -1},
        limit=first + 1,
    )
    rows = found[:first]
    owners, versions = await asyncio.gather(
        owners_of(database, rows), versions_of(database, rows, variables["files"])
    )
    return {
        "models": {
            "nodes": [
                {
                    "id": global_id("Model", row["_id"]),
                    "fullName": f"{row['owner_login']}/{row['name']}",
                    "summary": row["summary"],
                    "task": row["task"],
                    "library": row["library"],
                    "license": row["license"],
                    "createdAt": moment(row["created_at"]),
                    "updatedAt": moment(row["updated_at"]),
                    "tags": row["tags"],
                    "owner": owners[row["owner_id"]],
                    "latestVersion": versions.get(row["latest_version_id"]),
                    "stats": {
                        "downloads30d": str(row["stats"]["downloads_30d"]),
                        "likes": row["stats"]["likes"],
                    },
                }
                for row in rows
            ],
            "pageInfo": {
                "endCursor": place_of(rows[-1]) if rows else None,
                "hasNextPage": len(found) > first,
            },
        }
    }


def condition(name: str, given: Row) -> Row:
    return {name: given["eq"]} if "eq" in given else {name: {"$in": given["in"]}}


async def filtered(database: AsyncDatabase[Row], variables: Row) -> Row:
    """By task and licences, the most downloads first."""
    given = variables["filter"]
    query = {
        "principals": "public",
        "state": "ACTIVE",
        **condition("task", given["task"]),
        **condition("license", given["license"]),
    }
    counting = [{"$match": query}, {"$group": {"_id": 1, "n": {"$sum": 1}}}]
    rows, counted = await asyncio.gather(
        find(
            database,
            "models",
            query,
            projection=FILTERED_MODEL,
            sort={"stats.downloads_30d": -1, "_id": -1},
            limit=variables["first"] + 1,
        ),
        aggregate(database, "models", counting),
    )
    return {
        "models": {
            "totalCount": counted[0]["n"] if counted else 0,
            "nodes": [
                {
                    "id": global_id("Model", row["_id"]),
                    "fullName": f"{row['owner_login']}/{row['name']}",
                    "task": row["task"],
                    "license": row["license"],
                    "updatedAt": moment(row["updated_at"]),
                    "stats": {"downloads30d": str(row["stats"]["downloads_30d"])},
                }
                for row in rows[: variables["first"]]
            ],
        }
    }


async def series(database: AsyncDatabase[Row], variables: Row) -> Row:
    wanted = variables["libraries"]
    query = {"library": {"$in": wanted}}
    rows = {
        row["library"]: row["points"]
        for row in await find(database, "bench_series", query, projection=SERIES)
    }
    return {
        "series": [
            {
                "library": library,
                "points": [
                    {"day": moment(point["day"]), "downloads": str(point["downloads"])}
                    for point in rows[library]
                ],
            }
            for library in wanted
            if library in rows
        ]
    }


async def search(database: AsyncDatabase[Row], variables: Row) -> Row:
    words = " ".join(f'"{word}"' for word in variables["words"].split())
    pipeline: list[Row] = [
        {"$match": {"$text": {"$search": words}, "principals": "public", "state": "ACTIVE"}},
        {"$set": {"score": {"$meta": "textScore"}}},
        {"$sort": {"score": -1, "_id": -1}},
        {"$limit": variables["first"] + 1},
        {"$project": FOUND_MODEL},
    ]
    rows = await aggregate(database, "models", pipeline)
    return {
        "models": {
            "edges": [
                {
                    "score": row["score"],
                    "node": {
                        "id": global_id("Model", row["_id"]),
                        "fullName": f"{row['owner_login']}/{row['name']}",
                        "summary": row["summary"],
                        "task": row["task"],
                    },
                }
                for row in rows[: variables["first"]]
            ]
        }
    }


OPERATIONS: Final[dict[str, Operation]] = {
    "Model": model,
    "Page": page,
    "Filtered": filtered,
    "Series": series,
    "Search": search,
}


class Endpoint:
    """Pure ASGI below Starlette's route: no request or response objects."""

    def __init__(self) -> None:
        self.places = asyncio.Semaphore(PLACES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        message = await receive()
        body: bytes = message["body"]
        while message.get("more_body"):
            message = await receive()
            body += message["body"]
        asked = orjson.loads(body)
        operation = OPERATIONS[asked["operationName"]]
        async with self.places:
            found = await operation(scope["state"]["database"], asked["variables"])
        answer = orjson.dumps({"data": found})
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(answer)),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[Row]:
    client: AsyncMongoClient[Row] = AsyncMongoClient(
        os.environ["MODELHARBOR_MONGO_URL"], maxPoolSize=CONNECTIONS
    )
    async with client:
        name = os.environ["MODELHARBOR_MONGO_DATABASE"]
        database = client.get_database(name, codec_options=CodecOptions(tz_aware=False))
        await database.command("ping")
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        yield {"database": database}


def create_app() -> Starlette:
    return Starlette(routes=[Route("/graphql", Endpoint(), methods=["POST"])], lifespan=lifespan)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    uvicorn.run(
        f"{__spec__.name}:create_app",
        factory=True,
        host=arguments.host,
        port=arguments.port,
        loop="uvloop",
        http="httptools",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        date_header=False,
        proxy_headers=False,
        backlog=2048,
    )


if __name__ == "__main__":
    main()
