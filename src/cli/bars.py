"""Bars of files that move: some of them, and all together."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Final

from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bars
from rich.table import Column

from modelharbor.client import Exporting, LocalFile, Progress, Step

from .remote import plainly

MOST_BARS: Final = 6  # of files
NAME_WIDTH: Final = 32  # with its word
SAME_SECONDS: Final = 0.05  # between two drawings of one bar
WORDS: Final = {Step.HASHING: "reading", Step.VERIFYING: "verifying"}


class Board:
    """Takes every Progress of a transfer, and shows a handful of bars."""

    def __init__(self, bars: Bars, verb: str, files: int | None, size_bytes: int | None) -> None:
        self.bars = bars
        self._all = bars.add_task(verb, total=size_bytes, start=True)
        self._verb, self._files = verb, files
        self._ended = 0
        self._tasks: dict[str, TaskID] = {}
        self._done: dict[str, int] = {}  # of files under way
        self._sum = 0
        self._drawn: dict[str, float] = {}
        self._name()

    def report(self, now: Progress) -> None:
        if now.step is Step.DONE:
            self._end(now)
            return
        if now.step is not Step.HASHING:
            self._sum += now.done - self._done.get(now.path, 0)
            self._done[now.path] = now.done
        moment = time.monotonic()
        if moment - self._drawn.get(now.path, 0.0) < SAME_SECONDS:
            return
        self._drawn[now.path] = moment
        task = self._tasks.get(now.path)
        if task is None:
            if len(self._tasks) >= MOST_BARS:
                self.bars.update(self._all, completed=self._sum)
                return
            task = self._tasks[now.path] = self.bars.add_task(_short(now.path), total=now.total)
        word = WORDS.get(now.step)
        name = _short(now.path, f" ({word})" if word else "")
        self.bars.update(task, completed=now.done, total=now.total, description=name)
        self.bars.update(self._all, completed=self._sum)

    def skip(self, files: Iterable[LocalFile]) -> None:
        """These are there already."""
        for file in files:
            self._end(Progress(file.path, Step.DONE, file.size_bytes, file.size_bytes))

    def end(self) -> None:
        """Nothing moves any more."""
        for task in (*self._tasks.values(), self._all):
            self.bars.remove_task(task)

    def _end(self, now: Progress) -> None:
        self._sum += now.total - self._done.pop(now.path, 0)
        self._drawn.pop(now.path, None)
        self._ended += 1
        task = self._tasks.pop(now.path, None)
        if task is not None:
            self.bars.remove_task(task)
        self._name()
        self.bars.update(self._all, completed=self._sum)

    def _name(self) -> None:
        of = "" if self._files is None else f" of {self._files:,}"
        text = f"{self._verb} {self._ended:,}{of}"
        self.bars.update(self._all, description=text)


def _short(path: str, word: str = "") -> str:
    """Its end says more than its beginning."""
    width = NAME_WIDTH - len(word)
    shown = path if len(path) <= width else "…" + path[1 - width :]
    return escape(plainly(shown)) + word


@contextmanager
def shown_bars(*, hidden: bool) -> Iterator[Bars]:
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(table_column=Column(no_wrap=True)),  # so only the bar gets narrower
        TransferSpeedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        disable=hidden or not sys.stderr.isatty(),
    ) as bars:
        yield bars


class RowsBoard:
    """One bar: of the rows that a server writes, then of the bytes that come here."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._rows: TaskID | None = None
        self._bytes: TaskID | None = None
        self.now: Exporting | None = None

    def told(self, now: Exporting) -> None:
        self.now = now
        words = [f"{now.rows:,}{f' of {now.total:,}' if now.total else ''} rows"]
        if now.message:
            words.append(escape(plainly(now.message)))
        if now.rows_per_second:
            words.append(f"{now.rows_per_second:,.0f} rows/s")
        if now.seconds_left is not None:
            words.append(f"{timedelta(seconds=round(now.seconds_left))} left")
        if self._rows is None:
            self._rows = self._bars.add_task("", total=None, told="")
        self._bars.update(
            self._rows,
            description=now.state.capitalize(),
            completed=now.rows,
            total=now.total,
            told=", ".join(words),
        )

    def report(self, now: Progress) -> None:
        self._show(now.done, now.total, f"{decimal(now.done)} of {decimal(now.total)}")

    def received(self, size: int) -> None:
        self._show(size, None, decimal(size))

    def _show(self, size: int, total: int | None, words: str) -> None:
        if self._bytes is None:
            self._bytes = self._bars.add_task("Received", total=total, told="")
        self._bars.update(self._bytes, completed=size, told=words)


@contextmanager
def shown_rows(*, hidden: bool) -> Iterator[Bars]:
    with Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[told]}", table_column=Column(no_wrap=True)),
        console=Console(stderr=True),
        transient=True,
        disable=hidden or not sys.stderr.isatty(),
    ) as bars:
        yield bars
