"""`export`."""

import asyncio
import csv
import gzip
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as parquet
import pytest

from modelharbor.cli.bars import RowsBoard, shown_rows
from modelharbor.cli.export import Format, Packing, kind_of
from modelharbor.client import Exporting, Progress, Step
from modelharbor.db.actors import ActorDocument
from modelharbor.db.models import Visibility
from modelharbor.settings import Settings
from tests.cli.conftest import Done, Run
from tests.client.conftest import Quay
from tests.documents import insert_actor, insert_model
from tests.live.serving import serving

pytestmark = pytest.mark.anyio
GUARD_SECONDS = 60.0
QUERY = "query Names($owner: String) { models(filter: {owner: {eq: $owner}}) { nodes { name stats { likes } } } }"
NAMES = ["a", "b", "c"]
ROWS = [{"name": name, "stats": {"likes": 0}} for name in NAMES]


@pytest.fixture
async def quay(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Quay]:
    """Three models of ada's, and a query that finds them."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    async with serving(settings) as served:
        monkeypatch.setenv("MODELHARBOR_URL", f"http://127.0.0.1:{served.port}")
        monkeypatch.setenv("MODELHARBOR_TOKEN", served.token)
        owner = await ActorDocument.get(served.user_id)
        assert owner is not None
        for name in NAMES:
            await insert_model(owner, name, visibility=Visibility.PRIVATE)
        (tmp_path / "q.graphql").write_text(QUERY)
        yield Quay(served, settings, tmp_path)


def rows(data: bytes) -> list[object]:
    return [orjson.loads(line) for line in data.splitlines()]


# ---- by a job


async def test_rows_are_written_by_a_job_and_fetched(run: Run, quay: Quay, tmp_path: Path) -> None:
    query = ("export", "--query", "q.graphql")
    async with quay.working():
        plain = await run(*query, "-o", "rows.jsonl")
        packed = await run(*query, "-o", "rows.csv.gz", "--json")
        typed = await run(*query, "-o", "rows.parquet", "--quiet")
    size = (tmp_path / "rows.jsonl").stat().st_size
    assert plain == Done(0, f"rows.jsonl: 3 rows, {size:,} bytes\n", "")
    assert rows((tmp_path / "rows.jsonl").read_bytes()) == ROWS
    told = orjson.loads(packed.out)
    assert (packed.code, packed.err) == (0, "")
    assert {name: told[name] for name in ("path", "rows", "truncated", "faults")} == {
        "path": "rows.csv.gz",
        "rows": 3,
        "truncated": 0,
        "faults": 0,
    }
    assert told["bytes"] == (tmp_path / "rows.csv.gz").stat().st_size
    with gzip.open(tmp_path / "rows.csv.gz", "rt", newline="") as file:
        assert list(csv.DictReader(file)) == [{"name": name, "stats.likes": "0"} for name in NAMES]
    assert typed == Done(0, "", "")
    assert parquet.read_table(tmp_path / "rows.parquet").to_pylist() == ROWS
    fetched = await run("export", "--job", told["job_id"], "-o", "again.csv.gz")
    assert (fetched.code, fetched.err) == (0, "")
    assert (tmp_path / "again.csv.gz").read_bytes() == (tmp_path / "rows.csv.gz").read_bytes()
    other = await run("export", "--job", told["job_id"], "-o", "again.parquet")
    assert other.code == 0
    assert other.err == f"again.parquet is what the server calls {told['file_name']}.\n"
    assert len(await quay.rows("jobs", kind="EXPORT")) == 3
    assert not list(tmp_path.glob("*.part*"))


async def test_one_of_several_operations_with_variables(
    run: Run, quay: Quay, tmp_path: Path
) -> None:
    await insert_model(await insert_actor("bob"), "z")
    (tmp_path / "q.graphql").write_text(f"{QUERY} query Other {{ models {{ nodes {{ id }} }} }}")
    (tmp_path / "v.json").write_text('{"owner": "ada"}')
    for given in ('{"owner": "ada"}', "@v.json"):
        done = await run(
            *("export", "--query", "q.graphql", "--operation", "Names", "--variables", given),
            *("--stream", "-o", "-"),
        )
        assert (done.code, done.err) == (0, "")
        assert rows(done.out.encode()) == ROWS
    missing = await run(
        *("export", "--query", "q.graphql", "--operation", "None", "--stream", "-o", "-")
    )
    assert missing == Done(1, "", "modelharbor: q.graphql has no operation None.\n")


async def begun(quay: Quay, tmp_path: Path) -> asyncio.subprocess.Process:
    """An export in a process of its own, whose job waits, for no worker is there."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "modelharbor", "export", "--query", "q.graphql", "-o", "rows"),
        cwd=tmp_path,
        env={**os.environ},
        stderr=asyncio.subprocess.PIPE,
    )
    trail = tmp_path / "rows.part.json"
    async with asyncio.timeout(GUARD_SECONDS):
        while not trail.exists() or orjson.loads(trail.read_bytes())["job"] is None:
            assert process.returncode is None
            await asyncio.sleep(0.02)
    return process


