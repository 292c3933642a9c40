"""What commands have in common that talk to a server somewhere else, as anyone may."""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn, TypeVar

import orjson
import typer

from modelharbor.client import Client, ClientError, Unreachable, base_url

from .telling import Failure, end, tell

T = TypeVar("T")
NOT_REACHABLE: Final = 3
QUARANTINED: Final = 4
FAILED: Final = 5
INTERRUPTED: Final = 130  # as of a shell: 128 + SIGINT
EXIT_CODES: Final = "Exit codes: 0 done; 1 refused, or it failed; 2 the command is mistyped; 3 the server cannot be reached; 130 interrupted."
VERSION_EXIT_CODES: Final = (
    f"{EXIT_CODES[:-1]}; 4 the version is quarantined; 5 the version failed."
)
URL_VARIABLE: Final = "MODELHARBOR_URL"
TOKEN_VARIABLE: Final = "MODELHARBOR_TOKEN"
Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        help=f"Address of the server. \\[default: {URL_VARIABLE}, else as `login` stored it]",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        help=f"API token; others on this machine can see it here, so better: {TOKEN_VARIABLE}, or `login`.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="No bars, and nothing but failures.")]
AsJson = Annotated[bool, typer.Option("--json", help="No bars; the result as JSON, for programs.")]
Parallel = Annotated[
    int, typer.Option(min=1, max=32, help="Files, or parts of large ones, at once.")
]


@dataclass(frozen=True, slots=True)
class Login:
    """Which server, and who asks."""

    url: str
    token: str | None

    def __repr__(self) -> str:
        return f"Login({self.url!r})"  # without the token: this ends up in tracebacks


def config_path() -> Path:
    """Where `login` keeps the address and the token."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(given) if Path(given).is_absolute() else Path.home() / ".config"
    return home / "modelharbor" / "login.json"


def stored_login() -> Login | None:
    """Failure: the file is there, but is not what `login` writes."""
    path = config_path()
    try:
        found = orjson.loads(path.read_bytes())
        url, token = found["url"], found["token"]
    except FileNotFoundError:
        return None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise Failure(f"{path} is damaged: `modelharbor login` writes it anew.") from None
    if not isinstance(url, str) or not isinstance(token, str | None):
        raise Failure(f"{path} is damaged: `modelharbor login` writes it anew.")
    return Login(url, token)


def store_login(login: Login) -> Path:
    """In a file that nobody else can read."""
    path = config_path()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    made = path.with_name(f".{path.name}.{os.getpid()}")
    made.unlink(missing_ok=True)
    descriptor = os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(orjson.dumps({"url": login.url, "token": login.token}))
    made.replace(path)
    return path


def find_login(url: str | None, token: str | None) -> Login:
    """From the options, else the environment, else the file. Failure: none, or no address.

    The stored token is of the stored server: no other one is shown it.
    """
    stored = stored_login()
    found = url or os.environ.get(URL_VARIABLE) or (stored.url if stored else None)
    if not found:
        raise Failure(
            f"Which server? Give --url, set {URL_VARIABLE}, or store it with `modelharbor login`."
        )
    try:
        place = base_url(found)
    except ClientError as error:
        raise Failure(error.message) from None
    given = token or os.environ.get(TOKEN_VARIABLE)
    if not given and stored is not None and stored.url == place:
        given = stored.token
    return Login(place, given or None)


def with_client(
    url: str | None,
    token: str | None,
    work: Callable[[Client], Awaitable[T]],
    *,
    interrupted: str,
) -> T:
    """Do the work with a client of that server. A failure ends the process with its own code."""

    async def connected(login: Login) -> T:
        async with Client(login.url, login.token) as client:
            return await work(client)

    try:
        return asyncio.run(connected(find_login(url, token)))
    except KeyboardInterrupt:
        tell(interrupted)
        sys.exit(INTERRUPTED)
    except ClientError as error:
        fail(error)


def fail(error: ClientError) -> NoReturn:
    """In one line."""
    end(plainly(error.message), NOT_REACHABLE if isinstance(error, Unreachable) else 1)


def show_result(result: dict[str, Any], *, as_json: bool, quiet: bool, lines: list[str]) -> None:
    if as_json:
        typer.echo(orjson.dumps(result, option=orjson.OPT_INDENT_2).decode())
    elif not quiet:
        for line in lines:
            typer.echo(plainly(line))


def counted(count: int, name: str) -> str:
    return f"{count:,} {name if count == 1 else name + 's'}"


def plainly(text: str) -> str:
    """What another machine says, without what terminals take for commands."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)
