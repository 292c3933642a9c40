"""What the users ask for: models by the weight of their downloads, and the lists in which these stand."""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any, Final

from bench.operation import Ask, WrongAnswer
from modelharbor.dev.distributions import draw_downloads

OPERATIONS: Final = Path(__file__).parent.parent / "peers" / "operations"
PAGE: Final = 20
FILES: Final = 3
SUMMARY: Final = "Write "
WEIGHTS_SEED: Final = 7
LIST: Final = """
query List($after: Cursor) {
  models(first: 100, after: $after, orderBy: { field: TRENDING }) {
    edges {
      cursor
      node { id name owner { login } task license stats { downloadsAllTime } }
    }
    pageInfo { endCursor hasNextPage }
  }
}
"""
FILTERED: Final = """
query Filtered($first: Int!, $filter: ModelFilter!, $orderBy: ModelOrder!) {
  models(first: $first, filter: $filter, orderBy: $orderBy) {
    totalCount
    nodes { id fullName summary task license updatedAt stats { downloads30d } }
  }
}
"""
UPDATE: Final = """
mutation Update($input: UpdateModelInput!) {
  updateModel(input: $input) {
    model { id summary revision }
    userErrors { code message }
  }
}
"""
LIKE: Final = """
mutation Like($input: LikeModelInput!) {
  likeModel(input: $input) {
    model { id stats { likes } }
    userErrors { code message }
  }
}
"""
UNLIKE: Final = """
mutation Unlike($input: UnlikeModelInput!) {
  unlikeModel(input: $input) {
    model { id stats { likes } }
    userErrors { code message }
  }
}
"""


class Kind(Enum):
    MODEL = "model"
    PAGE = "page"
    FILTERED = "filtered"
    UPDATE = "update"
    LIKE = "like"

    @property
    def is_write(self) -> bool:
        return self in (Kind.UPDATE, Kind.LIKE)


READS: Final = (Kind.MODEL, Kind.PAGE, Kind.FILTERED)
READ_WEIGHTS: Final = (6, 3, 1)
WRITE_SHARE: Final = 0.05
LIKE_SHARE: Final = 0.1  # of the writes


def documents() -> dict[Kind, str]:
    """Of the reads: those that are measured beside other servers, all of them with the summary."""
    read = {kind: (OPERATIONS / f"{kind.value}.graphql").read_text() for kind in READS[:2]}
    return {**read, Kind.FILTERED: FILTERED}


@dataclass(frozen=True, slots=True)
class Listed:
    """A model as everybody sees it."""

    id: str
    owner: str
    name: str
    task: str | None
    license: str | None
    downloads: int


@dataclass(frozen=True, slots=True)
class Catalogue:
    """All models, by trend, and the place before each page of PAGE of them."""

    models: tuple[Listed, ...]
    places: tuple[str | None, ...]


def list_models(ask: Ask) -> Catalogue:
    """As an anonymous client sees them. WrongAnswer."""
    found: list[Listed] = []
    places: list[str | None] = [None]
    after = None
    while True:
        answer = ask({"query": LIST, "variables": {"after": after}})
        if answer.get("errors"):
            raise WrongAnswer(f"models: {answer['errors'][0]['message']}")
        page = answer["data"]["models"]
        for edge in page["edges"]:
            found.append(_listed(edge["node"]))
            if len(found) % PAGE == 0:
                places.append(edge["cursor"])
        if not page["pageInfo"]["hasNextPage"]:
            return Catalogue(tuple(found), tuple(places))
        after = page["pageInfo"]["endCursor"]


def _listed(node: dict[str, Any]) -> Listed:
    return Listed(
        node["id"],
        node["owner"]["login"],
        node["name"],
        node["task"],
        node["license"],
        int(node["stats"]["downloadsAllTime"]),
    )


def weights(models: Sequence[Listed]) -> list[int]:
    """How often each is downloaded: figures of the distribution, given to the models by the order of
    their own downloads. Those of the demo are one draw of the same in which, as it happens, a single
    model has six of seven downloads; in the middle one of 39 draws the first has a third."""
    random = Random(WEIGHTS_SEED)
    drawn = sorted((draw_downloads(random) for _ in models), reverse=True)
    order = sorted(range(len(models)), key=lambda place: -models[place].downloads)
    found = [0] * len(models)
    for place, weight in zip(order, drawn, strict=True):
        found[place] = weight
    return found


class Drawing:
    """Draws the next thing that a user does; the same ones in the same order for one seed."""

    def __init__(self, catalogue: Catalogue, seed: int, write_share: float = WRITE_SHARE) -> None:
        self.catalogue = catalogue
        self.random = Random(seed)
        self.write_share = write_share
        self.sums = list(accumulate(weights(catalogue.models)))
        self.documents = documents()

    def model(self) -> int:
        """Its place in the catalogue."""
        return bisect(self.sums, self.random.random() * self.sums[-1])

    def kind(self) -> Kind:
        if self.random.random() < self.write_share:
            return Kind.LIKE if self.random.random() < LIKE_SHARE else Kind.UPDATE
        return self.random.choices(READS, READ_WEIGHTS)[0]

    def read(self, kind: Kind, place: int) -> dict[str, Any]:
        """The body of a request: the model itself, the page of the list by trend in which it stands,
        or the models of its task and licence."""
        model = self.catalogue.models[place]
        variables: dict[str, Any]
        if kind is Kind.MODEL:
            variables = {"owner": model.owner, "name": model.name}
        elif kind is Kind.PAGE:
            after = self.catalogue.places[place // PAGE]
            variables = {"first": PAGE, "after": after, "files": FILES}
        else:
            has: dict[str, Any] = {}
            if model.task is not None:
                has["task"] = {"eq": model.task}
            if model.license is not None:
                has["license"] = {"in": [model.license]}
            order = {"field": "DOWNLOADS_30D", "direction": "DESC"}
            variables = {"first": PAGE, "filter": has, "orderBy": order}
        return {
            "query": self.documents[kind],
            "operationName": kind.value.capitalize(),
            "variables": variables,
        }

    def read_key(self, kind: Kind, place: int) -> Any:
        """Equal for reads that ask for the same."""
        if kind is Kind.MODEL:
            return kind, place
        if kind is Kind.PAGE:
            return kind, place // PAGE
        model = self.catalogue.models[place]
        return kind, model.task, model.license


def update_body(model: Listed, number: int) -> dict[str, Any]:
    """A write that can be seen: its number is in the summary; a tag comes and goes with it."""
    tags = "addTags" if number % 2 else "removeTags"
    given = {"id": model.id, "summary": f"{SUMMARY}{number}", tags: ["bench"]}
    return {"query": UPDATE, "operationName": "Update", "variables": {"input": given}}


def like_body(model: Listed, *, likes: bool) -> dict[str, Any]:
    """`likes`: from then on."""
    document, name = (LIKE, "Like") if likes else (UNLIKE, "Unlike")
    return {"query": document, "operationName": name, "variables": {"input": {"id": model.id}}}
