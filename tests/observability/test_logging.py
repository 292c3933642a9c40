"""One line for each event, for people or for machines."""

import json
import logging
import sys

import pytest
from pydantic import ValidationError

from modelharbor.observability.logging import (
    JsonFormatter,
    TextFormatter,
    configure_logging,
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
