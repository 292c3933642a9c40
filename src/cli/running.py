"""How a command runs: its settings, its database, and its failures, each told in one line."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from datetime import datetime
from typing import Annotated, Any, NoReturn, TypeVar

import orjson
import typer
from obstore.exceptions import BaseError as StorageError
from pydantic import ValidationError
from pydantic_settings import SettingsError
from pymongo.errors import ConfigurationError, ConnectionFailure, PyMongoError
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup
from typer.exceptions import TyperException

from modelharbor.db.base import Row
from modelharbor.db.connection import Database, connect
from modelharbor.db.migrations import pending
from modelharbor.errors import HarborError, Refused
from modelharbor.settings import Settings

T = TypeVar("T")
USAGE_CODE = 2
PIPE_WIDTH = 10_000  # columns
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for programs.")]
Limit = Annotated[int, typer.Option(min=1, help="Most rows.")]


class Failure(Exception):
    """What a person at the terminal can mend; told in one line."""


class Commands(TyperGroup):
    """The root of all commands: expected failures end in one line on stderr, without a traceback."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        given = sys.argv[1:] if args is None else list(args)
        with failures_told():
            code = super().main(
                given or ["--help"],
                prog_name="modelharbor",
                complete_var=complete_var,
                standalone_mode=False,  # we print failures and end the process ourselves
                windows_expand_args=windows_expand_args,
                **extra,
            )
        sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def failures_told() -> Iterator[None]:
    try:
        yield
    except TyperException as error:
        hint = " (--help tells more)" if error.exit_code == USAGE_CODE else ""
        end(f"{error.format_message()}{hint}", error.exit_code)
    except typer.Abort:
        end("stopped; nothing was done.")
    except (Failure, HarborError, Refused) as error:
        end(str(error))
    except ConnectionFailure as error:
        end(
            f"MongoDB does not answer ({_first(error)}): start it, or say where it is with MODELHARBOR_MONGO_URL."
        )
    except PyMongoError as error:
        end(f"MongoDB does not do its part: {_first(error)}")
    except StorageError as error:
        end(f"The file storage does not do its part: {error}")
    except OSError as error:
        end(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _first(error: PyMongoError) -> str:
    """Of a message that repeats itself for each server and ends with all that is known of them."""
    return (
        str(error).split(" (configured", 1)[0].split(", full error", 1)[0].split(", Timeout", 1)[0]
    )


def end(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"modelharbor: {' '.join(message.split())}", err=True)
    sys.exit(code)


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


def tell(message: str) -> None:
    """Beside the answer itself: on stderr, so that pipes get the answer alone."""
    typer.echo(message, err=True)


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
