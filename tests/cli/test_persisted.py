"""`persisted`."""

import json
import os
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from modelharbor.db.connection import Database
from modelharbor.http.server import environment
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run
from tests.cli.test_server import PATIENCE_SECONDS, answers, free_port
from tests.resolvers.state import everything

pytestmark = pytest.mark.anyio
NAMES = "query Names { models { nodes { name owner { login } } } }"
COUNT = "query Count { models { totalCount } }"


def manifest(folder: Path, content: Any) -> str:
    file = folder / "manifest.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return str(file)


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


async def test_publish_list_diff_and_retire(run: Run, database: Database, tmp_path: Path) -> None:
    file = manifest(tmp_path, {"names": NAMES, f"sha256:{digest(COUNT)}": COUNT})
    told = f"new: Names (names)\nnew: Count ({digest(COUNT)})\n"
    publish = ("persisted", "publish", file, "--client", "web")
    empty = await everything(database)
    assert await run(*publish, "--dry-run") == Done(
        0, f"{told}2 operations of web: 2 would be published, 0 are there already.\n", ""
    )
    assert await everything(database) == empty
    assert await run(*publish, "--price", "Names=500") == Done(
        0, f"{told}2 operations of web: 2 published, 0 are there already.\n", ""
    )
    before = await everything(database)
    again = await run(*publish, "--json")
    assert json.loads(again.out) == {
        "new": [],
        "again": [],
        "repriced": [],
        "troubles": [],
        "same": ["names", digest(COUNT)],
    }
    after = await everything(database)
    assert after["persisted_documents"] == before["persisted_documents"]
    assert await run(*publish, "--price", "Names=none") == Done(
        0, "price: Names (names)\n2 operations of web: 1 published, 1 is there already.\n", ""
    )

    listed = json.loads((await run("persisted", "list", "--client", "web", "--json")).out)
    assert [row.pop("published_at") is not None for row in listed] == [True, True]
    common = {"client": "web", "kind": "query", "price": None, "calls": 0, "last_used_at": None}
    both = [
        {**common, "document_id": "names", "name": "Names"},
        {**common, "document_id": digest(COUNT), "name": "Count"},
    ]
    assert sorted(listed, key=lambda row: str(row["name"]), reverse=True) == both
    assert json.loads((await run("persisted", "list", "--client", "app", "--json")).out) == []

    async def selecting(field: str) -> list[str]:
        done = await run("persisted", "list", "--field", field, "--json")
        assert done.err == ""
        return sorted(row["name"] for row in json.loads(done.out))

    assert await selecting("Query.models") == ["Count", "Names"]
    assert await selecting("Model.name") == ["Names"]
    assert await selecting("User.login") == ["Names"]  # through the interface Actor
    assert await selecting("Model.summary") == []
    unknown = await run("persisted", "list", "--field", "Model.nothing", "--json")
    assert unknown == Done(0, "[]\n", "The schema has no field Model.nothing.\n")

    newer = manifest(tmp_path, {"names": NAMES, "new": "query New { __typename }"})
    diff = ("persisted", "diff", newer, "--client", "web")
    assert await run(*diff) == Done(
        0,
        f"+ new\n- {digest(COUNT)}\n1 new, 1 published, 1 in the manifest no more.\n",
        "",
    )
    assert json.loads((await run(*diff, "--json")).out) == {
        "new": ["new"],
        "same": ["names"],
        "left": [digest(COUNT)],
    }

    assert await run("persisted", "retire", f"sha256:{digest(COUNT)}") == Done(
        0, f"retired: {digest(COUNT)}\n", ""
    )
    unused = ("persisted", "retire", "--client", "web", "--unused-days", "1")
    assert await run(*unused) == Done(0, "Nothing was to be retired.\n", "")
    assert await run("persisted", "retire", "--client", "web") == Done(0, "retired: names\n", "")
    assert await selecting("Query.models") == []


async def test_apollos_manifest_comes_from_standard_input(run: Run, database: Database) -> None:
    operation = {"id": digest(NAMES), "name": "Names", "type": "query", "body": NAMES}
    content = {"format": "apollo-persisted-query-manifest", "version": 1, "operations": [operation]}
    done = await run(*("persisted", "publish", "-", "--client", "web"), input=json.dumps(content))
    assert done == Done(
        0,
        f"new: Names ({digest(NAMES)})\n1 operation of web: 1 published, 0 are there already.\n",
        "",
    )


