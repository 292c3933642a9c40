"""A selection as one Python function, written once: read level by level, then build the answer.

The function has two parts. First it goes down the selection: all parents of a level give their keys,
each relation is read by one batch, the relations of a level at the same time. Then it builds the
answer from what was read, by nested functions, one for each place where objects stand.

It knows only answers without errors. Where anything is not as the schema promises (a null that may
not be, a value of another kind, an argument that is refused, a read that failed), it raises, and
graphql-core makes the answer from the same reads: see execute.py.
"""

from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Final, TypeAlias

import strawberry
from graphql import (
    GraphQLEnumType,
    GraphQLLeafType,
    Undefined,
    get_named_type,
    is_leaf_type,
    is_list_type,
    is_non_null_type,
)
from strawberry.types.enum import StrawberryEnumDefinition

from modelharbor.loaders.base import ROOT, Loader

from .arguments import Binder, Frozen
from .declaration import GIVEN, Computed, Loaded
from .policy import NEVER, Policy, policy_of
from .selection import BACKREF, Selected, Selection

Function: TypeAlias = Callable[[Any], Awaitable[dict[str, Any]]]


class Unplanned(Exception):
    """Something in this answer is not as a plan expects it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One read of a plan."""

    number: int
    path: str
    loader: type[Loader[Any, Any, Any]]
    key: tuple[str, ...]
    reads: frozenset[str]
    binder: Binder | None


@dataclass(frozen=True, slots=True)
class Plan:
    function: Function
    steps: dict[int, Step]
    source: str = ""  # not kept where plans are run
    size: int = 0  # of the source, in characters
    policy: Policy = NEVER
    """How long its answers may be kept."""


def make_plan(schema: strawberry.Schema, selection: Selection, frozen: Frozen) -> Plan:
    writer = _Writer(schema, frozen)
    source = writer.written(selection)
    exec(compile(source, "<plan>", "exec"), writer.names)
    # Out of its own surroundings: as a cycle it would wait for the collector, and frozen for ever.
    function = writer.names.pop("plan")
    return Plan(function, writer.steps, source, len(source), policy_of(selection))


@dataclass(slots=True)
class _Stage:
    """What happens between two waits for the database."""

    prepare: list[str] = field(default_factory=list)
    reads: list[tuple[int, str]] = field(default_factory=list)  # number of the step, call of `run`
    by_loader: dict[type[Loader[Any, Any, Any]], list[int]] = field(default_factory=dict)
    """Steps without arguments: those of one loader are one read."""
    same: list[tuple[int, int]] = field(default_factory=list)  # a step, and whose read is its own


