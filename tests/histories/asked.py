"""What clients ask for, and what an answer says about the registers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from modelharbor.schema.nodes import global_id

from .checker import Count, Derived, Fact, Members, Register, Value
from .world import ALIASES, ANYBODY, COMING, LIKING, LISTS, Known, Wanted, World, with_word

PAGE: Final = 60
"""More than there are models at a time."""


@dataclass
class Told:
    """What an answer says."""

    seen: dict[Register, Value] = field(default_factory=dict)
    facts: list[Fact] = field(default_factory=list)
    members: list[Members] = field(default_factory=list)
    counts: list[Count] = field(default_factory=list)


@dataclass(frozen=True)
class Question:
    document: str
    variables: Mapping[str, Any]
    understand: Callable[[dict[str, Any], Told], None]
    """Takes `data` of an answer."""
    is_of_person: bool = False
    """It tells who asks: an open socket has a few seconds to hear that they have changed."""

    @property
    def hash(self) -> str:
        return sha256(self.document.encode()).hexdigest()


ONE: Final = """query One($owner: String!, $name: String!) {
  model(owner: $owner, name: $name) {
    id fullName summary tags task visibility state
    stats { likes versions }
  }
}"""
RELATED: Final = f"""query Related($owner: String!, $name: String!) {{
  model(owner: $owner, name: $name) {{
    card {{ markdown }}
    owner {{ login displayName }}
    aliases {{ name version {{ number label }} }}
    latestVersion {{ number label files(first: {PAGE}) {{ nodes {{ path }} }} }}
    versions(first: {PAGE}) {{ totalCount nodes {{ number label }} }}
  }}
}}"""
MINE: Final = """query Mine($id: ID!) {
  model(id: $id) { summary viewerCan viewerHasLiked }
}"""
LIST: Final = f"""query Page {{
  models(first: {PAGE}, orderBy: {{ field: NAME }}) {{
    totalCount
    nodes {{
      name tags summary
      owner {{ login displayName }}
      latestVersion {{ number label files(first: 3) {{ nodes {{ path }} }} }}
      stats {{ likes }}
    }}
  }}
}}"""
FILTERED: Final = f"""query Filtered($filter: ModelFilter!) {{
  models(first: {PAGE}, filter: $filter) {{ totalCount nodes {{ name summary tags task }} }}
}}"""
SEARCHED: Final = f"""query Searched($words: String!) {{
  models(first: {PAGE}, search: $words) {{ totalCount nodes {{ name summary }} }}
}}"""
FOUND: Final = f"""query Found($words: String!) {{
  search(query: $words, types: [MODEL], first: {PAGE}) {{
    totalCount nodes {{ ... on Model {{ name summary }} }}
  }}
}}"""
RESOLVED: Final = "query Resolved($ref: String!) { resolve(ref: $ref) { number label } }"
NODES: Final = """query Nodes($ids: [ID!]!) {
  nodes(ids: $ids) {
    ... on Model { summary tags state }
    ... on ModelVersion { number label }
    ... on User { displayName }
  }
}"""
SUGGESTED: Final = """query Suggested($prefix: String!) { suggest(prefix: $prefix, first: 50) }"""
VIEWER: Final = (
    "query Viewer { viewer { login displayName organizations(first: 5) { nodes { login } } } }"
)


@dataclass(frozen=True)
class Asking:
    """Of one viewer, by login."""

    world: World
    login: str

    def draw(self) -> Question:
        """Something, what is asked for often the most."""
        chance = self.world.chance
        made: list[tuple[Callable[[], Question], float]] = [
            (lambda: self.one(self.world.draw()), 6.0),
            (lambda: self.one(self.world.draw_any()), 0.5),
            (self.page, 3.0),
            (lambda: self.filtered(chance.choice(LISTS)), 3.0),
            (lambda: self.related(self.world.draw()), 2.0),
            (lambda: self.mine(self.world.draw()), 1.0),
            (lambda: self.searched(chance.choice(("alpha", "beta"))), 0.5),
            (lambda: self.found(chance.choice(("alpha", "beta"))), 0.5),
            (lambda: self.resolved(self.world.draw(), chance.choice(ALIASES)), 1.0),
            (self.nodes, 1.0),
            (lambda: self.suggested(chance.choice(("ada", "acme"))), 0.5),
            (self.viewer, 0.5),
        ]
        [chosen] = chance.choices([each for each, _ in made], [weight for _, weight in made])
        return chosen()

    def about(self, register: Register) -> Question:
        """Something in which the register may be."""
        chance, world = self.world.chance, self.world
        of, key, *more = register
        many: list[Callable[[], Question]] = [self.page]
        if of == "member":
            many += [self.viewer, lambda: self.one(world.models["p0"])]
            return chance.choice(many)()
        if of == "display":
            many += [self.nodes, lambda: self.related(world.models["m0"])]
            return chance.choice(many)()
        model = world.models[key]
        many.append(lambda: self.one(model))
        if of in ("summary", "tags", "state", "visibility", "grant", "task"):
            many += [
                lambda: self.filtered(chance.choice(LISTS)),
                lambda: self.searched(chance.choice(("alpha", "beta"))),
                lambda: self.suggested(model.owner),
                lambda: self.mine(model),
                self.nodes,
            ]
        elif of == "alias":
            many = [lambda: self.resolved(model, more[0]), lambda: self.related(model)]
            many.append(lambda: self.filtered(chance.choice(LISTS)))
        elif of == "like":
            many += [lambda: self.mine(model)]
        elif of in ("label", "files", "versions", "card"):
            many = [self.page, self.nodes, lambda: self.related(model)]
        return chance.choice(many)()

    # What is there, and for whom

    def _found(self, told: Told, model: Known, is_there: bool) -> None:
        of = self.world.visible(model, self.login)
        name = f"{self.login} finds {model.key}"
        told.facts.append(Fact(name, of, is_there, right=of))

    def _list(self, told: Told, listed: dict[str, Any], wanted: Wanted | None, name: str) -> None:
        there = frozenset(node["name"] for node in listed["nodes"])
        every, rights = self.world.lists(self.login, wanted)
        told.members.append(Members(f"{name} of {self.login}", every, rights, there))
        if "totalCount" in listed:
            count = Count(f"{name} of {self.login}", tuple(every.values()), listed["totalCount"])
            told.counts.append(count)
        for node in listed["nodes"]:
            self._model(told, self.world.models[node["name"]], node)

    def _model(self, told: Told, model: Known, node: dict[str, Any]) -> None:
        seen = told.seen
        for name in ("summary", "visibility", "state", "task"):
            if name in node:
                seen[model.register(name)] = node[name]
        if "tags" in node:
            seen[model.register("tags")] = frozenset(node["tags"])
        if "owner" in node:
            seen["display", node["owner"]["login"]] = node["owner"]["displayName"]
        if "card" in node:
            seen[model.register("card")] = node["card"] and node["card"]["markdown"]
        stats = node.get("stats") or {}
        if "likes" in stats:
            likes = tuple(
                Derived((model.register("like", login),), lambda liked: liked) for login in LIKING
            )
            told.counts.append(Count(f"likes of {model.key}", likes, stats["likes"]))
        if "versions" in stats:
            of = Derived((model.register("versions"),), len)
            told.facts.append(Fact(f"versions of {model.key}", of, stats["versions"]))
        if "aliases" in node:
            pointing = {each["name"]: each["version"]["number"] for each in node["aliases"]}
            for alias in ALIASES:
                seen[model.register("alias", alias)] = pointing.get(alias)
            for each in node["aliases"]:
                self._version(told, model, each["version"])
        if node.get("latestVersion"):
            self._version(told, model, node["latestVersion"])
        if "versions" in node:
            numbers = frozenset(each["number"] for each in node["versions"]["nodes"])
            of = Derived((model.register("versions"),), len)
            told.facts.append(Fact(f"versions of {model.key}", of, node["versions"]["totalCount"]))
            of = self._versions_for(model)
            told.facts.append(Fact(f"list of versions of {model.key}", of, numbers))
            for each in node["versions"]["nodes"]:
                self._version(told, model, each)

    def _versions_for(self, model: Known) -> Derived:
        return Derived((model.register("versions"),), lambda numbers: numbers)

    def _version(self, told: Told, model: Known, node: dict[str, Any]) -> None:
        number = str(node["number"])
        label = model.register("label", number)
        if "label" in node and label in self.world.initial:
            told.seen[label] = node["label"]
        if "files" in node:
            paths = frozenset(each["path"] for each in node["files"]["nodes"])
            files = model.register("files", number)
            if files in self.world.initial:
                told.seen[files] = paths

    # Questions

    def one(self, model: Known) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            self._found(told, model, data["model"] is not None)
            if data["model"] is not None:
                self._model(told, model, data["model"])

        return Question(ONE, {"owner": model.owner, "name": model.name}, understand)

    def related(self, model: Known) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            self._found(told, model, data["model"] is not None)
            if data["model"] is not None:
                self._model(told, model, data["model"])

        return Question(RELATED, {"owner": model.owner, "name": model.name}, understand)

    def mine(self, model: Known) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            found = data["model"]
            self._found(told, model, found is not None)
            if found is None:
                return
            self._model(told, model, found)
            of = self.world.permissions(model, self.login)
            may = frozenset(found["viewerCan"])
            told.facts.append(Fact(f"{self.login} may with {model.key}", of, may))
            if self.login in LIKING:
                told.seen[model.register("like", self.login)] = found["viewerHasLiked"]
            else:
                never = Derived((), lambda: False)
                name = f"{self.login} likes {model.key}"
                told.facts.append(Fact(name, never, found["viewerHasLiked"], right=never))

        return Question(MINE, {"id": model.global_id}, understand)

    def page(self) -> Question:
        return Question(LIST, {}, lambda data, told: self._list(told, data["models"], None, "page"))

    def filtered(self, wanted: Wanted) -> Question:
        name = f"list {wanted.name}"

        def understand(data: dict[str, Any], told: Told) -> None:
            self._list(told, data["models"], wanted, name)

        return Question(FILTERED, {"filter": wanted.filter}, understand)

    def searched(self, word: str) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            self._list(told, data["models"], with_word(word), f"models with {word}")

        return Question(SEARCHED, {"words": word}, understand)

    def found(self, word: str) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            self._list(told, data["search"], with_word(word), f"search for {word}")

        return Question(FOUND, {"words": word}, understand)

    def resolved(self, model: Known, alias: str) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            found = data["resolve"]
            visible = self.world.visible(model, self.login)

            def follows(number: int | None, *rights: Any) -> int | None:
                return number if visible.follows(*rights) else None

            of = Derived((model.register("alias", alias), *visible.registers), follows)
            number = found and found["number"]
            told.facts.append(Fact(f"{model.key}@{alias} of {self.login}", of, number))
            if found is not None:
                self._version(told, model, found)

        return Question(RESOLVED, {"ref": f"{model.owner}/{model.name}@{alias}"}, understand)

    def nodes(self) -> Question:
        models = [self.world.models[key] for key in ("m0", "m1", "p0", "q0")]
        version, person = models[0], self.world.people["ada"]
        ids = [model.global_id for model in models]
        ids += [version.version_id(1), global_id("User", person.id)]

        def understand(data: dict[str, Any], told: Told) -> None:
            *found, one, ada = data["nodes"]
            for model, node in zip(models, found, strict=True):
                self._found(told, model, node is not None)
                if node is not None:
                    self._model(told, model, node)
            if one is not None:
                self._version(told, version, one)
            told.seen["display", "ada"] = ada["displayName"]

        return Question(NODES, {"ids": ids}, understand)

    def suggested(self, owner: str) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            there = frozenset(text.removeprefix(f"{owner}/") for text in data["suggest"])
            of, rights = self.world.suggestions(self.login, owner)
            told.members.append(Members(f"suggestions of {self.login}", of, rights, there))

        return Question(SUGGESTED, {"prefix": f"{owner}/"}, understand)

    def viewer(self) -> Question:
        def understand(data: dict[str, Any], told: Told) -> None:
            found = data["viewer"]
            mine, login = None if self.login == ANYBODY else self.login, found and found["login"]
            nobodys = Derived((), lambda: False)
            told.facts.append(
                Fact(f"{self.login} is", Derived((), lambda: mine), login, right=nobodys)
            )
            if login is None or login != mine:
                return
            told.seen["display", self.login] = found["displayName"]
            if self.login == COMING:
                of = Derived((("member", COMING),), lambda role: role is not None)
                belongs = bool(found["organizations"]["nodes"])
                told.facts.append(Fact(f"{COMING} belongs", of, belongs))

        return Question(VIEWER, {}, understand, is_of_person=True)