async def test_an_export_that_was_killed_goes_on(run: Run, quay: Quay, tmp_path: Path) -> None:
    process = await begun(quay, tmp_path)
    process.send_signal(signal.SIGKILL)
    await process.communicate()
    async with quay.working():
        assert (await run("export", "--query", "q.graphql", "-o", "rows", "--quiet")).code == 0
        assert len(await quay.rows("jobs", kind="EXPORT")) == 1
        assert rows((tmp_path / "rows").read_bytes()) == ROWS
        again = await run("export", "--query", "q.graphql", "-o", "rows", "--quiet")
    assert again.code == 0
    assert len(await quay.rows("jobs", kind="EXPORT")) == 2  # that one had ended
    assert not list(tmp_path.glob("*.part*"))


async def test_an_interrupt_cancels_the_job(run: Run, quay: Quay, tmp_path: Path) -> None:
    process = await begun(quay, tmp_path)
    async with asyncio.timeout(GUARD_SECONDS):
        process.send_signal(signal.SIGINT)
        _, err = await process.communicate()
    [job] = await quay.rows("jobs", kind="EXPORT")
    assert process.returncode == 130
    assert b"is cancelled.\nStopped." in err
    assert job["state"] == "CANCELLED"
    async with quay.working():
        assert (await run("export", "--query", "q.graphql", "-o", "rows", "--quiet")).code == 0
    assert len(await quay.rows("jobs", kind="EXPORT")) == 2
    assert rows((tmp_path / "rows").read_bytes()) == ROWS


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("rows", {}, (Format.JSONL, Packing.NONE)),
        ("rows", {"compression": Packing.ZSTD}, (Format.JSONL, Packing.ZSTD)),
        ("rows.gz", {"format": Format.CSV}, (Format.CSV, Packing.GZIP)),
        ("a.b/ROWS.NDJSON.ZST", {}, (Format.JSONL, Packing.ZSTD)),
        ("rows.2026-01.csv", {}, (Format.CSV, Packing.NONE)),
        ("rows.txt", {"format": Format.CSV}, (Format.CSV, Packing.NONE)),
        ("rows.txt.gz", {"format": Format.JSONL}, (Format.JSONL, Packing.GZIP)),
        ("rows.jsonl.gz", {"compression": Packing.GZIP}, (Format.JSONL, Packing.GZIP)),
        ("rows.parquet", {}, (Format.PARQUET, Packing.ZSTD)),
        ("rows.parquet", {"compression": Packing.NONE}, (Format.PARQUET, Packing.NONE)),
    ],
)
def test_a_name_says_what_a_file_is(
    name: str, options: dict[str, Any], expected: tuple[Format, Packing]
) -> None:
    given = {"format": None, "compression": None, **options}
    assert kind_of(Path(name), **given) == expected


# ---- straight


async def test_rows_are_streamed_to_a_file_or_a_pipe(run: Run, quay: Quay, tmp_path: Path) -> None:
    query = ("export", "--query", "q.graphql", "--stream")
    piped = await run(*query, "-o", "-")
    assert (piped.code, piped.err) == (0, "")
    assert rows(piped.out.encode()) == ROWS
    done = await run(*query, "-o", "rows.csv")
    size = (tmp_path / "rows.csv").stat().st_size
    assert done == Done(0, f"rows.csv: {size} bytes\n", "")
    assert (tmp_path / "rows.csv").read_bytes().startswith(b"name,stats.likes\r\na,0\r\n")
    by_pipe = await run("export", "--query", "-", "--stream", "-o", "-", input=QUERY)
    assert by_pipe.out == piped.out
    assert await quay.rows("jobs") == []


