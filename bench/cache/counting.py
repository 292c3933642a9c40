"""What our own server says of its caches."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import httpx

from bench.measure import LoadError
from bench.operation import WrongAnswer

STATS: Final = "{ cacheStats { layer hits misses } }"
OF_ANSWERS: Final = ("L1", "L2")


@dataclass(frozen=True, slots=True)
class Counts:
    """Since the server began, by layer."""

    hits: Mapping[str, int]
    misses: Mapping[str, int]

    def since(self, before: "Counts") -> "Counts":
        return Counts(
            {layer: count - before.hits.get(layer, 0) for layer, count in self.hits.items()},
            {layer: count - before.misses.get(layer, 0) for layer, count in self.misses.items()},
        )

    @property
    def answered(self) -> int:
        """Answers that came from a cache of them."""
        return sum(self.hits.get(layer, 0) for layer in OF_ANSWERS)

    def share(self, layer: str) -> float:
        """Of what the layer was asked for, how much it had."""
        asked = self.hits[layer] + self.misses[layer]
        return self.hits[layer] / asked if asked else 0.0


def count(client: httpx.Client, token: str) -> Counts:
    """`token`: an operator's."""
    headers = {"authorization": f"Bearer {token}"}
    answer = client.post("/graphql", json={"query": STATS}, headers=headers).json()
    if answer.get("errors"):
        raise WrongAnswer(f"cacheStats: {answer['errors'][0]['message']}")
    layers = answer["data"]["cacheStats"]
    missing = set(OF_ANSWERS) - {each["layer"] for each in layers}
    if missing:
        raise LoadError(f"cacheStats does not tell of {', '.join(sorted(missing))}")
    return Counts(
        {each["layer"]: int(each["hits"]) for each in layers},
        {each["layer"]: int(each["misses"]) for each in layers},
    )
