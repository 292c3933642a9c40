"""The operations that are measured: a document, its variables, and what must be in an answer."""

import json
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final, TypeAlias

import httpx

FOLDER: Final = Path(__file__).parent / "operations"
NAMES: Final = ("model", "page", "filtered", "facets", "search")
DRAWN: Final = 1_000  # models whose names and places are asked for
PAGE: Final = 20  # of the operation with the drawn places
DRAW: Final = """
query Draw($after: Cursor) {
  models(first: 100, after: $after, orderBy: { field: TRENDING }) {
    edges { cursor node { name owner { login } } }
    pageInfo { endCursor hasNextPage }
  }
}
"""
COST: Final = {"x-modelharbor-cost": "1"}

Body: TypeAlias = dict[str, Any]
Ask: TypeAlias = Callable[[Body], dict[str, Any]]


class WrongAnswer(Exception):
    """An answer is not what is to be measured."""


@dataclass(frozen=True, slots=True)
class Operation:
    name: str
    title: str
    document: str
    variables: tuple[dict[str, Any], ...]
    full: tuple[str, ...]
    """Path in the data where something must be."""

    @property
    def operation_name(self) -> str:
        """As the document says it."""
        found = re.search(r"^query (\w+)", self.document, re.MULTILINE)
        if found is None:
            raise ValueError(f"{self.name}: the operation has no name")
        return found[1]

    def bodies(self) -> list[Body]:
        return [
            {"query": self.document, "variables": found, "operationName": self.operation_name}
            for found in self.variables
        ]

    def check(self, answer: dict[str, Any]) -> None:
        """Raise WrongAnswer unless the answer has no errors and holds what it should."""
        if answer.get("errors"):
            raise WrongAnswer(f"{self.name}: {answer['errors'][0]['message']}")
        found = answer["data"]
        for part in self.full:
            found = found[part]
        if not found:
            raise WrongAnswer(f"{self.name}: nothing at {'.'.join(self.full)}")


@dataclass(frozen=True, slots=True)
class Checked:
    """What asking for each of the variables once, and once more, has told."""

    commands: int
    """Most database commands of an answer."""
    commands_again: int
    """Of most answers to the same, asked for again at once."""
    first_milliseconds: float
    """Median of the first answers."""


def load_operations(
    drawn: list[dict[str, Any]], folder: Path = FOLDER, names: tuple[str, ...] = NAMES
) -> list[Operation]:
    """All operations of a folder; variables that depend on the data are taken from `drawn`."""
    return [_load(folder, name, drawn) for name in names]


def _load(folder: Path, name: str, drawn: list[dict[str, Any]]) -> Operation:
    told = json.loads((folder / f"{name}.json").read_text())
    variables = told.get("variables") or [
        {**told.get("with", {}), **{key: _at(edge, path) for key, path in told["drawn"].items()}}
        for edge in drawn
    ]
    return Operation(
        name,
        told["title"],
        (folder / f"{name}.graphql").read_text(),
        tuple(variables),
        tuple(told["full"]),
    )


def _at(value: Any, path: list[str]) -> Any:
    for part in path:
        value = value[part]
    return value


def asking(client: httpx.Client) -> Ask:
    """Posts a body; the answer tells in its extensions what it cost."""

    def ask(body: Body) -> dict[str, Any]:
        response = client.post("/graphql", json=body, headers=COST)
        found: dict[str, Any] = response.json()
        return found

    return ask


def draw(ask: Ask) -> list[dict[str, Any]]:
    """The first models, by trend, with their places. A page after the last ones would not be full."""
    found: list[dict[str, Any]] = []
    for page in _pages(ask):
        found += page
        if len(found) >= DRAWN + PAGE:
            break
    return found[: min(DRAWN, len(found) - PAGE)]


def _pages(ask: Ask) -> Iterator[list[dict[str, Any]]]:
    after = None
    while True:
        answer = ask({"query": DRAW, "variables": {"after": after}})
        if answer.get("errors"):
            raise WrongAnswer(f"models: {answer['errors'][0]['message']}")
        models = answer["data"]["models"]
        yield models["edges"]
        if not models["pageInfo"]["hasNextPage"]:
            return
        after = models["pageInfo"]["endCursor"]


def check(ask: Ask, operation: Operation) -> Checked:
    """Ask twice with each of the variables, 25 of them at most. WrongAnswer."""
    first, again, seconds = [], [], []
    for body in operation.bodies()[:25]:
        start = perf_counter()
        answer = ask(body)
        seconds.append(perf_counter() - start)
        operation.check(answer)
        first.append(answer["extensions"]["cost"]["dbCommands"])
        repeated = ask(body)
        operation.check(repeated)
        again.append(repeated["extensions"]["cost"]["dbCommands"])
    return Checked(max(first), statistics.mode(again), statistics.median(seconds) * 1000)
