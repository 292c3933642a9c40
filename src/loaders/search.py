"""Search by words over models and those who own them, and completion of names."""

import asyncio
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from modelharbor.cache.tags import Tag, entity
from modelharbor.db.actors import ActorKind
from modelharbor.db.base import Row
from modelharbor.db.conditions import all_of
from modelharbor.db.keyset import Filter, Order, Sorted, Window
from modelharbor.db.models import ModelState
from modelharbor.errors import BadUserInput

from .base import Loader, Sharing, projection
from .pages import Total
from .told import of_list

RELEVANCE: Final = Order("score", Sorted.SCORE)
MAX_WORDS: Final = 10
MAX_SEARCH: Final = 256  # characters
_WORD: Final = re.compile(r"\w+", re.UNICODE)


def words_of(search: str) -> list[str]:
    """The words to look for. BadUserInput when there is none, or too many."""
    if len(search) > MAX_SEARCH:
        raise BadUserInput(f"A search has {len(search)} characters; {MAX_SEARCH} at most.")
    words = _WORD.findall(search)
    if not words:
        raise BadUserInput("A search needs a word: letters or digits.")
    if len(words) > MAX_WORDS:
        raise BadUserInput(f"A search has {len(words)} words; {MAX_WORDS} at most.")
    return words


def text_search(search: str) -> str:
    """For `$text`: all words must occur. Quoted, so that none is read as an operator."""
    return " ".join(f'"{word}"' for word in words_of(search))


@dataclass(frozen=True, slots=True)
class SearchWanted:
    window: Window
    types: frozenset[str]  # Model, User, Organization


class SearchLoader(Loader[str, Row, SearchWanted]):
    """A page over several collections, best first: each gives its own page, merged by score."""

    sharing = Sharing.EQUAL_RIGHTS

    async def batch_load(self, keys: list[str]) -> list[Row]:
        window = self.arguments.window
        sources = self.sources()
        found = await asyncio.gather(*[self.one(name, query) for name, query in sources])
        merged = sorted(
            (row for rows in found for row in rows),
            key=lambda row: (row["score"], row["_id"]),
            reverse=window.direction < 0,
        )
        more = len(merged) > window.limit
        nodes = merged[: window.limit]
        if window.backward:
            nodes.reverse()
        total: Total | None = None
        for name, query in sources:
            total = Total(name, query=Filter(query), also=total)
        page = {
            "nodes": nodes,
            "window": window,
            "has_next": window.before is not None if window.backward else more,
            "has_previous": more if window.backward else window.after is not None,
            "total": total or Total("models", known=0),
        }
        return [page for _ in keys]

    def tags(self, keys: Sequence[str], found: Mapping[str, Any]) -> list[Tag] | None:
        told: list[Tag] = []
        for name, query in self.sources():
            tags = of_list(name, query)
            if tags is None:
                return None
            told += tags
        for row in found[keys[0]]["nodes"]:
            collection = "models" if row["__typename"] == "Model" else "actors"
            told.append(entity(collection, row["_id"]))
        return told

    def sources(self) -> list[tuple[str, Row]]:
        words = {"$text": {"$search": text_search(self.arguments.window.search or "")}}
        found: list[tuple[str, Row]] = []
        if "Model" in self.arguments.types:
            active = {"state": ModelState.ACTIVE.value}
            found.append(("models", all_of([words, active, self.reads.viewer.visible])))
        kinds = [kind.value for kind in ActorKind if kind.value in self.arguments.types]
        if kinds:
            found.append(("actors", all_of([words, {"kind": {"$in": kinds}}])))
        return found

    async def one(self, collection: str, query: Row) -> list[Row]:
        window = self.arguments.window
        typename = {"$literal": "Model"} if collection == "models" else "$kind"
        pipeline: list[Row] = [
            {"$match": query},
            {"$set": {"score": {"$meta": "textScore"}, "__typename": typename}},
            {"$match": window.between({})},
            {"$sort": window.sort},
            {"$limit": window.limit + 1},
        ]
        if names := self.names("_id", "score", "__typename"):
            pipeline.append({"$project": projection(names)})
        return await self.reads.database.aggregate(collection, pipeline)


HIGHLIGHTED: Final = ("name", "login", "display_name", "summary", "tags")
_AROUND: Final = 60  # characters kept on each side of the first hit


def highlights(node: Row, search: str | None) -> list[Row]:
    """Where the words of a search stand: HTML text with the words in `<em>`."""
    if not search:
        return []
    pattern = re.compile("|".join(re.escape(word) for word in words_of(search)), re.IGNORECASE)
    found = []
    for field in HIGHLIGHTED:
        value = node.get(field)
        for text in value if isinstance(value, list) else [value] if value else []:
            hit = pattern.search(text)
            if hit:
                name = {"display_name": "displayName"}.get(field, field)
                found.append({"field": name, "fragment": _marked(text, hit.start(), pattern)})
    return found


def _marked(text: str, hit: int, pattern: re.Pattern[str]) -> str:
    start, end = max(0, hit - _AROUND), hit + _AROUND
    shown, out, at = text[start:end], [], 0
    for match in pattern.finditer(shown):
        out += [html.escape(shown[at : match.start()]), "<em>", html.escape(match[0]), "</em>"]
        at = match.end()
    out.append(html.escape(shown[at:]))
    return ("…" if start else "") + "".join(out) + ("…" if end < len(text) else "")


@dataclass(frozen=True, slots=True)
class Prefix:
    text: str
    limit: int


class SuggestLoader(Loader[str, list[str], Prefix]):
    """References and logins that begin with a text, in any case."""

    sharing = Sharing.EQUAL_RIGHTS

    async def batch_load(self, keys: list[str]) -> list[list[str]]:
        owner, slash, name = self.arguments.text.lower().rpartition("/")
        models: Row = {
            "state": ModelState.ACTIVE.value,
            **self.reads.viewer.visible,
            "name_lower": {"$regex": "^" + re.escape(name)},
        }
        if slash:
            found = await self.first("models", {**models, "owner_login_lower": owner}, "name_lower")
            return [[f"{row['owner_login']}/{row['name']}" for row in found] for _ in keys]
        logins = {"login_lower": {"$regex": "^" + re.escape(name)}}
        actors, named = await asyncio.gather(
            self.first("actors", logins, "login_lower"), self.first("models", models, "name_lower")
        )
        texts = [
            *(row["login"] for row in actors[: max(1, self.arguments.limit // 4)]),
            *(f"{row['owner_login']}/{row['name']}" for row in named),
        ]
        return [texts[: self.arguments.limit] for _ in keys]

    async def first(self, collection: str, query: Row, order: str) -> list[Row]:
        return await self.reads.database.find(
            collection,
            query,
            projection={"login": 1, "owner_login": 1, "name": 1},
            sort={order: 1},
            limit=self.arguments.limit,
        )
