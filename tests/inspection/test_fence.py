"""The fence: whatever happens in it comes to an inspection, and it goes on."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from modelharbor.db.files import FileFormat, ScanVerdict
from modelharbor.errors import NotStored, Unavailable
from modelharbor.inspection import confinement
from modelharbor.inspection.fence import Fence, open_fence
from modelharbor.inspection.results import Inspection
from modelharbor.settings import Settings
from tests.inspection.escapes import contents

pytestmark = pytest.mark.anyio
ROOT = str(Path(__file__).parents[2])
ACT = "tests.inspection.escapes:act"
Read = Callable[[int, int], Awaitable[bytes]]
needs_filter = pytest.mark.skipif(
    not confinement.filters_calls(), reason="this system cannot filter calls"
)


@pytest.fixture(scope="module")
async def fence() -> AsyncIterator[Fence]:
    """It runs what the contents name."""
    async with open_fence(Settings(), most=4, inspector=ACT, path=[ROOT]) as fence:
        yield fence


@pytest.fixture
async def strict() -> AsyncIterator[Fence]:
    """With little time and memory."""
    settings = Settings(inspection_seconds=1, inspection_memory_bytes=64 * 1024 * 1024)
    async with open_fence(settings, most=4, inspector=ACT, path=[ROOT]) as fence:
        yield fence


def reader(data: bytes) -> Read:
    async def read(start: int, end: int) -> bytes:
        return data[start:end]

    return read


async def run(
    fence: Fence, what: str, given: object = "", stage: Callable[[str], None] | None = None
) -> Inspection:
    data = contents(what, given)
    return await fence.inspect(reader(data), len(data), stage)


def outcome(inspection: Inspection) -> tuple[str, list[str]]:
    return inspection.verdict.value, [each.rule for each in inspection.findings]


async def assert_alive(fence: Fence) -> None:
    assert outcome(await run(fence, "nothing")) == ("SAFE", [])


def server(fence: Fence) -> psutil.Process:
    assert fence._server is not None
    return psutil.Process(fence._server._process.pid)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "what",
    [
        *("write", "read", "socket", "fork", "exec", "spawn", "thread", "unpickle", "import"),
        *("recursion", "quit"),
    ],
)
async def test_what_it_may_not_do_ends_it(fence: Fence, tmp_path: Path, what: str) -> None:
    canary = tmp_path / "canary"
    there = tmp_path / "there"
    there.write_text("secret")
    given = str(there if what == "read" else canary)
    assert outcome(await run(fence, what, given)) == ("ERROR", ["fence.failed"])
    assert not canary.exists()
    assert server(fence).children(recursive=True) == []
    await assert_alive(fence)


@needs_filter
async def test_the_system_refuses_what_goes_past_python(fence: Fence, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    tried = (await run(fence, "errors", str(canary))).header
    assert tried == {name: [-1, "EPERM"] for name in tried}
    assert len(tried) == 15
    assert not canary.exists()


async def test_there_is_nothing_to_find(fence: Fence, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELHARBOR_SECRET_KEY", "s" * 40)
    there = (await run(fence, "what_is_there")).header
    assert set(there["environment"]) <= {"LANG", "LC_CTYPE", "OPENBLAS_NUM_THREADS"}
    assert there["descriptors"] == [0, 1, 2, 10, 11]  # three that lead nowhere, two pipes
    with suppress(psutil.AccessDenied):  # it is hidden from all but root
        assert server(fence).net_connections("inet") == []
        assert Path(server(fence).cwd()) == Path("/")


@pytest.mark.parametrize(
    ("what", "rules"),
    [
        ("exit", ["fence.crashed"]),
        ("abort", ["fence.crashed"]),
        ("crash", ["fence.crashed"]),
        ("huge", ["fence.garbage"]),
        ("nonsense", ["fence.garbage"]),
        ("beyond", ["fence.garbage"]),
        ("wide", ["fence.garbage"]),
        ("stages", ["fence.garbage"]),
    ],
)
async def test_crashes_and_nonsense_are_errors(fence: Fence, what: str, rules: list[str]) -> None:
    inspection = await run(fence, what)
    assert outcome(inspection) == ("ERROR", rules)
    assert (inspection.format, inspection.tensors, inspection.header) == (
        FileFormat.OTHER,
        None,
        None,
    )
    await assert_alive(fence)


@pytest.mark.parametrize(
    ("what", "rules"),
    [("loop", ["fence.timeout"]), ("sleep", ["fence.timeout"]), ("memory", ["fence.memory"])],
)
async def test_time_and_memory_are_limited(strict: Fence, what: str, rules: list[str]) -> None:
    assert outcome(await run(strict, what)) == ("ERROR", rules)
    await until(lambda: server(strict).children() == [])
    await assert_alive(strict)


GOOD: dict[str, Any] = {
    "verdict": "SAFE",
    "format": "GGUF",
    "findings": [["INFO", "a.rule", "A detail.", 3]],
    "tensors": [2, 10, {"F32": 10}, "llama", 4096, None],
    "header": {"a": 1},
}


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": "PENDING"},
        {"verdict": "FINE"},
        {"verdict": ["SAFE"]},
        {"format": "WORD"},
        {"findings": [["INFO", "a.rule", "A detail."]]},
        {"findings": [["LOUD", "a.rule", "A detail.", None]]},
        {"findings": [["INFO", 3, "A detail.", None]]},
        {"findings": [["INFO", "a.rule", "A detail.", -1]]},
        {"findings": [["INFO", "a.rule", "A detail.", 2**63]]},
        {"findings": [["INFO", "a", "b", 1]] * 51},
        {"findings": {"a": 1}},
        {"tensors": [2, 10]},
        {"tensors": [True, 10, {}, None, None, None]},
        {"tensors": [2, -10, {}, None, None, None]},
        {"tensors": [2, 1e3, {}, None, None, None]},
        {"tensors": [2, 10, {"F32": "10"}, None, None, None]},
        {"tensors": [2, 10, {str(n): n for n in range(101)}, None, None, None]},
        {"tensors": [2, 10, {}, 7, None, None]},
    ],
    ids=str,
)
async def test_a_lying_answer_is_an_error(fence: Fence, change: dict[str, Any]) -> None:
    answer = json.dumps({**GOOD, **change}, separators=(",", ":"))
    assert outcome(await run(fence, "lie", answer)) == ("ERROR", ["fence.garbage"])


@pytest.mark.parametrize("answer", ["[]", "null", "{}", "[" * 900, '{"verdict":', "1" * 900, "NaN"])
async def test_what_is_no_answer_is_an_error(fence: Fence, answer: str) -> None:
    assert outcome(await run(fence, "lie", answer)) == ("ERROR", ["fence.garbage"])


async def test_an_answer_becomes_what_can_be_stored(fence: Fence) -> None:
    answer = {
        **GOOD,
        "findings": [["INFO", "r" * 70, "a\0b\ud800", 2**63 - 1]],
        "header": {"$where": 2**70, "a.b": [[1.5, None]], "c\0": "\ud800", "d": True},
    }
    found = await run(fence, "lie", json.dumps(answer))
    assert found.findings[0].rule == "r" * 60
    assert found.findings[0].detail == "ab?"
    assert found.findings[0].offset == 2**63 - 1
    assert found.header == {
        "＄where": str(2**70),  # noqa: RUF001  # full-width on purpose
        "a．b": [[1.5, None]],  # noqa: RUF001  # full-width on purpose
        "c": "?",
        "d": True,
    }
    assert found.tensors is not None
    assert found.tensors.parameters_by_dtype == {"F32": 10}


async def test_many_at_once(fence: Fence) -> None:
    whats = ["nothing", "crash", "exit", "write", "nonsense"] * 8
    found = await asyncio.gather(*(run(fence, what, "/nowhere") for what in whats))
    assert [each.verdict for each in found] == [ScanVerdict.SAFE, *[ScanVerdict.ERROR] * 4] * 8
    await until(lambda: server(fence).children() == [])


async def test_contents_come_whole_by_pieces(fence: Fence) -> None:
    data = contents("all", size=4000) + bytes(range(251)) * 80_000
    longest, most_at_once, reading = 0, 0, 0

    async def read(start: int, end: int) -> bytes:
        nonlocal longest, most_at_once, reading
        assert 0 <= start < end <= len(data)
        longest = max(longest, end - start)
        reading += 1
        most_at_once = max(most_at_once, reading)
        await asyncio.sleep(0)
        reading -= 1
        return data[start:end]

    total = 0
    for at in range(0, len(data), 3_000_000):
        total += sum(data[at : at + 3_000_000][::4093])
    for at in range(len(data) - 100, 0, -1_000_003):
        total += sum(data[at : at + 100])
    found = await fence.inspect(read, len(data))
    assert found.header == {"total": total}
    assert longest <= 1024 * 1024
    assert most_at_once <= 8


async def test_stages_are_told(fence: Fence) -> None:
    told: list[str] = []
    await run(fence, "nothing", stage=told.append)
    assert told == ["sniff"]


class Gone(Exception):
    pass


@pytest.mark.parametrize("error", [NotStored("gone"), Unavailable("down"), TimeoutError(), Gone()])
async def test_errors_of_the_storage_pass_on(fence: Fence, error: Exception) -> None:
    async def read(start: int, end: int) -> bytes:
        raise error

    with pytest.raises(type(error)):
        await fence.inspect(read, 100)
    await until(lambda: server(fence).children() == [])
    await assert_alive(fence)


async def test_contents_that_are_shorter_than_known_are_not_stored(fence: Fence) -> None:
    with pytest.raises(NotStored):
        await fence.inspect(reader(b"nothing"), 100)


async def test_errors_of_who_is_told_pass_on(fence: Fence) -> None:
    def stage(_: str) -> None:
        raise Gone

    with pytest.raises(Gone):
        await run(fence, "nothing", stage=stage)
    await until(lambda: server(fence).children() == [])


async def test_a_storage_that_does_not_answer_is_not_the_files_fault(strict: Fence) -> None:
    async def read(start: int, end: int) -> bytes:
        await asyncio.sleep(600)
        return b""

    with pytest.raises(Unavailable):
        await strict.inspect(read, 100)
    await until(lambda: server(strict).children() == [])


async def test_who_is_cancelled_leaves_nothing(fence: Fence) -> None:
    begun = asyncio.Event()
    task = asyncio.create_task(run(fence, "sleep", stage=lambda _: begun.set()))
    await begun.wait()
    assert len(server(fence).children()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert server(fence).children() == []
    await assert_alive(fence)


async def test_a_server_that_dies_is_started_again(fence: Fence) -> None:
    await assert_alive(fence)
    first = server(fence)
    data = contents("nothing")
    tries = 0

    async def read(start: int, end: int) -> bytes:
        nonlocal tries
        tries += 1
        if tries == 1:
            first.kill()
            await asyncio.sleep(600)
        return data[start:end]

    assert outcome(await fence.inspect(read, len(data))) == ("SAFE", [])
    assert tries == 2
    assert server(fence).pid != first.pid


async def test_a_server_that_dies_of_each_try_is_an_error(fence: Fence) -> None:
    def stage(_: str) -> None:
        server(fence).kill()

    assert outcome(await run(fence, "sleep", stage=stage)) == ("ERROR", ["fence.crashed"])
    await assert_alive(fence)


async def test_a_server_that_cannot_start_is_unavailable() -> None:
    async with open_fence(Settings(), inspector="modelharbor.nowhere:nothing") as fence:
        with pytest.raises(Unavailable):
            await run(fence, "nothing")


async def test_nothing_is_left_at_the_end() -> None:
    async with open_fence(Settings(), most=2, inspector=ACT, path=[ROOT]) as fence:
        begun = asyncio.Event()
        task = asyncio.create_task(run(fence, "sleep", stage=lambda _: begun.set()))
        await begun.wait()
        process = server(fence)
        children = process.children()
        assert len(children) == 1
    with pytest.raises(Unavailable):
        await task
    assert not process.is_running()
    assert not children[0].is_running()


async def test_nothing_starts_before_the_first_file() -> None:
    async with open_fence(Settings()) as fence:
        assert fence._server is None


async def test_the_limits_stay_where_calls_cannot_be_filtered(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on other systems; what is left is Python's own refusal."""
    hook = "from modelharbor.inspection import confinement as c; c.filters_calls = lambda: False\n"
    (tmp_path / "unfiltered.py").write_text(
        f"{hook}from tests.inspection.escapes import act\n__all__ = ['act']\n"
    )
    canary = tmp_path / "canary"
    path = [str(tmp_path), ROOT]
    async with open_fence(Settings(), inspector="unfiltered:act", path=path) as fence:
        for what in ("write", "socket", "fork", "exec", "spawn", "unpickle"):
            assert outcome(await run(fence, what, str(canary))) == ("ERROR", ["fence.failed"])
        assert not canary.exists()
        await assert_alive(fence)
    assert sys.platform
