"""What a command tells a person: failures in one line each. Imports nothing of the server."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

USAGE_CODE = 2


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
    except Failure as error:
        end(str(error))
    except OSError as error:
        end(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        from .running import explained  # it is slow to import, and few commands end here

        told = explained(error)
        if told is None:
            raise
        end(told)


def end(message: str, code: int = 1) -> NoReturn:
    typer.echo(f"modelharbor: {' '.join(message.split())}", err=True)
    sys.exit(code)


def tell(message: str) -> None:
    """Beside the answer itself: on stderr, so that pipes get the answer alone."""
    typer.echo(message, err=True)
