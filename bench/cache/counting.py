"""What our own server says of its caches."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import httpx

from bench.measure import LoadError

LINE: Final = re.compile(r'^modelharbor_cache_(\w+)_total\{layer="(\w+)"\} (\d+)', re.MULTILINE)
L1: Final = "l1"
L2: Final = "l2"


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the server began, by event and layer."""

    events: Mapping[tuple[str, str], int]

    def since(self, before: "Counts") -> "Counts":
        return Counts({key: count - before.of(*key) for key, count in self.events.items()})

    def of(self, event: str, layer: str) -> int:
        return self.events.get((event, layer), 0)

    @property
    def hits(self) -> int:
        """Answers that had been kept."""
        return self.of("hits", L1) + self.of("hits", L2)

    @property
    def joined(self) -> int:
        """Requests that waited for an answer that another one was making."""
        return self.of("joined", L1)

    def share(self, layer: str) -> float:
        """Of what the layer was asked for, how much it had."""
        hits = self.of("hits", layer)
        asked = hits + self.of("misses", layer)
        return hits / asked if asked else 0.0


def count(client: httpx.Client) -> Counts:
    """LoadError where it does not tell."""
    found = read_counts(client.get("/metrics").text)
    for layer in (L1, L2):
        if ("hits", layer) not in found.events:
            raise LoadError(f"/metrics does not tell what the layer {layer} had")
    return found


def read_counts(text: str) -> Counts:
    return Counts({(event, layer): int(value) for event, layer, value in LINE.findall(text)})
