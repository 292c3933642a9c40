"""`purge`."""

from pathlib import Path
from typing import Annotated

import typer
from pymongo.errors import ConfigurationError
from pymongo.uri_parser import parse_uri

from .running import read_settings
from .telling import Failure


def purge(
    target: Annotated[
        str,
        typer.Argument(
            help="Folder of nginx's cache on this machine; or an address (http, https) that takes a POST with `Surrogate-Key`."
        ),
    ],
    header: Annotated[
        list[str] | None,
        typer.Option(help="`Name: value` for the address; may be given several times."),
    ] = None,
) -> None:
    """Rid a cache in front of the server of what has changed, until SIGINT or SIGTERM."""
    # Here: the other commands start without them.
    from modelharbor.http.purging import Address, NginxFolder, be_purger

    settings = read_settings()
    try:
        parse_uri(settings.mongo_url)
    except (ConfigurationError, ValueError) as error:
        raise Failure(f"MODELHARBOR_MONGO_URL: {error}") from None
    headers = dict(map(_named, header or ()))
    if target.startswith(("http://", "https://")):
        be_purger(settings, Address(target, headers))
    elif headers:
        raise Failure("--header is for an address.")
    elif not Path(target).is_dir():
        raise Failure(
            f"{target} is no folder, and no address that begins with http:// or https://."
        )
    else:
        be_purger(settings, NginxFolder(Path(target)))


def _named(header: str) -> tuple[str, str]:
    name, colon, value = header.partition(":")
    if not colon or not name.strip():
        raise typer.BadParameter("it is `Name: value`", param_hint="--header")
    return name.strip(), value.strip()
