"""How a field says where its value comes from: three words beside `strawberry.field`, read by both engines.

`strawberry.field(…)`   the value stored under the Python name (`name=` gives the client another name)
`computed(function)`    a pure function of stored values: its parameters are their names
`loaded(Loader, …)`     a relation: one batch read for all parents of a level with equal arguments
`rows(…)`               within a page: here the rows of the collection begin
`streamed(function)`    a subscription: its value is the row of each event of a source
"""

import inspect
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, TypeVar, cast

import strawberry
from strawberry.types.field import StrawberryField

from modelharbor.context import Context
from modelharbor.loaders.base import ROOT, Loader
from modelharbor.streams.base import Subscribed

T = TypeVar("T")
A = TypeVar("A", bound=Hashable)
READ: Final = "modelharbor.read"
GIVEN: Final = frozenset(
    {"typename", "viewer"}
)  # parameters of a computed field that are not stored


@dataclass(frozen=True, slots=True)
class Computed:
    function: Callable[..., Any]
    parameters: tuple[str, ...]
    of_rows: frozenset[str]
    """Stored names that it reads of the rows of a page, which are not its own parameters."""


@dataclass(frozen=True, slots=True)
class Loaded:
    loader: type[Loader[Any, Any, Any]]
    key: str | tuple[str, ...] | None
    """Stored name that holds the key; a list there loads many. A tuple: all of them are the key,
    each dotted where it is embedded."""
    arguments: Callable[..., Hashable] | None
    by: Callable[..., Hashable] | None = None
    """Makes the key from the GraphQL arguments, where the parent has none: fields of Query."""
    unasked: Computed | None = None
    """What answers, without a read, where no argument is given."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The stored names that make the key, and those that `unasked` takes."""
        if self.key is None:
            return ()
        key = self.key if isinstance(self.key, tuple) else (self.key,)
        return (*key, *self.unasked.parameters) if self.unasked else key

    def key_of(self, source: Any) -> Any:
        """The key (or list of keys) for one parent; None: nothing to load."""
        if self.key is None:
            return ROOT
        if isinstance(self.key, str):
            return read(source, self.key)
        found = tuple(_read_within(source, name) for name in self.key)
        return None if None in found else found


@dataclass(frozen=True, slots=True)
class Rows:
    pass


@dataclass(frozen=True, slots=True)
class Streamed:
    subscribed: Callable[..., Subscribed]


Declaration: TypeAlias = Computed | Loaded | Rows | Streamed


def read(source: Any, name: str) -> Any:
    """The default resolver: rows are dicts, payloads are objects."""
    return source.get(name) if type(source) is dict else getattr(source, name)


def _read_within(source: Any, path: str) -> Any:
    """By a dotted name; None where there is nothing to look into."""
    outer, *inner = path.split(".")
    found = read(source, outer)
    for name in inner:
        found = found.get(name) if type(found) is dict else None
    return found


def computed(
    function: Callable[..., T],
    *,
    description: str,
    name: str | None = None,
    of_rows: Iterable[str] = (),
    directives: tuple[object, ...] = (),
) -> T:
    """A field whose value is a pure function of stored values, and of `viewer` or `typename`."""
    parameters = tuple(inspect.signature(function).parameters)
    what = Computed(function, parameters, frozenset(of_rows))

    def resolve(root: Any, info: strawberry.Info[Context, None]) -> Any:
        given = {"typename": info.path.typename, "viewer": info.context.viewer}
        return function(*[given[p] if p in GIVEN else read(root, p) for p in what.parameters])

    field: T = strawberry.field(
        resolver=resolve,
        description=description,
        name=name,
        directives=directives,
        metadata={READ: what},
    )
    return field


def loaded(
    loader: type[Loader[Any, Any, A]],
    *,
    key: str | tuple[str, ...] | None = None,
    by: Callable[..., Hashable] | None = None,
    arguments: Callable[..., A] | None = None,
    unasked: Callable[..., Any] | None = None,
    description: str,
    name: str | None = None,
    directives: tuple[object, ...] = (),
) -> Any:
    """A field that is read by a loader. The parameters of `arguments` (or of `by`, which makes the
    key) are the GraphQL arguments; what it answers is hashable: equal arguments share a batch. Where
    none is given, `unasked` answers, a pure function of stored values."""
    stored = None
    if unasked is not None:
        stored = Computed(unasked, tuple(inspect.signature(unasked).parameters), frozenset())
    what = Loaded(loader, key, arguments, by, stored)

    def resolve(root: Any, info: strawberry.Info[Context, None], **given: Any) -> Any:
        if stored is not None and all(value is None for value in given.values()):
            return stored.function(*[read(root, name) for name in stored.parameters])
        value = what.key_of(root) if by is None else by(**given)
        if value is None:
            return None
        batch = info.context.loader(loader, cast("A", arguments(**given) if arguments else None))
        found = batch.load_many(value) if isinstance(value, list) else batch.load(value)
        if loader.shows:
            info.context.shown.append((str(info.path.key), loader.shows, found))
        return found

    own = list(inspect.signature(resolve).parameters.values())[:2]
    _take(resolve, own, arguments or by)
    return strawberry.field(
        resolver=resolve,
        description=description,
        name=name,
        directives=directives,
        metadata={READ: what},
    )


def _take(
    resolve: Callable[..., Any],
    own: list[inspect.Parameter],
    function: Callable[..., Any] | None,
) -> None:
    """Let a resolver have the parameters of `function` as its GraphQL arguments."""
    if function is not None:
        given = inspect.signature(function).parameters.values()
        own += [p.replace(kind=p.KEYWORD_ONLY) for p in given]
        resolve.__module__ = function.__module__  # where Strawberry looks their annotations up
    resolve.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]  # any function has it


def streamed(
    function: Callable[..., Subscribed],
    *,
    description: str,
    directives: tuple[object, ...] = (),
) -> Any:
    """A field of Subscription. The parameters of `function`, which says what to follow, are the
    GraphQL arguments."""

    def resolve(root: Any, info: strawberry.Info[Context, None], **given: Any) -> Any:
        return read(root, info.python_name)

    _take(resolve, list(inspect.signature(resolve).parameters.values())[:2], function)
    return strawberry.field(
        resolver=resolve,
        description=description,
        directives=directives,
        metadata={READ: Streamed(function)},
    )


def is_row_of(kind: type, value: Any, _info: object) -> bool:
    """For `is_type_of` of a type whose rows may stand beside others: those carry their type's name."""
    row: Mapping[str, Any] = value
    return bool(row.get("__typename", kind.__name__) == kind.__name__)


def rows(*, description: str) -> Any:
    """A field of a page that holds its rows."""
    return strawberry.field(description=description, metadata={READ: Rows()})


def declaration(field: StrawberryField, *, is_asked: bool = True) -> Declaration | None:
    """What `field` was declared with; None: the value stored under its Python name. `is_asked`: with
    arguments, as far as it takes some."""
    found: Declaration | None = field.metadata.get(READ)
    if not is_asked and isinstance(found, Loaded) and found.unasked is not None:
        return found.unasked
    return found
