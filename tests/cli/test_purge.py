"""`purge`: what it refuses. As a process that purges: tests/deploy/test_deployed.py."""

from pathlib import Path

import pytest

from tests.cli.conftest import Done, Run

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["nothing"],
            1,
            "nothing is no folder, and no address that begins with http:// or https://.",
        ),
        ([".", "--header", "a: b"], 1, "--header is for an address."),
        (
            ["http://cdn.example", "--header", "secret"],
            2,
            "Invalid value for --header: it is `Name: value` (--help tells more)",
        ),
    ],
)
async def test_what_it_cannot_do_is_told_in_a_line(
    run: Run, arguments: list[str], code: int, message: str
) -> None:
    assert await run("purge", *arguments) == Done(code, "", f"modelharbor: {message}\n")


async def test_a_database_that_is_none_is_told(run: Run, tmp_path: Path) -> None:
    done = await run("purge", str(tmp_path), MODELHARBOR_MONGO_URL="mongodb://host:99999/")
    assert done.code == 1
    assert done.err.startswith("modelharbor: MODELHARBOR_MONGO_URL: ")
