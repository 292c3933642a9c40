"""Counters of one process, for Prometheus: https://prometheus.io/docs/instrumenting/exposition_formats/"""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

MEDIA: Final = "text/plain; version=0.0.4; charset=utf-8"
PLAN: Final = "plan"
INTERPRETER: Final = "graphql-core"


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

    def count_operation(self, fallback: str | None) -> None:
        """`fallback`: why graphql-core made the answer; None where a plan did."""
        if fallback is None:
            self._planned.inc()
        else:
            self._operations.labels(INTERPRETER, fallback).inc()

    def shown(self) -> bytes:
        return generate_latest(self.registry)