async def test_where_one_breaks_nothing_is_published(
    run: Run, database: Database, tmp_path: Path
) -> None:
    content = {
        "names": NAMES,
        "deep": "query Deep { models { nodes { owner { login } } } }",
        "gone": "query Gone {\n  models {\n    gone\n  }\n}",
        "fragment": "fragment Only on Model { name }",
        "two": "query A { __typename } query B { __typename }",
    }
    file = manifest(tmp_path, content)
    before = await everything(database)
    publish = ("persisted", "publish", file, "--client", "web")
    done = await run(*publish, MODELHARBOR_MAX_DEPTH="3")
    assert done.code == 1
    assert done.out == ""
    assert done.err.splitlines() == [
        "(names): The operation's depth is 4; the limit is 3 [OPERATION_TOO_COMPLEX]",
        "(deep): The operation's depth is 4; the limit is 3 [OPERATION_TOO_COMPLEX]",
        "(gone), 3:5: Cannot query field 'gone' on type 'ModelConnection' [GRAPHQL_VALIDATION_FAILED]",
        "(fragment), 1:1: Fragment 'Only' is never used [GRAPHQL_VALIDATION_FAILED]",
        "(two): the text has several operations: publish each by itself [BAD_INPUT]",
        f"modelharbor: {file}: nothing of it is published.",
    ]
    assert await everything(database) == before
    done = await run(*publish, "--json")
    assert (done.code, done.err) == (1, f"modelharbor: {file}: nothing of it is published.\n")
    troubles = json.loads(done.out)["troubles"]
    assert troubles[0] == {
        "code": "GRAPHQL_VALIDATION_FAILED",
        "message": "Cannot query field 'gone' on type 'ModelConnection'",
        "id": "gone",
        "name": None,
        "line": 3,
        "column": 5,
    }
    assert [each["id"] for each in troubles] == ["gone", "fragment", "two"]
    assert await everything(database) == before


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"{", "The manifest is not JSON in UTF-8 (line 1). [BAD_INPUT]"),
        ({}, "The manifest has no operations. [BAD_INPUT]"),
        (
            {digest(NAMES): COUNT},
            f"({digest(NAMES)}): the id is the SHA-256 of another text [BAD_INPUT]",
        ),
        (
            {str(number): NAMES for number in range(100_000)},
            "The manifest has 100,000 operations; the limit is 10,000: publish it in parts. [PAYLOAD_TOO_LARGE]",
        ),
        (
            b" " * (32 * 2**20 + 5),
            "The manifest has 33,554,433 bytes; the limit is 33,554,432. [PAYLOAD_TOO_LARGE]",
        ),
        (
            {"a": "{" + "a " * 20_000 + "}"},
            "(a): the text has 40,002 bytes; the limit is 32,768 [PAYLOAD_TOO_LARGE]",
        ),
    ],
)
async def test_a_bad_manifest_is_told(
    run: Run, database: Database, tmp_path: Path, content: Any, told: str
) -> None:
    file = manifest(tmp_path, content)
    before = await everything(database)
    for command in ("publish", "diff"):
        done = await run("persisted", command, file, "--client", "web")
        assert done == Done(1, "", f"{told}\nmodelharbor: {file}: nothing of it is published.\n")
    assert await everything(database) == before


async def test_many_troubles_are_told_in_part(run: Run, database: Database, tmp_path: Path) -> None:
    file = manifest(tmp_path, {f"id{number}": number for number in range(150)})
    done = await run("persisted", "publish", file, "--client", "web")
    assert (done.code, done.err.count("\n")) == (1, 102)
    assert "\nand 50 more\n" in done.err


async def test_an_id_of_another_client_is_told(
    run: Run, database: Database, tmp_path: Path
) -> None:
    await run("persisted", "publish", manifest(tmp_path, {"a": NAMES}), "--client", "web")
    file = manifest(tmp_path, {"a": COUNT, "b": COUNT})
    done = await run("persisted", "publish", file, "--client", "app")
    assert done == Done(
        1,
        "",
        "Count (a): published by web with another text: retire that, or choose another id [CONFLICT]\n"
        f"modelharbor: {file}: nothing of it is published.\n",
    )


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["publish", "FILE"], 2, "Missing option '--client'. (--help tells more)"),
        (
            ["publish", "FILE", "--client", "web", "--price", "Names"],
            2,
            "Invalid value for --price: 'Names' is no NAME=COST, such as Search=500. (--help tells more)",
        ),
        (
            ["publish", "FILE", "--client", "web", "--price", "Names=-1"],
            2,
            "Invalid value for --price: 'Names=-1' is no NAME=COST, such as Search=500. (--help tells more)",
        ),
        (
            ["publish", "FILE", "--client", "web", "--price", "Other=1"],
            1,
            "The manifest has no operation 'Other', for --price.",
        ),
        (
            ["publish", "FILE", "--client", " "],
            1,
            "The client is empty: give 1 to 200 characters.",
        ),
        (
            ["publish", "nothing.json", "--client", "web"],
            1,
            "nothing.json: No such file or directory",
        ),
        (
            ["list", "--field", "name"],
            2,
            "Invalid value for --field: 'name' is no TYPE.FIELD, such as Model.name. (--help tells more)",
        ),
        (["retire"], 2, "Invalid value: give ids, or --client. (--help tells more)"),
        (
            ["retire", "--unused-days", "5"],
            2,
            "Invalid value for --unused-days: it goes with --client, without ids. (--help tells more)",
        ),
        (
            ["retire", "a", "--client", "web", "--unused-days", "5"],
            2,
            "Invalid value for --unused-days: it goes with --client, without ids. (--help tells more)",
        ),
        (["retire", "nobody's"], 1, 'There is no published operation "nobody\'s".'),
    ],
)
async def test_what_cannot_be_done_is_told(
    arguments: list[str], code: int, line: str, run: Run, database: Database, tmp_path: Path
) -> None:
    file = manifest(tmp_path, {"names": NAMES})
    before = await everything(database)
    given = [file if each == "FILE" else each for each in arguments]
    assert await run("persisted", *given) == Done(code, "", f"modelharbor: {line}\n")
    assert await everything(database) == before


async def test_calls_are_counted_also_those_just_before_the_end(
    run: Run, database: Database, settings: Settings, tmp_path: Path
) -> None:
    await run("persisted", "publish", manifest(tmp_path, {"count": COUNT}), "--client", "web")
    port = free_port()
    with (
        (tmp_path / "server.log").open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "modelharbor", "serve", "--port", str(port)],
            env={**os.environ, **environment(settings)},
            cwd=tmp_path,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        try:
            assert answers(port), (tmp_path / "server.log").read_text()
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
                for _ in range(7):
                    answer = client.get("/graphql", params={"documentId": "count"})
                    assert answer.json() == {"data": {"models": {"totalCount": 0}}}
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) in (0, -signal.SIGTERM)
        finally:
            process.kill()
    (row,) = json.loads((await run("persisted", "list", "--json")).out)
    assert (row["document_id"], row["calls"]) == ("count", 7)
    assert row["last_used_at"] is not None
