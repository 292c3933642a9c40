"""`plan`: how an operation runs."""

from pathlib import Path

import pytest

from tests.cli.conftest import Done, Run

pytestmark = pytest.mark.anyio


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "page.graphql"


async def test_reads_and_function_are_shown(run: Run, file: Path) -> None:
    file.write_text(
        "query Page($n: Int!) { models(first: $n) { nodes { name owner { login } } } }"
        " query Mine { viewer { login } }"
    )
    done = await run("plan", str(file), "--operation", "Page", "--variables", '{"n": 3}')
    assert (done.code, done.err) == (0, "")
    table, function = done.out.split("\n\n")
    assert [line.split() for line in table.splitlines()] == [
        ["Read", "Loader", "By", "Stored", "names"],
        ["models", "ModelPageLoader", "arguments", "name,", "owner_id"],
        ["models.nodes.owner", "ActorByIdLoader", "owner_id", "login"],
    ]
    assert function.startswith("async def plan(run):\n")
    assert "'login': " in function
    mine = await run("plan", str(file), "--operation", "Mine")
    assert (mine.code, "ViewerLoader" in mine.out) == (0, True)


async def test_what_is_skipped_is_not_read(run: Run, file: Path) -> None:
    file.write_text(
        "query($no: Boolean!) { models { nodes { name owner @skip(if: $no) { login } } } }"
    )
    for given, read in (("true", False), ("false", True)):
        done = await run("plan", str(file), "--variables", f'{{"no": {given}}}')
        assert (done.code, "ActorByIdLoader" in done.out) == (0, read)


@pytest.mark.parametrize(
    ("text", "more", "told"),
    [
        (
            "{ health { status } }",
            (),
            "No plan, graphql-core runs it: Query.health has a resolver of its own.",
        ),
        ("{ __schema { types { name } } }", (), "No plan, graphql-core runs it: introspection."),
        ("query($n: Int!) { models(first: $n) { totalCount } }", (), "--variables does not fit"),
        ("{ models { totalCount } }", ("--variables", "{"), "--variables takes a JSON object."),
        ("{ models { totalCount } }", ("--variables", "[]"), "--variables does not fit"),
        ("{ nothing }", (), "is no document of this schema: Cannot query field 'nothing'"),
        ("{", (), "is no document of this schema: Syntax Error"),
        ("query A { viewer { id } } query B { viewer { id } }", (), "has several operations"),
    ],
)
async def test_without_a_plan_the_reason_is_told_in_one_line(
    run: Run, file: Path, text: str, more: tuple[str, ...], told: str
) -> None:
    file.write_text(text)
    done = await run("plan", str(file), *more)
    assert (done.code, done.out) == (1, "")
    assert told in done.err
    assert done.err.count("\n") == 1


async def test_a_file_that_is_no_text(run: Run, file: Path) -> None:
    file.write_bytes(b"\xff")
    assert await run("plan", str(file)) == Done(
        1, "", f"modelharbor: {file} is no text in UTF-8.\n"
    )


async def test_a_file_that_is_not_there(run: Run, file: Path) -> None:
    line = f"modelharbor: {file}: No such file or directory\n"
    assert await run("plan", str(file)) == Done(1, "", line)
