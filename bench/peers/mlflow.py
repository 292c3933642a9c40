"""MLflow beside us: the same models in its own SQLite store, asked over its REST API."""

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypeAlias
from urllib.parse import quote

import pymongo

from bench.operation import WrongAnswer

Row: TypeAlias = dict[str, Any]
Get: TypeAlias = Callable[[str], Row]
"""A path to the JSON that is answered."""

PAGE: Final = 20
PAGES: Final = 100  # that are asked for
API: Final = "/api/2.0/mlflow/registered-models"
BEGINS: Final = "{"  # an answer; its errors have a status
COLUMNS: Final = {
    "registered_models": 5,
    "registered_model_tags": 4,
    "model_versions": 14,
}


@dataclass(frozen=True, slots=True)
class Asked:
    """A path, and the names of the models that its answer lists."""

    path: str
    names: tuple[str, ...]

    @property
    def line(self) -> str:
        """As the script of wrk reads it."""
        return f"GET {self.path}\n"


def is_filled(store: Path, models: int) -> bool:
    """Whether an earlier run has filled it: that was one transaction."""
    with closing(sqlite3.connect(store)) as connection:
        [found] = connection.execute("SELECT count(*) FROM registered_models").fetchone()
    return bool(found == models)


def fill(store: Path, mongo_url: str, database: str) -> None:
    """Copy all models with their tags and versions into the tables that MLflow has made."""
    with (
        pymongo.MongoClient[Row](mongo_url, tz_aware=True) as client,
        closing(sqlite3.connect(store)) as connection,
        connection,  # one transaction
    ):
        data = client[database]
        names = {row["_id"]: mlflow_name(row["owner_login"], row["name"]) for row in _models(data)}
        for table, rows in (
            ("registered_models", map(model_row, _models(data))),
            ("registered_model_tags", (tag for row in _models(data) for tag in tag_rows(row))),
            ("model_versions", (_version_row(names, row) for row in data["versions"].find({}))),
        ):
            marks = ", ".join("?" * COLUMNS[table])
            columns = f" ({', '.join(VERSION_COLUMNS)})" if table == "model_versions" else ""
            connection.execute(f"DELETE FROM {table}")
            connection.executemany(f"INSERT INTO {table}{columns} VALUES ({marks})", rows)
        connection.execute("ANALYZE")


def _models(data: Any) -> Iterator[Row]:
    yield from data["models"].find({})


def mlflow_name(owner: str, name: str) -> str:
    """Its names hold no `/`."""
    return f"{owner}--{name}"


def _milliseconds(row: Row, name: str) -> int:
    at: datetime = row[name]
    return round(at.timestamp() * 1000)


def model_row(row: Row) -> tuple[Any, ...]:
    return (
        mlflow_name(row["owner_login"], row["name"]),
        _milliseconds(row, "created_at"),
        _milliseconds(row, "updated_at"),
        row["summary"],
        "default",
    )


def tag_rows(row: Row) -> Iterator[tuple[str, str, str, str]]:
    """(key, value, model, workspace)"""
    name = mlflow_name(row["owner_login"], row["name"])
    tags = dict.fromkeys(row["tags"], "true") | {
        "task": row["task"],
        "library": row["library"],
        "license": row["license"],
        "downloads": str(row["stats"]["downloads_30d"]),
    }
    return ((key, value, name, "default") for key, value in tags.items() if value is not None)


VERSION_COLUMNS: Final = (
    *("name", "version", "creation_time", "last_updated_time", "description", "user_id"),
    *("current_stage", "source", "run_id", "status", "status_message", "run_link"),
    *("storage_location", "workspace"),
)


def _version_row(names: dict[Any, str], row: Row) -> tuple[Any, ...]:
    name, number = names[row["model_id"]], row["number"]
    at = _milliseconds(row, "created_at")
    source = f"mlflow-artifacts:/models/{name}/{number}"
    return (
        *(name, number, at, at, row["description"], None),
        *("None", source, None, "READY", None, None),
        *(source, "default"),
    )


def asked(
    operation: str, variables: tuple[Row, ...], get: Get, mongo_url: str, database: str
) -> list[Asked]:
    """What is asked instead of an operation with its variables: as much as MLflow has of it."""
    if operation == "model":
        names = [mlflow_name(each["owner"], each["name"]) for each in variables]
        return [Asked(f"{API}/get?name={quote(name, '')}", (name,)) for name in names]
    with pymongo.MongoClient[Row](mongo_url) as client:
        models = [
            (mlflow_name(row["owner_login"], row["name"]), row["task"], row["license"])
            for row in _models(client[database])
        ]
    models.sort()
    if operation == "page":
        return pages(get, [name for name, _, _ in models])
    return [filtered(each["filter"], models) for each in variables]


def pages(get: Get, names: list[str]) -> list[Asked]:
    """Pages by name, with the tokens that the answers give."""
    found = [Asked(f"{API}/search?max_results={PAGE}", tuple(names[:PAGE]))]
    while len(found) < min(PAGES, len(names) // PAGE):
        token = quote(get(found[-1].path)["next_page_token"], "")
        start = len(found) * PAGE
        path = f"{API}/search?max_results={PAGE}&page_token={token}"
        found.append(Asked(path, tuple(names[start : start + PAGE])))
    return found


def filtered(given: Row, models: list[tuple[str, str, str | None]]) -> Asked:
    """Of a task and the first of the licences: it does not know `or`."""
    task, license_ = given["task"]["eq"], given["license"]["in"][0]
    wanted = f"tags.task = '{task}' AND tags.license = '{license_}'"
    names = [name for name, *rest in models if rest == [task, license_]]
    path = f"{API}/search?max_results={PAGE}&filter={quote(wanted, '')}"
    return Asked(path, tuple(names[:PAGE]))


def check(asked: Asked, answer: Row) -> None:
    """Raise WrongAnswer unless the answer lists the models that it should, in their order."""
    listed = [answer["registered_model"]] if "registered_model" in answer else None
    rows = listed or answer.get("registered_models", [])
    found = tuple(row["name"] for row in rows)
    if not asked.names or found != asked.names:
        raise WrongAnswer(f"mlflow answers {asked.path} with {found}, not {asked.names}")