class _Writer:
    def __init__(self, schema: strawberry.Schema, frozen: Frozen) -> None:
        self.schema, self.frozen = schema, frozen
        self.names: dict[str, Any] = {
            "Unplanned": Unplanned,
            "null": _null,
            "unplanned": _unplanned,
        }
        self.classes = {
            str(getattr(definition, "name", "")): kind
            for kind, definition in schema.schema_converter.scalar_registry.items()
            if isinstance(kind, type) and kind.__module__ == "datetime"
        }
        """Scalars that stand for a class of Python's: what they make of its objects is never null."""
        self.steps: dict[int, Step] = {}
        self.stages: list[_Stage] = []
        self.functions: list[str] = []
        self.made: dict[Hashable, str] = {}
        self.rows = 0

    def written(self, selection: Selection) -> str:
        root = {selection.root.name: selection.top}
        self.descend(root, "tops", 0)
        top = self.object_function(selection.root, selection.top, "top")
        lines = ["async def plan(run):", "    viewer, tops = run.viewer, [run.top]"]
        for stage in self.stages:
            self.join(stage)
            lines += [f"    {line}" for line in stage.prepare]
            lines += self.waits(stage)
        lines += self.functions
        lines.append(f"    return {top}(run.top)")
        return "\n".join(lines) + "\n"

    # ---- down: what is read

    def stage(self, number: int) -> _Stage:
        while len(self.stages) <= number:
            self.stages.append(_Stage())
        return self.stages[number]

    def join(self, stage: _Stage) -> None:
        """Steps of one loader become one read, of all their keys and names."""
        for numbers in stage.by_loader.values():
            first, *others = numbers
            keys = f"keys{first}"
            if others:
                steps = [self.steps.pop(number) for number in numbers]
                self.steps[first] = replace(
                    steps[0],
                    path=", ".join(step.path for step in steps),
                    key=tuple(dict.fromkeys(name for step in steps for name in step.key)),
                    reads=frozenset().union(*(step.reads for step in steps)),
                )
                keys = f"keys{first}_all"
                each = ", ".join(f"*keys{number}" for number in numbers)
                stage.prepare.append(f"{keys} = list(dict.fromkeys([{each}]))")
            stage.reads.append((first, f"read({first}, {keys})"))
            stage.same += [(other, first) for other in others]
        stage.reads.sort()

    def waits(self, stage: _Stage) -> list[str]:
        if len(stage.reads) == 1:
            [(number, call)] = stage.reads
            waits = [f"    found{number} = await run.{call}"]
        else:
            waits = [f"    reading{number} = run.begin(run.{call})" for number, call in stage.reads]
            waits += [f"    found{number} = await reading{number}" for number, _ in stage.reads]
        return waits + [f"    found{other} = found{first}" for other, first in stage.same]

    def descend(self, below: dict[str, list[Selected]], rows: str, level: int) -> None:
        """`rows` names a list of the objects that stand at one place."""
        for kind, fields in below.items():
            wanted = [each for each in fields if each.loads]
            if not wanted:
                continue
            mine = rows
            if len(below) > 1:
                self.rows += 1
                mine = f"rows{self.rows}"
                condition = f"row.get('__typename') == {kind!r}"
                self.stage(level).prepare.append(f"{mine} = [row for row in {rows} if {condition}]")
            for each in wanted:
                self.descend_field(each, kind, mine, level)

    def descend_field(self, each: Selected, kind: str, rows: str, level: int) -> None:
        stage, number = self.stage(level), each.number
        if isinstance(each.what, Loaded):
            self.read(each, each.what, rows, stage)
            keys = f"('{ROOT}',)" if each.what.key is None else f"keys{number}"
            source = f"for key in {keys} for value in (found{number}.get(key),)"
            self.flattened(each, source, level + 1)
        elif isinstance(each.what, Computed):
            value = self.computed(each.what, kind, "row")
            stage.prepare.append(f"made{number} = {{id(row): {value} for row in {rows}}}")
            self.flattened(each, f"for value in made{number}.values()", level)
        else:
            assert each.own is not None
            name = each.own.python_name
            self.flattened(each, f"for row in {rows} for value in (row.get({name!r}),)", level)

    def read(self, each: Selected, what: Loaded, rows: str, stage: _Stage) -> None:
        number = each.number
        assert each.definition is not None
        assert each.own is not None
        function = what.by or what.arguments
        binder = None
        if function is not None:
            binder = Binder(
                self.schema, each.definition, each.own, each.node, function, self.frozen
            )
        self.steps[number] = Step(number, each.path, what.loader, what.reads, each.reads, binder)
        if what.key is None:
            call = f"read_by_arguments({number})" if what.by else f"read({number}, ['{ROOT}'])"
            stage.reads.append((number, call))
            return
        key = self.key(each, what, "row")
        keys = f"key for row in {rows} if (key := {key}) is not None"
        stage.prepare.append(f"keys{number} = list(dict.fromkeys([{keys}]))")
        if binder is None:
            stage.by_loader.setdefault(what.loader, []).append(number)
        else:
            stage.reads.append((number, f"read({number}, keys{number})"))

    def key(self, each: Selected, what: Loaded, row: str) -> str:
        if isinstance(what.key, str):
            return f"{row}.get({what.key!r})"
        return f"{self.named(what, 'key_of', what.key_of)}({row})"

    def flattened(self, each: Selected, source: str, level: int) -> None:
        """The objects that stand in the values of a field, lists and nulls taken apart."""
        if not any(below.loads for fields in each.below.values() for below in fields):
            return
        assert each.definition is not None
        kind: Any = each.definition.type
        value, depth, text = "value", 0, source
        while True:
            if is_non_null_type(kind):
                kind = kind.of_type
            if not is_list_type(kind):
                break
            kind, depth = kind.of_type, depth + 1
            text += f" if {value}.__class__ is list for item{depth} in {value}"
            value = f"item{depth}"
        self.rows += 1
        rows = f"rows{self.rows}"
        self.stage(level).prepare.append(f"{rows} = [{value} {text} if {value}.__class__ is dict]")
        self.descend(each.below, rows, level)

    # ---- up: what is answered

    def objects(self, each: Selected) -> str:
        """The name of the function that makes an object of the answer from one that was read."""
        assert each.definition is not None
        target = get_named_type(each.definition.type)
        name = f"object{each.number}"
        kinds = self.schema._schema.type_map
        if list(each.below) == [target.name]:
            return self.object_function(kinds[target.name], each.below[target.name], name)
        branches = []
        for index, (kind, fields) in enumerate(each.below.items()):
            made = self.object_function(kinds[kind], fields, f"{name}_{index}")
            branches.append(f"        if kind == {kind!r}: return {made}(row)")
        self.functions += [
            f"    def {name}(row):",
            "        if row.__class__ is not dict: raise Unplanned",
            "        kind = row.get('__typename')",
            *branches,
            "        raise Unplanned",
        ]
        return name

    def object_function(self, kind: Any, fields: Sequence[Selected], name: str) -> str:
        values = [
            f"            {each.response!r}: {self.field(each, kind.name, 'row')},"
            for each in fields
        ]
        self.functions += [
            f"    def {name}(row):",
            f"        if not ({self.check(kind, 'row')}): raise Unplanned",
            "        return {",
            *values,
            "        }",
        ]
        return name

    def flat(self, each: Selected, value: str) -> str | None:
        """The expression that makes an object, where only leaves are selected of its one type: for
        many small ones the call of a function is half of the work. `value` may be a variable's name
        or an expression; None where a function is needed."""
        assert each.definition is not None
        target = get_named_type(each.definition.type)
        if list(each.below) != [target.name]:
            return None
        fields = each.below[target.name]
        if any(below.below or below.loads for below in fields):
            return None
        row = value if value.isidentifier() else f"object{each.number}"
        first = row if value.isidentifier() else f"({row} := {value})"
        check = self.check(self.schema._schema.type_map[target.name], row, first)
        values = [f"{below.response!r}: {self.field(below, target.name, row)}" for below in fields]
        return f"({{{', '.join(values)}}} if {check} else unplanned({row}))"

    def check(self, kind: Any, row: str, first: str = "") -> str:
        """That `row` is an object of that type; `first` is how it is named the first time."""
        check = f"{first or row}.__class__ is dict"
        if kind.is_type_of is not None:
            check += f" and {row}.get('__typename', {kind.name!r}) == {kind.name!r}"
        return check

    def field(self, each: Selected, kind: str, row: str) -> str:
        if each.definition is None:
            return repr(kind)
        nullable = not is_non_null_type(each.definition.type)
        return self.complete(each, each.definition.type, self.value(each, kind, nullable, row), 0)

    def value(self, each: Selected, kind: str, nullable: bool, row: str) -> str:
        assert each.own is not None
        what = each.what
        if isinstance(what, Computed):
            if each.loads:
                return f"made{each.number}[id({row})]"
            return self.computed(what, kind, row)
        if isinstance(what, Loaded):
            if what.key is None:
                return f"found{each.number}.get('{ROOT}')"
            key = self.key(each, what, row)
            return f"(None if (key := {key}) is None else found{each.number}.get(key))"
        name = each.own.python_name
        return f"{row}.get({name!r})" if nullable else f"{row}[{name!r}]"

    def computed(self, what: Computed, kind: str, row: str) -> str:
        given = {"viewer": "viewer", "typename": repr(kind)}
        parameters = [given[p] if p in GIVEN else f"{row}.get({p!r})" for p in what.parameters]
        return f"{self.named(what.function, what.function.__name__)}({', '.join(parameters)})"

    def complete(self, each: Selected, kind: Any, value: str, depth: int) -> str:
        """`value` is an expression, or the name of a variable within a list."""
        nullable = True
        if is_non_null_type(kind):
            kind, nullable = kind.of_type, False
        if is_leaf_type(kind):
            return self.leaf(kind, nullable, value)
        # Names of their own for each field: an object written in place holds others' values.
        name = value if value.isidentifier() else f"value{each.number}_{depth}"
        first = name if value.isidentifier() else f"({name} := {value})"
        if is_list_type(kind):
            item = self.complete(each, kind.of_type, f"item{each.number}_{depth}", depth + 1)
            otherwise = "null" if nullable else "unplanned"
            return (
                f"([{item} for item{each.number}_{depth} in {name}] if {first}.__class__ is list"
                f" else {otherwise}({name}))"
            )
        made = self.flat(each, name if nullable else value)
        if made is None:
            made = f"{self.objects(each)}({name if nullable else value})"
        return f"(None if {first} is None else {made})" if nullable else made

    def leaf(self, kind: GraphQLLeafType, nullable: bool, value: str) -> str:
        name = value if value.isidentifier() else "leaf"
        first = name if value.isidentifier() else f"(leaf := {value})"
        if isinstance(kind, GraphQLEnumType):
            names = self.kept(("enum", kind.name), f"{kind.name}_names", lambda: _enum_names(kind))
            if not nullable:
                return f"{names}[{value}]"
            return f"(None if {first} is None else {names}[{name}])"
        coerced = self.kept(
            ("leaf", kind.name, nullable),
            f"{kind.name}{'_or_null' if nullable else ''}",
            lambda: _coercion(kind, nullable),
        )
        or_null = f" or {name} is None" if nullable else ""
        check = _PLAIN.get(kind.name)
        if check is not None:
            condition = check.replace("VALUE", name)
            return f"({name} if {first}{condition}{or_null} else {coerced}({name}))"
        if kind.coerce_output_value is str:
            return (
                f"({name} if {first}.__class__ is str{or_null} else"
                f" str({name}) if {name}.__class__ is int else {coerced}({name}))"
            )
        own = self.classes.get(kind.name)
        if own is not None:
            of_class = self.named(own, own.__name__)
            plain = self.named(kind.coerce_output_value, f"{kind.name}_of")
            return f"({plain}({name}) if {first}.__class__ is {of_class} else {coerced}({name}))"
        return f"{coerced}({value})"

    def named(self, thing: Any, name: str, value: Any = None) -> str:
        """`value` stands under the name, where it is not the thing itself."""
        return self.kept(("thing", id(thing)), name, lambda: thing if value is None else value)

    def kept(self, identity: Hashable, name: str, make: Callable[[], Any]) -> str:
        """The name in the plan's source under which a thing of its surroundings stands."""
        found = self.made.get(identity)
        if found is None:
            # Begins with an underscore, as no variable of the plan and no built-in name does.
            name = f"_{name}" if name.isidentifier() else "_function"
            found = name if name not in self.names else f"{name}_{len(self.names)}"
            self.made[identity] = found
            self.names[found] = make()
        return found


