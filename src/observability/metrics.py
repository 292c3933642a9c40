"""Counters of one process, for Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/"""

import collections
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

MEDIA: Final = "text/plain; version=0.0.4; charset=utf-8"
PLAN: Final = "plan"
INTERPRETER: Final = "graphql-core"


@dataclass(slots=True)
class CacheCount:
    """What one layer of the caches did. Plain numbers: a hit takes less time than Prometheus' counters do."""

    layer: str
    hits: int = 0
    misses: int = 0
    invalidations: int = 0
    """What was there and is old: something in it has changed since."""
    poisoned: int = 0
    """What lay in Redis and was not what this server wrote there."""
    joined: int = 0
    """Requests that waited for an answer that another one was making already."""
    stale: int = 0
    """Answers that were served beyond their age, where their fields allow it."""
    refreshed: int = 0
    """Answers that were made anew before they were too old."""
    sizes: Callable[[], tuple[int, int]] = lambda: (0, 0)
    """Entries and bytes now."""

    @property
    def hit_ratio(self) -> float:
        asked = self.hits + self.misses
        return self.hits / asked if asked else 0.0


CACHE_EVENTS: Final = {
    "hits": "Look-ups that found what is current.",
    "misses": "Look-ups that did not.",
    "invalidations": "Entries that were found to be old, for something in them has changed.",
    "poisoned": "Values in Redis that this server did not write as they are: dropped.",
    "joined": "Requests that waited for an answer that another one was making.",
    "stale": "Answers that were served beyond their age.",
    "refreshed": "Answers that were made anew before they were too old.",
}


class _Caches(Collector):
    """The layers of the caches, read when they are asked for."""

    def __init__(self, layers: list[CacheCount]) -> None:
        self.layers = layers

    def collect(self) -> Iterator[Metric]:
        for event, documentation in CACHE_EVENTS.items():
            counter = CounterMetricFamily(
                f"modelharbor_cache_{event}", documentation, labels=["layer"]
            )
            for count in self.layers:
                counter.add_metric([count.layer], getattr(count, event))
            yield counter
        entries = GaugeMetricFamily(
            "modelharbor_cache_entries",
            "Entries kept; of the layer in Redis, those that this process wrote and that have not expired.",
            labels=["layer"],
        )
        size = GaugeMetricFamily(
            "modelharbor_cache_bytes", "What they come to, counted alike.", labels=["layer"]
        )
        for count in self.layers:
            number, held = count.sizes()
            entries.add_metric([count.layer], number)
            size.add_metric([count.layer], held)
        yield entries
        yield size


NAMES: Final = {
    "text": "ran by their text",
    "hash": "ran by hash",
    "id": "ran by the id of a published one",
    "missed": "were named and not found",
    "required": "are none of the published ones, and were refused",
    "poisoned": "lay in Redis under a name that is not theirs, and were dropped",
}
"""How a document was named, or what was wrong with that."""


class _Documents(Collector):
    """How documents were named, read when it is asked for."""

    def __init__(self, counts: "collections.Counter[str]") -> None:
        self.counts = counts

    def collect(self) -> Iterator[Metric]:
        told = ", ".join(f"{name}: {what}" for name, what in NAMES.items())
        made = CounterMetricFamily(
            "modelharbor_documents", f"Documents of operations. {told}.", labels=["by"]
        )
        for name in NAMES:
            made.add_metric([name], self.counts[name])
        yield made


OUTCOMES: Final = {
    "recorded": "they are in the database",
    "left_out": "more waited than the buffer holds",
    "too_old": "they waited for longer than events are kept",
    "lost": "the process ended without a database",
}
"""What became of usage events."""


@dataclass(slots=True)
class UsageCount:
    """What the recording of usage did. Several views, or calls of one operation, may be one event; here
    each is counted."""

    outcomes: "collections.Counter[tuple[str, str]]" = field(default_factory=collections.Counter)
    """By kind and outcome."""
    waiting: Callable[[], int] = lambda: 0
    """Events in the buffer now."""


class _Usage(Collector):
    """The recording of usage, read when it is asked for."""

    def __init__(self, count: UsageCount) -> None:
        self.count = count

    def collect(self) -> Iterator[Metric]:
        told = ", ".join(f"{name}: {what}" for name, what in OUTCOMES.items())
        events = CounterMetricFamily(
            "modelharbor_usage_events",
            f"Downloads, views and calls of operations that were to be recorded. {told}.",
            labels=["kind", "outcome"],
        )
        for kind, outcome in sorted(self.count.outcomes):
            events.add_metric([kind, outcome], self.count.outcomes[kind, outcome])
        yield events
        yield GaugeMetricFamily(
            "modelharbor_usage_waiting",
            "Usage events of this process that are not in the database yet.",
            value=self.count.waiting(),
        )


class Metrics:
    """What `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._operations = Counter(
            "modelharbor_operations",
            "GraphQL operations that ran, by what made the answer, and why it was not a plan.",
            ["engine", "reason"],
            registry=self.registry,
        )
        self._planned = self._operations.labels(PLAN, "")
        self.merged_reads = Counter(
            "modelharbor_merged_reads",
            "Reads that went to the database together with another operation's.",
            registry=self.registry,
        )
        self.subscriptions = Gauge(
            "modelharbor_subscriptions",
            "Subscriptions that clients of this process follow.",
            registry=self.registry,
        )
        self.deliveries = Counter(
            "modelharbor_deliveries",
            "Events of subscriptions that were handed to clients.",
            registry=self.registry,
        )
        self.encodings = Counter(
            "modelharbor_encodings",
            "Answers that were made for them: one for all who want the same.",
            registry=self.registry,
        )
        self.answers = CacheCount("l1")
        self.shared_answers = CacheCount("l2")
        self.sessions = CacheCount("sessions")
        self.registry.register(_Caches(self.caches))
        self.documents: collections.Counter[str] = collections.Counter()
        self.registry.register(_Documents(self.documents))
        self.usage = UsageCount()
        self.registry.register(_Usage(self.usage))

    @property
    def caches(self) -> list[CacheCount]:
        """The layers of the caches."""
        return [self.answers, self.shared_answers, self.sessions]

    def count_operation(self, fallback: str | None) -> None:
        """`fallback`: why graphql-core made the answer; None where a plan did."""
        if fallback is None:
            self._planned.inc()
        else:
            self._operations.labels(INTERPRETER, fallback).inc()

    def shown(self) -> bytes:
        return generate_latest(self.registry)
