"""How a command runs: its settings, its database, and its failures, each told in one line."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from typing import Annotated, TypeVar

import orjson
import typer
from obstore.exceptions import BaseError as StorageError
from pydantic import ValidationError
from pydantic_settings import SettingsError
from pymongo.errors import ConfigurationError, ConnectionFailure, PyMongoError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from modelharbor.db.base import Row
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import pending
from modelharbor.errors import HarborError, Refused
from modelharbor.settings import Settings

from .telling import Failure, tell

T = TypeVar("T")
PIPE_WIDTH = 10_000  # columns
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]
Limit = Annotated[int, typer.Option(min=1, help="Most rows.")]


def explained(error: Exception) -> str | None:
    """What an expected failure of the server's parts is told as; None: it was not expected."""
    match error:
        case HarborError() | Refused():
            return str(error)
        case ConnectionFailure():
            return f"MongoDB does not answer ({_first(error)}): start it, or say where it is with MODELHARBOR_MONGO_URL."
        case PyMongoError():
            return f"MongoDB does not do its part: {_first(error)}"
        case StorageError():
            return f"The file storage does not do its part: {error}"
    return None


def _first(error: PyMongoError) -> str:
    """Of a message that repeats itself for each server and ends with all that is known of them."""
    return (
        str(error).split(" (configured", 1)[0].split(", full error", 1)[0].split(", Timeout", 1)[0]
    )


def read_settings() -> Settings:
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]).upper()
        raise Failure(f"MODELHARBOR_{name}: {first['msg']}") from None  # never the value
    except SettingsError as error:
        raise Failure(
            f'{error}: lists and maps are JSON, such as ["a", "b"] and {{"disk": "/srv/models"}}'
        ) from None


def on_database(
    work: Callable[[Database], Awaitable[T]],
    settings: Settings | None = None,
    *,
    migrated: bool = True,
) -> T:
    """Do the work on a connection of its own; by default only where no migration is pending."""

    async def connected() -> T:
        async with AsyncExitStack() as stack:
            try:
                database = await stack.enter_async_context(connect(settings or read_settings()))
            except (ConfigurationError, ValueError) as error:
                raise Failure(f"MODELHARBOR_MONGO_URL: {error}") from None
            if migrated and await pending(database):
                # Without its unique indexes a database takes what it must refuse.
                raise Failure("The database is not up to date: run `modelharbor migrate` first.")
            return await work(database)

    return asyncio.run(connected())


def tell_if_cut(rows: Sequence[Row], limit: int) -> None:
    if len(rows) == limit:
        tell(f"These are the first {limit}: more with --limit.")


def show(rows: Sequence[Row], columns: dict[str, str], *, as_json: bool) -> None:
    """Rows as JSON, or as a table for people; `columns` are keys with their headings."""
    if as_json:
        show_json([{key: row.get(key) for key in columns} for row in rows])
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in columns.values():
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(row.get(key))) for key in columns))
    print_table(table)


def print_table(table: Table) -> None:
    """As wide as the terminal; into a pipe, with each row on one line."""
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)


def show_json(value: object) -> None:
    typer.echo(orjson.dumps(value, option=orjson.OPT_INDENT_2).decode())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, datetime):
        return f"{value:%Y-%m-%d %H:%M}"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)