_PLAIN: Final = {
    "String": ".__class__ is str",
    "ID": ".__class__ is str",
    "Boolean": ".__class__ is bool",
    "Int": ".__class__ is int and -2147483648 <= VALUE <= 2147483647",
    "Float": ".__class__ is float and VALUE - VALUE == 0.0",  # neither infinite nor NaN
}
"""What of each built-in scalar needs no coercion; everything else goes through the type's own."""


def _coercion(kind: GraphQLLeafType, nullable: bool) -> Callable[[Any], Any]:
    coerce = kind.coerce_output_value

    def coerced(value: Any) -> Any:
        if value is None and nullable:
            return None
        if value is None or isinstance(value, Exception):
            raise Unplanned
        found = coerce(value)
        if found is None or found is Undefined:
            raise Unplanned
        return found

    return coerced


def _enum_names(kind: GraphQLEnumType) -> dict[Any, str]:
    """The name of each value, both as it is stored and as a member of the Python enum."""
    definition: StrawberryEnumDefinition = kind.extensions[BACKREF]
    members: Iterable[Enum] = definition.wrapped_cls
    found = {}
    for member in members:
        for value in (member.value, member):
            found[value] = kind.coerce_output_value(value)
    return found


def _null(value: Any) -> None:
    if value is not None:
        raise Unplanned


def _unplanned(value: Any) -> None:
    raise Unplanned
