"""One line for each event, for people or for machines."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import TextIO

import pytest
from pydantic import ValidationError

from modelharbor.observability.logging import (
    JsonFormatter,
    TextFormatter,
    configure_logging,
    hold_no_lines,
    log_event,
    request_id,
)
from modelharbor.settings import Settings

log = logging.getLogger("modelharbor.test")


@pytest.fixture
def record(caplog: pytest.LogCaptureFixture) -> logging.LogRecord:
    caplog.set_level(logging.INFO, log.name)
    log_event(log, logging.INFO, "upload.completed", upload_id="u1", name="a\nb", bytes=7)
    return caplog.records[0]


def test_text_is_one_line_whatever_is_in_it(record: logging.LogRecord) -> None:
    record.created = 0.25
    token = request_id.set("r1")
    line = TextFormatter().format(record)
    request_id.reset(token)
    assert (
        line == r"00:00:00.250 INFO upload.completed upload_id=u1 name=a\nb bytes=7 request_id=r1"
    )


def test_json_has_every_field(record: logging.LogRecord) -> None:
    record.created = 0.25
    assert json.loads(JsonFormatter().format(record)) == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "INFO",
        "logger": "modelharbor.test",
        "message": "upload.completed",
        "upload_id": "u1",
        "name": "a\nb",
        "bytes": 7,
    }


@pytest.mark.parametrize("formatter", [TextFormatter(), JsonFormatter()])
def test_exceptions_are_whole(formatter: logging.Formatter) -> None:
    try:
        raise RuntimeError("the reason")
    except RuntimeError:
        record = log.makeRecord(log.name, logging.ERROR, "f", 1, "job.failed", (), sys.exc_info())
    line = formatter.format(record)
    assert "job.failed" in line
    assert "RuntimeError: the reason" in line


def test_what_is_not_logged_is_not_made(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, log.name)
    log_event(log, logging.INFO, "nothing")
    assert caplog.records == []


@pytest.mark.parametrize(("form", "kind"), [("text", TextFormatter), ("json", JsonFormatter)])
def test_a_process_has_one_handler(
    monkeypatch: pytest.MonkeyPatch, form: str, kind: type[logging.Formatter]
) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", list(root.handlers))
    level = root.level
    try:
        configure_logging(Settings(log_format=form, log_level="warning"))
        assert [type(handler.formatter) for handler in root.handlers] == [kind]
        assert root.level == logging.WARNING
    finally:
        root.setLevel(level)


@pytest.mark.parametrize("level", ["nonsense", "", "10", "INFO ", "NOTSET"])
def test_a_level_that_does_not_exist_is_refused_with_the_settings(level: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Settings(log_level=level)
    assert [error["loc"] for error in refused.value.errors()] == [("log_level",)]


@pytest.mark.parametrize("level", ["debug", "Info", "WARNING", "error", "CRITICAL"])
def test_levels_are_named_in_any_case(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    configure_logging(Settings(log_level=level))
    assert logging.getLevelName(root.level) == level.upper()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, TextIO]]:
    """A process's standard error, and the end at which it is read."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w")
    monkeypatch.setattr(sys, "stderr", stream)
    configure_logging(Settings(log_level="info"))
    yield reading, stream
    with suppress(OSError):
        stream.close()


def read(reading: int) -> list[str]:
    return os.read(reading, 65536).decode().splitlines()


def test_lines_are_written_some_at_a_time_and_warnings_at_once(pipe: tuple[int, TextIO]) -> None:
    reading, _ = pipe
    log_event(log, logging.INFO, "first")
    log_event(log, logging.INFO, "second")
    assert [line.split()[-1] for line in read(reading)] == ["first", "second"]  # waits for them
    log_event(log, logging.INFO, "third")
    log.warning("now")
    os.set_blocking(reading, False)
    assert [line.split()[-1] for line in read(reading)] == ["third", "now"]


def test_a_process_that_ends_holds_no_lines(pipe: tuple[int, TextIO]) -> None:
    reading, _ = pipe
    log_event(log, logging.INFO, "last request")
    os.set_blocking(reading, False)
    hold_no_lines()
    assert [line.split(maxsplit=2)[-1] for line in read(reading)] == ["last request"]
    log_event(log, logging.INFO, "bye")
    assert [line.split()[-1] for line in read(reading)] == ["bye"]


def test_nobody_who_reads_the_log_harms_nobody_who_writes_it(pipe: tuple[int, TextIO]) -> None:
    reading, _ = pipe
    os.close(reading)
    log.error("lost")
    for _ in range(600):
        log_event(log, logging.INFO, "lost too")
    hold_no_lines()
    log.error("and this")


def test_milliseconds_have_three_digits(record: logging.LogRecord) -> None:
    record.created = 1_700_000_000.9999996
    assert TextFormatter().format(record).startswith("22:13:20.999 ")
