"""What an export is measured by: PyMongo's cursor, and orjson, by hand; the same rows, and nothing else.

Run in a process of its own: the database's address and name, a filter's first principals, what, and where to.
"""

import json
import resource
import sys
import time
from base64 import b64encode
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import orjson
import pymongo
from bson import json_util

Row = dict[str, Any]
AT_ONCE: Final = 1000
MOST_BELOW: Final = 1000  # rows of a connection below, as an export has them
MODELS: Final = """{ models { nodes {
  id fullName task library license tags visibility createdAt updatedAt
  stats { downloads30d likes versions sizeBytes }
} } }"""
NESTED: Final = """query Nested($filter: ModelFilter) { models(filter: $filter) { nodes {
  id fullName createdAt
  versions { nodes { number status sizeBytes files { nodes { path sizeBytes sha256 } } } }
} } }"""
FIELDS: Final = ("owner_login", "name", "task", "library", "license", "tags", "visibility", "created_at", "updated_at", "stats.downloads_30d", "stats.likes", "stats.versions", "stats.size_bytes")  # fmt: skip


def model_of(row: Row) -> Row:
    stats = row["stats"]
    return {
        "id": id_of(row),
        "fullName": f"{row['owner_login']}/{row['name']}",
        "task": row["task"],
        "library": row["library"],
        "license": row["license"],
        "tags": row["tags"],
        "visibility": row["visibility"],
        "createdAt": time_of(row["created_at"]),
        "updatedAt": time_of(row["updated_at"]),
        "stats": {
            "downloads30d": str(stats["downloads_30d"]),
            "likes": stats["likes"],
            "versions": stats["versions"],
            "sizeBytes": str(stats["size_bytes"]),
        },
    }


def id_of(row: Row) -> str:
    return b64encode(f"Model:{row['_id']}".encode()).decode()


def time_of(at: datetime) -> str:
    return at.isoformat("T", "milliseconds") + "Z"


def rows_of(data: Any, query: Row) -> Iterator[Row]:
    found = (
        data["models"].find(query, dict.fromkeys(FIELDS, 1)).sort([("created_at", 1), ("_id", 1)])
    )
    yield from map(model_of, found.batch_size(AT_ONCE))


def nested_of(data: Any, query: Row) -> Iterator[Row]:
    names = ("owner_login", "name", "created_at")
    found = (
        data["models"].find(query, dict.fromkeys(names, 1)).sort([("created_at", 1), ("_id", 1)])
    )
    some: list[Row] = []
    for row in found.batch_size(AT_ONCE):
        some.append(row)
        if len(some) == AT_ONCE:
            yield from _with_versions(data, some)
            some = []
    yield from _with_versions(data, some)


def _with_versions(data: Any, models: list[Row]) -> Iterator[Row]:
    listed: Row = {
        "model_id": {"$in": [row["_id"] for row in models]},
        "status": {"$ne": "DELETED"},
    }
    names = ("model_id", "number", "status", "size_bytes")
    versions = list(data["versions"].find(listed, dict.fromkeys(names, 1)).sort("number", -1))
    files: dict[Any, list[Row]] = {}
    ids = [row["_id"] for row in versions]
    for start in range(0, len(ids), AT_ONCE):
        within = {"version_id": {"$in": ids[start : start + AT_ONCE]}}
        names = ("version_id", "path", "size_bytes", "sha256")
        for row in data["files"].find(within, dict.fromkeys(names, 1)).sort("path", 1):
            files.setdefault(row["version_id"], []).append(
                {"path": row["path"], "sizeBytes": str(row["size_bytes"]), "sha256": row["sha256"]}
            )
    by_model: dict[Any, list[Row]] = {}
    for row in versions:
        by_model.setdefault(row["model_id"], []).append(
            {
                "number": row["number"],
                "status": row["status"],
                "sizeBytes": str(row["size_bytes"]),
                "files": {"nodes": files.get(row["_id"], [])[:MOST_BELOW]},
            }
        )
    for row in models:
        yield {
            "id": id_of(row),
            "fullName": f"{row['owner_login']}/{row['name']}",
            "createdAt": time_of(row["created_at"]),
            "versions": {"nodes": by_model.get(row["_id"], [])[:MOST_BELOW]},
        }


def main() -> int:
    url, name, query, what, to = sys.argv[1:]
    rows = {"models": rows_of, "nested": nested_of}[what]
    count, begun = 0, time.monotonic()
    with pymongo.MongoClient[Row](url) as client, Path(to).open("wb") as file:
        for row in rows(client[name], json_util.loads(query)):
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    used = resource.getrusage(resource.RUSAGE_SELF)
    told = {
        "rows": count,
        "seconds": time.monotonic() - begun,
        "cpu": used.ru_utime + used.ru_stime,
        "mebibytes": used.ru_maxrss / 1024,
    }
    sys.stdout.write(json.dumps(told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
