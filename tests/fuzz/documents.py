"""Random valid operations over the schema, from a seed.

Two rules keep selections that meet under one response name equal: an alias stands for one field with
one text of arguments in the whole document, and so does a field's own name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from graphql import (
    GraphQLArgument,
    GraphQLBoolean,
    GraphQLField,
    GraphQLInputField,
    GraphQLInputObjectType,
    GraphQLInterfaceType,
    GraphQLList,
    GraphQLNonNull,
    GraphQLObjectType,
    GraphQLSchema,
    GraphQLUnionType,
    Undefined,
    get_named_type,
    is_composite_type,
)

from .values import HINTS, Values, hint_of, literal, order_tag, plain, weighted

ROOTS: Final = (
    ("models", 4.0), ("model", 3.5), ("node", 3.0), ("nodes", 2.5), ("search", 2.0), ("viewer", 2.0), ("resolve", 2.0), ("compareVersions", 1.3), ("trending", 0.5), ("analytics", 0.4),
    ("jobs", 2.3), ("job", 1.8), ("uploads", 1.0), ("upload", 0.6), ("storage", 0.3), ("blob", 1.5), ("suggest", 0.8), ("__typename", 0.3), ("health", 0.05), ("__type", 0.03),
)  # fmt: skip
PAGES: Final = {  # what a list is made of, for its cursors; the order where no argument gives it
    ("Query", "models"): ("models", "ModelOrder"),
    ("Query", "search"): ("models", "-score"),
    ("Query", "blob"): ("files", "+_id"),
    ("Model", "versions"): ("versions", "ModelVersionOrder"),
    ("ModelVersion", "files"): ("files", "+path"),
    ("VersionComparison", "files"): ("files", "+path"),
    ("User", "organizations"): ("actors", "+_id"),
    ("User", "tokens"): ("tokens", "+_id"),
    ("Organization", "members"): ("memberships", "+_id"),
    ("Query", "jobs"): ("jobs", "-_id"),
    ("Query", "uploads"): ("uploads", "-_id"),
    ("ModelVersion", "uploads"): ("uploads", "+_id"),
    ("ModelVersion", "jobs"): ("jobs", "-_id"),
    ("Job", "children"): ("jobs", "+_id"),
    ("Job", "logs"): ("job_logs", "+_id"),
}
WEIGHTS: Final = {"nodes": 4.0, "edges": 2.0, "node": 4.0, "pageInfo": 1.0, "totalCount": 1.5, "facets": 0.7, "owner": 2.0, "versions": 2.0, "files": 2.0, "logs": 3.0}  # fmt: skip
HEALTHY_NAMES: Final = ("status", "version", "dependencies", "name")  # the rest of `health` is time


@dataclass(slots=True)
class Variable:
    name: str
    type: Any
    hint: str
    default: str | None

    @property
    def definition(self) -> str:
        return f"${self.name}: {self.type}" + (f" = {self.default}" if self.default else "")


@dataclass(slots=True)
class Fragment:
    name: str
    condition: Any
    height: int
    text: str
    variables: set[str]


@dataclass(slots=True)
class Operation:
    name: str | None
    variables: list[Variable]
    shapes: set[str]
    fields: set[str]


@dataclass(slots=True)
class Written:
    """A document, and what is needed to draw variables for it again and again."""

    text: str
    operations: list[Operation]
    is_mutation: bool


@dataclass(slots=True)
class Part:
    """What is being written: the variables and shapes that it uses."""

    budget: int
    variables: set[str] = field(default_factory=set)
    shapes: set[str] = field(default_factory=set)
    fields: set[str] = field(default_factory=set)


class Writer:
    """Writes one document."""

    def __init__(self, schema: GraphQLSchema, values: Values, random: Random, viewer: str) -> None:
        self.schema, self.values, self.random, self.viewer = schema, values, random, viewer
        self.variables: dict[str, Variable] = {}
        self.fragments: list[Fragment] = []
        self.fragment_parts: dict[str, Part] = {}
        self.aliases: dict[str, dict[str, tuple[str, str, str]]] = {}
        """By alias and type: the field, its type and its arguments."""
        self.plain: dict[tuple[str, str], tuple[str, set[str]]] = {}
        self.part = Part(0)
        self.share_of_variables = random.choice((0.0, 0.2, 0.4, 0.7))
        self.share_of_directives = random.choice((0.0, 0.03, 0.1))
        self.share_of_fragments = random.choice((0.0, 0.1, 0.25))

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def write(self) -> Written:
        is_mutation = self.chance(0.03)
        several = self.chance(0.08)
        texts, operations = [], []
        names = (
            ("First", "Second", "Third")[: self.random.choice((2, 2, 3))] if several else ("Only",)
        )
        for name in names:
            named = name if several or self.chance(0.3) else None
            size = weighted(self.random, ((4, 3), (8, 4), (15, 3), (30, 1), (70, 0.3)))
            self.part = Part(size)
            if several:
                self.part.shapes.add("several operations")
            body = self.mutation() if is_mutation else self.query(size)
            used = [self.variables[each] for each in sorted(self.part.variables)]
            head = "mutation" if is_mutation else "query"
            if used or named or is_mutation or several or self.chance(0.2):
                head += f" {named}" if named else ""
                head += f"({', '.join(each.definition for each in used)})" if used else ""
            else:
                head = ""
            texts.append(f"{head} {body}".strip())
            operations.append(Operation(named, used, self.part.shapes, self.part.fields))
        reached = {name for text in texts for name in self.spread_in(text)}
        texts += [
            f"fragment {each.name} on {each.condition} {each.text}"
            for each in self.fragments
            if each.name in reached
        ]
        if self.chance(0.2):
            self.random.shuffle(texts)
        return Written("\n".join(texts), operations, is_mutation)

    def spread_in(self, text: str) -> Iterator[str]:
        for each in self.fragments:
            if f"...{each.name} " in text:
                yield each.name
                yield from self.spread_in(each.text)

    def query(self, size: int) -> str:
        query = self.schema.query_type
        assert query is not None
        depth = weighted(self.random, ((2, 1), (3, 3), (4, 3), (6, 2), (8, 0.5)))
        wanted = self.random.choice((1, 1, 1, 2, 2, 3, 4)) if size > 4 else 1
        made = [self.selected(query, weighted(self.random, ROOTS), depth) for _ in range(wanted)]
        if self.chance(self.share_of_fragments):
            made.append(self.spread(query, depth))
        return "{ " + " ".join(made) + " }"

    def mutation(self) -> str:
        """What changes nothing: likes that are there, things that are not, changes that are refused."""
        self.part.shapes.add("mutation")
        made = []
        for number in range(self.random.choice((1, 1, 2))):
            name, given = self.random.choice(list(self.harmless()))
            kind = self.schema.mutation_type
            assert kind is not None
            payload = get_named_type(kind.fields[name].type)
            text = self.selection_set(payload, 4)
            made.append(f"m{number}: {name}(input: {literal(given)}) {text}")
        return "{ " + " ".join(made) + " }"

    def harmless(self) -> Iterator[tuple[str, dict[str, Any]]]:
        random, values = self.random, self.values
        liked = values.liked(random, self.viewer, True)
        yield "likeModel", {"id": liked}
        yield "likeModel", {"id": liked}
        yield "unlikeModel", {"id": values.liked(random, self.viewer, False)}
        yield "likeModel", {"id": random.choice(("garbage", values.ids["User"][0]))}
        yield (
            "updateModel",
            {"id": values.id(random, "Model"), "expectedRevision": 999, "summary": "x"},
        )
        yield "deleteModelVersion", {"id": random.choice(("garbage", values.ids["Model"][0]))}
        yield "createModel", {"owner": "nobody-at-all", "name": "x"}
        yield "setModelAlias", {"modelId": "garbage", "versionId": "garbage", "name": "x"}
        yield "releaseModelVersion", {"id": "garbage", "reason": "read it"}
        yield "revokeApiToken", {"id": values.ids["Model"][0]}
        yield "cancelJob", {"id": random.choice(("garbage", values.ids["Model"][0]))}
        yield "abortUpload", {"id": random.choice(("garbage", values.ids["Model"][0]))}
        yield (
            "createUploads",
            {"versionId": "garbage", "files": [{"path": "a", "sizeBytes": 1}]},
        )
        yield "setQuota", {"ownerId": "garbage", "bytes": "1"}
        yield "grantRole", {"subjectId": "garbage", "actorId": "garbage", "role": None}

    # Selections

    def selection_set(self, parent: Any, depth: int, preferred: tuple[str, ...] = ()) -> str:
        count = weighted(self.random, ((1, 2), (2, 4), (3, 3), (4, 2), (6, 1)))
        made: list[str] = []
        is_abstract = isinstance(parent, GraphQLInterfaceType | GraphQLUnionType)
        if is_abstract:
            self.part.shapes.add("union" if isinstance(parent, GraphQLUnionType) else "interface")
            narrowed = self.narrowed(parent, preferred)
            made += [self.inline(kind, parent, depth) for kind in narrowed]
            count = self.random.choice((0, 1, 1)) if made else 1
        for _ in range(count):
            if self.part.budget <= 0 and made:
                break
            if self.chance(self.share_of_fragments):
                made.append(
                    self.spread(parent, depth)
                    if self.chance(0.6)
                    else self.inline(self.overlapping(parent), parent, depth)
                )
            else:
                made.append(self.selected(parent, self.chosen(parent, depth), depth))
        if len(made) > 1 and self.chance(0.15):
            self.random.shuffle(made)
        return "{ " + " ".join(made) + " }"

    def narrowed(self, parent: Any, preferred: tuple[str, ...]) -> list[Any]:
        possible = list(self.schema.get_possible_types(parent))
        kinds = [kind for kind in possible if kind.name in preferred]
        if not kinds or self.chance(0.2):
            kinds.append(self.random.choice(possible))
        if self.chance(0.3):
            kinds.append(self.overlapping(parent))
        return kinds[: self.random.choice((1, 1, 2, 2, 3))]

    def overlapping(self, parent: Any) -> Any:
        """A type, or None for no condition, that objects of `parent` can have."""
        if self.chance(0.15):
            return None
        own = (
            set(self.schema.get_possible_types(parent))
            if isinstance(parent, GraphQLInterfaceType | GraphQLUnionType)
            else {parent}
        )
        abstract = [self.schema.type_map[name] for name in ("Node", "Actor", "SearchResult")]
        found = [
            kind
            for kind in abstract
            if own & set(self.schema.get_possible_types(kind))  # type: ignore[arg-type]  # they are abstract
        ]
        return self.random.choice([*sorted(own, key=lambda kind: kind.name), *found, parent])

    def inline(self, condition: Any, parent: Any, depth: int) -> str:
        inner = condition or parent
        self.note_condition(condition)
        body = self.selection_set(inner, depth)
        on = f" on {condition}" if condition else ""
        return f"...{on}{self.directives('inline')} {body}"

    def note_condition(self, condition: Any) -> None:
        shapes = self.part.shapes
        if condition is None:
            shapes.add("inline fragment without a type")
        elif isinstance(condition, GraphQLInterfaceType):
            shapes.add("fragment on an interface")
        elif isinstance(condition, GraphQLUnionType):
            shapes.add("fragment on a union")
        else:
            shapes.add("fragment on an object type")

    def spread(self, parent: Any, depth: int) -> str:
        fitting = [
            each
            for each in self.fragments
            if each.height <= depth and self.overlap(parent, each.condition)
        ]
        if fitting and self.chance(0.5):
            found = self.random.choice(fitting)
            self.part.shapes.add("fragment spread again")
        else:
            found = self.fragment(self.overlapping(parent) or parent, depth)
        self.part.variables |= found.variables
        self.part.shapes |= {"named fragment", *self.fragment_parts[found.name].shapes}
        self.part.fields |= self.fragment_parts[found.name].fields
        self.note_condition(found.condition)
        return f"...{found.name} {self.directives('spread')}"

    def overlap(self, one: Any, other: Any) -> bool:
        def possible(kind: Any) -> set[Any]:
            if isinstance(kind, GraphQLObjectType):
                return {kind}
            return set(self.schema.get_possible_types(kind))

        return bool(possible(one) & possible(other))

    def fragment(self, condition: Any, depth: int) -> Fragment:
        outer, before = self.part, len(self.fragments)
        self.part = Part(outer.budget)
        text = self.selection_set(condition, depth)
        inner, self.part = self.part, outer
        outer.budget = inner.budget
        if len(self.fragments) > before:
            inner.shapes.add("nested named fragments")
        made = Fragment(f"F{len(self.fragments)}", condition, depth, text, inner.variables)
        self.fragments.append(made)
        self.fragment_parts[made.name] = inner
        return made

    def chosen(self, parent: Any, depth: int) -> str:
        """A field of `parent`: where there is room, often one with fields of its own."""
        if isinstance(parent, GraphQLUnionType) or self.chance(0.04):
            return "__typename"
        names = [
            (name, WEIGHTS.get(name, 1.0))
            for name, each in parent.fields.items()
            if not is_composite_type(get_named_type(each.type))
        ]
        deeper = [
            (name, WEIGHTS.get(name, 1.0))
            for name, each in parent.fields.items()
            if is_composite_type(get_named_type(each.type))
        ]
        if parent.name in ("SystemHealth", "DependencyHealth"):
            names = [each for each in names if each[0] in HEALTHY_NAMES]
        if deeper and depth > 0 and self.part.budget > 0 and (not names or self.chance(0.5)):
            names = deeper
        return str(weighted(self.random, names)) if names else "__typename"

    def selected(self, parent: Any, name: str, depth: int) -> str:
        """One field, with what is selected below it; sometimes twice, to be merged."""
        self.part.budget -= 1
        if name == "__typename":
            self.part.shapes.add("__typename")
            alias = f"{self.random.choice('tuv')}Name: " if self.chance(0.2) else ""
            return f"{alias}__typename{self.directives('field')}"
        if name == "__type":
            self.part.shapes.add("introspection")
            return '__type(name: "Model") { name fields { name } }'
        self.part.fields.add(f"{parent.name}.{name}")
        what: GraphQLField = parent.fields[name]
        target: Any = get_named_type(what.type)
        preferred: tuple[str, ...] = ()
        if name in ("node", "nodes") and parent.name == "Query":
            preferred = tuple(self.random.sample(self.values.kinds, self.random.choice((1, 2))))
        key, arguments = self.named(parent, name, what, preferred)
        self.note_page(parent, name, arguments, depth)
        text = f"{key}{arguments}{self.directives('field')}"
        if not is_composite_type(target):
            return text
        text += " " + self.selection_set(target, depth - 1, preferred)
        if self.chance(0.08):
            self.part.shapes.add("merged keys")
            again = f"{key}{arguments} " + self.selection_set(target, depth - 1, preferred)
            wrapped = f"... on {parent.name} {{ {again} }}" if self.chance(0.3) else again
            text += f" {wrapped}"
        return text

    def note_page(self, parent: Any, name: str, arguments: str, depth: int) -> None:
        if (parent.name, name) in PAGES and parent.name != "Query":
            self.part.shapes.add("nested connection")
            if arguments:
                self.part.shapes.add("nested connection with arguments")

    def named(
        self, parent: Any, name: str, what: GraphQLField, preferred: tuple[str, ...]
    ) -> tuple[str, str]:
        """The response name (with the field behind it where it is an alias) and the arguments."""
        kind = str(what.type)
        if self.chance(0.3 if what.args else 0.12) or preferred:
            self.part.shapes.add("alias")
            for alias, uses in self.aliases.items():
                known = uses.get(parent.name)
                if known and known[0] == name and not preferred and self.chance(0.3):
                    self.part.variables |= self.used_in(known[2])
                    return f"{alias}: {name}", known[2]
            arguments = self.arguments(parent, name, what, preferred)
            alias = self.new_alias(parent, kind)
            self.aliases.setdefault(alias, {})[parent.name] = (name, kind, arguments)
            return f"{alias}: {name}", arguments
        if (parent.name, name) not in self.plain:
            arguments = self.arguments(parent, name, what, preferred)
            self.plain[parent.name, name] = (arguments, self.used_in(arguments))
        arguments, used = self.plain[parent.name, name]
        self.part.variables |= used
        return name, arguments

    def new_alias(self, parent: Any, kind: str) -> str:
        """One of another object type with the same type of value, or a new one."""
        if isinstance(parent, GraphQLObjectType) and self.chance(0.3):
            for alias, uses in self.aliases.items():
                others = [self.schema.type_map[name] for name in uses]
                if (
                    parent.name not in uses
                    and all(isinstance(each, GraphQLObjectType) for each in others)
                    and all(use[1] == kind for use in uses.values())
                ):
                    self.part.shapes.add("one alias for different fields")
                    return alias
        return f"a{len(self.aliases)}"

    def used_in(self, text: str) -> set[str]:
        return {name for name in self.variables if f"${name}" in text}

    # Arguments

    def arguments(
        self, parent: Any, name: str, what: GraphQLField, preferred: tuple[str, ...]
    ) -> str:
        given: dict[str, tuple[Any, str]] = {}
        if (parent.name, name) in PAGES:
            given |= self.page(parent.name, name, what)
        elif (parent.name, name) == ("Query", "model"):
            wanted = weighted(
                self.random, ((("owner", "name"), 5), (("id",), 4), (("owner",), 0.3), ((), 0.1), (("id", "name"), 0.2))
            )  # fmt: skip
            given |= {each: self.drawn(parent.name, name, each, what.args[each]) for each in wanted}
            if "name" in given and "owner" in given and self.chance(0.85):
                owner, own = self.random.choice(self.values.names)
                given |= {"owner": (owner, "login"), "name": (own, "name")}
        elif (parent.name, name) == ("Model", "version"):
            wanted = weighted(
                self.random,
                ((("number",), 4), (("alias",), 4), (("alias", "asOf"), 2), (("asOf",), 1), (("number", "asOf"), 1), ((), 0.3), (("number", "alias"), 0.3)),
            )  # fmt: skip
            given |= {each: self.drawn(parent.name, name, each, what.args[each]) for each in wanted}
        for each, argument in what.args.items():
            if each in given or (given and not self.required(argument) and self.chance(0.7)):
                continue
            if self.required(argument) or (
                self.chance(0.4) and (parent.name, name) not in PAGES and not given
                and name not in ("model", "version")
            ):  # fmt: skip
                given[each] = self.drawn(parent.name, name, each, argument, preferred)
        if not given:
            return ""
        items = list(given.items())
        if self.chance(0.3):
            self.random.shuffle(items)
        rendered = [
            f"{each}: {self.rendered(what.args[each], value, hint)}"
            for each, (value, hint) in items
        ]
        return f"({', '.join(rendered)})"

    def required(self, argument: GraphQLArgument | GraphQLInputField) -> bool:
        return isinstance(argument.type, GraphQLNonNull) and argument.default_value is Undefined

    def drawn(
        self,
        parent: str,
        name: str,
        argument: str,
        what: GraphQLArgument,
        preferred: tuple[str, ...] = (),
    ) -> tuple[Any, str]:
        hint = HINTS.get((parent, name, argument), "")
        if argument in ("id", "ids") and preferred:
            hint = f"id:{'|'.join(preferred)}"
        return self.values.draw(self.random, what.type, hint), hint

    def page(self, parent: str, name: str, what: GraphQLField) -> dict[str, tuple[Any, str]]:
        """`first` and `last`, places that fit the order, and what else the list takes."""
        given: dict[str, tuple[Any, str]] = {}
        collection, order = PAGES[parent, name]
        for each, argument in what.args.items():
            if each not in ("first", "last", "after", "before") and (
                self.required(argument) or self.chance(0.25)
            ):
                given[each] = self.drawn(parent, name, each, argument)
        tag = order
        if order in ("ModelOrder", "ModelVersionOrder"):
            tag = order_tag(order, given.get("orderBy", (None, ""))[0])
            if "search" in given and "orderBy" not in given:
                tag = "-score"
        sizes = weighted(
            self.random, (((), 5), (("first",), 5), (("last",), 3), (("first", "last"), 0.15))
        )
        for each in sizes:
            hint = "badPage" if self.chance(0.03) else "page"
            given[each] = (self.values.draw(self.random, what.args[each].type, hint), hint)
        for each in ("after", "before"):
            if self.chance(0.15):
                hint = f"cursor:{collection}:{tag}"
                given[each] = (self.values.draw(self.random, what.args[each].type, hint), hint)
        return given

    def rendered(self, what: GraphQLArgument | GraphQLInputField, value: Any, hint: str) -> str:
        """A value in the text, with variables in places of it."""
        if self.chance(self.share_of_variables):
            return self.variable(what.type, hint, what.default_value is not Undefined)
        return self.inner(what.type, value, hint)

    def inner(self, kind: Any, value: Any, hint: str) -> str:
        if isinstance(kind, GraphQLNonNull):
            kind = kind.of_type
        if isinstance(value, list) and isinstance(kind, GraphQLList):
            return "[" + ", ".join(self.place(kind.of_type, each, hint) for each in value) + "]"
        if isinstance(value, dict) and isinstance(kind, GraphQLInputObjectType):
            inside = [
                f"{name}: {self.place(kind.fields[name].type, each, hint_of(kind.name, name, hint), kind.fields[name].default_value is not Undefined)}"
                for name, each in value.items()
            ]
            return "{" + ", ".join(inside) + "}"
        if isinstance(value, str) and self.chance(0.02) and type(value) is str and '"' not in value:
            return (
                literal(value) if "\0" in value or "\\" in value or not value else f'"""{value}"""'
            )
        return literal(value)

    def place(self, kind: Any, value: Any, hint: str, has_default: bool = False) -> str:
        if self.chance(self.share_of_variables / 2):
            self.part.shapes.add("variable inside a value")
            return self.variable(kind, hint, has_default)
        return self.inner(kind, value, hint)

    def variable(self, kind: Any, hint: str, has_default: bool) -> str:
        """A variable that may stand where `kind` is wanted: one that is there already, or a new one."""
        for each in self.variables.values():
            if each.hint == hint and str(each.type) == str(kind) and self.chance(0.3):
                self.part.variables.add(each.name)
                return f"${each.name}"
        default, wanted = None, kind
        if isinstance(kind, GraphQLNonNull):
            if has_default and self.chance(0.4):
                wanted = kind.of_type
            elif self.chance(0.3):
                wanted = kind.of_type if self.chance(0.7) else kind
                default = literal(self.values.draw_present(self.random, kind.of_type, hint))
        elif self.chance(0.2):
            wanted = GraphQLNonNull(kind)
        elif self.chance(0.3):
            default = literal(self.values.draw(self.random, kind, hint))
        name = f"v{len(self.variables)}_"
        self.variables[name] = Variable(name, wanted, hint, default)
        self.part.variables.add(name)
        self.part.shapes.add("variable with a default" if default else "variable")
        return f"${name}"

    def directives(self, place: str) -> str:
        if not self.chance(self.share_of_directives):
            return ""
        made = []
        for name in self.random.choice(
            (("skip",), ("include",), ("include",), ("include", "skip"))
        ):
            if self.chance(0.5):
                boolean = GraphQLNonNull(GraphQLBoolean)
                value = self.variable(boolean, "flag", False)
                self.part.shapes.add(f"{name} by variable")
            else:
                value = literal(self.chance(0.5))
                self.part.shapes.add(f"{name} by value")
            made.append(f" @{name}(if: {value})")
        self.part.shapes.add(f"directive on a {place}")
        return "".join(made)


def draw_variables(
    operation: Operation, values: Values, random: Random, broken: bool
) -> dict[str, Any]:
    """Values for the variables of an operation; `broken`: one of them does not fit, mostly."""
    given: dict[str, Any] = {}
    for each in operation.variables:
        optional = not isinstance(each.type, GraphQLNonNull) or each.default is not None
        if not (optional and random.random() < 0.25):
            given[each.name] = plain(values.draw(random, each.type, each.hint))
    if broken:
        if operation.variables and random.random() < 0.9:
            name = random.choice(operation.variables).name
            if name in given and random.random() < 0.15:
                del given[name]
            else:
                given[name] = values.broken(random, given.get(name))
        else:
            given["unknown"] = 1
    return given
