"""`schema`."""

from pathlib import Path

import pytest

from modelharbor.schema.sdl import schema_text
from tests.cli.conftest import Done, Run

pytestmark = pytest.mark.anyio


async def test_what_is_printed_is_what_is_checked(run: Run, tmp_path: Path) -> None:
    assert await run("schema", "print") == Done(0, schema_text(), "")
    file = tmp_path / "printed.graphql"
    assert await run("schema", "print", str(file)) == Done(0, "", "")
    assert file.read_bytes() == schema_text().encode()
    assert await run("schema", "check", str(file)) == Done(0, f"{file} is the served schema.\n", "")


async def test_a_difference_is_shown(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "old.graphql"
    old = schema_text().replace("\nscalar SHA256 ", "\nscalar SHA1 ")
    file.write_text(old)
    done = await run("schema", "check", str(file))
    assert (done.code, done.err) == (
        1,
        f"modelharbor: {file} is not the served schema: `modelharbor schema print {file}` renews it.\n",
    )
    changed = [line[:14] for line in done.out.splitlines() if line[0] in "+-"]
    assert changed == [f"--- {file}"[:14], "+++ served", "-scalar SHA1 @", "+scalar SHA256"]
    assert file.read_text() == old


async def test_a_byte_more_is_a_difference(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "old.graphql"
    file.write_bytes(schema_text().encode() + b"\xff")
    assert (await run("schema", "check", str(file))).code == 1


async def test_a_file_that_is_not_there_is_told_in_one_line(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "missing" / "x.graphql"
    line = f"modelharbor: {file}: No such file or directory\n"
    assert await run("schema", "check", str(file)) == Done(1, "", line)
    assert await run("schema", "print", str(file)) == Done(1, "", line)
    assert not file.parent.exists()