# ---- what is refused


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "Give --query FILE, or --job ID."),
        (["--query", "q.graphql", "--job", "x"], "Give --query FILE, or --job ID."),
        (["--job", "x", "--stream"], "--job takes nothing but where to."),
        (["--query", "q.graphql", "--stream", "--format", "parquet"], "--stream is jsonl or csv"),
        (["--query", "q.graphql", "--stream", "--compression", "gzip"], "--stream is jsonl or csv"),
        (["--query", "q.graphql", "--variables", "[]"], "a JSON object, or @FILE"),
        (["--query", "q.graphql", "--variables", "{"], "a JSON object, or @FILE"),
        (["--query", "q.graphql", "-o", "x.xlsx"], "x.xlsx: .xlsx is none of the formats: .jsonl"),
        (["--query", "q.graphql", "-o", "x.csv.xz"], "x.csv.xz: .xz is none of the formats"),
        (["--query", "q.graphql", "-o", "x.json.gz"], "x.json.gz: .json is none of the formats"),
        (["--query", "q.graphql", "-o", "x.csv", "--format", "parquet"], "x.csv would not be csv"),
        (["--query", "q.graphql", "-o", "x.parquet.gz"], "parquet is compressed within"),
        (
            ["--query", "q.graphql", "-o", "x.csv.gz", "--compression", "zstd"],
            "x.csv.gz has to end in .zst",
        ),
        (
            ["--query", "q.graphql", "-o", "x.csv.gz", "--compression", "none"],
            "x.csv.gz has to end in neither .gz nor .zst",
        ),
        (["--query", "q.graphql", "-o", "x.csv", "--compression", "gzip"], "x.csv has to end in"),
        (["--query", "q.graphql", "-o", "x.csv.gz", "--stream"], "--stream is jsonl or csv"),
    ],
)
async def test_a_mistyped_command_is_told(
    arguments: list[str], line: str, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "q.graphql").write_text(QUERY)
    done = await run("export", "-o", "rows", *arguments)
    assert (done.code, done.out) == (2, "")
    assert line in done.err


async def test_a_query_that_is_no_text_is_told(run: Run, tmp_path: Path) -> None:
    (tmp_path / "q.graphql").write_bytes(b"\xff\xfe{")
    done = await run("export", "--query", "q.graphql", "-o", "rows")
    assert done == Done(1, "", "modelharbor: q.graphql is no text in UTF-8.\n")


async def test_what_the_server_refuses_is_told_and_leaves_nothing(
    run: Run, quay: Quay, tmp_path: Path
) -> None:
    (tmp_path / "q.graphql").write_text("{ viewer { login } }")
    for more in ([], ["--stream"]):
        done = await run("export", "--query", "q.graphql", "-o", "rows", *more)
        assert (done.code, done.out) == (1, "")
        assert "An export is the rows of one connection" in done.err
    assert await run("export", "--query", "q.graphql", "-o", "-") == Done(
        2, "", "modelharbor: Invalid value: -o - takes --stream. (--help tells more)\n"
    )
    stranger = await run("export", "--query", "q.graphql", "-o", "rows", "--token", "mh_no")
    assert stranger.code == 1
    assert "The token is not valid" in stranger.err
    assert not list(tmp_path.glob("rows*"))
    away = await run("export", "--query", "q.graphql", "-o", "none/rows", "--stream")
    assert away == Done(1, "", "modelharbor: none/rows.part: No such file or directory\n")


def test_a_bar_tells_rows_bytes_rate_and_time_left() -> None:
    with shown_rows(hidden=True) as bars:
        board = RowsBoard(bars)
        board.told(Exporting("j", "QUEUED"))
        board.told(Exporting("j", "RUNNING", 1000, 4000, 500.0, 6.2, "1.5 MB [b]written"))
        [task] = bars.tasks
        assert (task.description, task.completed, task.total) == ("Running", 1000, 4000)
        assert task.fields["told"] == (
            "1,000 of 4,000 rows, 1.5 MB \\[b]written, 500 rows/s, 0:00:06 left"
        )
        board.report(Progress("rows", Step.RECEIVING, 2_000, 4_000, 2_000))
        assert bars.tasks[1].fields["told"] == "2.0 kB of 4.0 kB"
        assert (bars.tasks[1].completed, bars.tasks[1].total) == (2_000, 4_000)
