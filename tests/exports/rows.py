"""Columns as queries may have them, rows of them, and what these are once they are read back."""

from datetime import UTC, datetime
from itertools import pairwise
from typing import Any, Final

from hypothesis import strategies as st

from modelharbor.db.base import Row
from modelharbor.exports.columns import Column, ColumnKind

LARGEST: Final = 2**63 - 1
NAMES: Final = st.text("abXYZ_09", min_size=1, max_size=4).map(lambda text: f"n{text}")
PLAIN: Final = [kind for kind in ColumnKind if kind not in (ColumnKind.OBJECT, ColumnKind.LIST)]
JSON: Final = st.recursive(
    st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: (
        st.lists(st.none() | inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), st.none() | inner, max_size=3)
    ),
    max_leaves=5,
)
TEXTS: Final = st.text(max_size=12) | st.sampled_from(
    ["", " ", '"', '""', ",", "a,b", "a\r\nb", "\n", "\r", "=1+2", "+1", "-1", "@x", "\ufeff", "NA"]
)


@st.composite
def _column(draw: st.DrawFn, name: str, depth: int) -> Column:
    kind = draw(st.sampled_from(PLAIN if depth == 0 else list(ColumnKind)))
    of: tuple[Column, ...] = ()
    if kind is ColumnKind.OBJECT:
        of = draw(columns(depth - 1))
    elif kind is ColumnKind.LIST:
        of = (draw(_column("", depth - 1)),)
    return Column(name, kind, draw(st.booleans()), of)


@st.composite
def columns(draw: st.DrawFn, depth: int = 2) -> tuple[Column, ...]:
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))
    return tuple(draw(_column(name, depth)) for name in names)


def _shown(moment: datetime) -> str:
    return moment.isoformat("T", "milliseconds").removesuffix("+00:00") + "Z"


def _values(column: Column) -> st.SearchStrategy[Any]:
    match column.kind:
        case ColumnKind.TEXT:
            found: st.SearchStrategy[Any] = TEXTS
        case ColumnKind.WHOLE:
            whole = st.integers(-LARGEST - 1, LARGEST)
            found = whole | whole.map(str)
        case ColumnKind.NUMBER:
            found = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-1000, 1000)
        case ColumnKind.BOOLEAN:
            found = st.booleans()
        case ColumnKind.TIME:
            found = st.datetimes(timezones=st.just(UTC)).map(_shown)
        case ColumnKind.JSON:
            found = JSON
        case ColumnKind.OBJECT:
            found = st.fixed_dictionaries({each.name: _values(each) for each in column.of})
        case ColumnKind.LIST:
            found = st.lists(_values(column.of[0]), max_size=3)
    return st.none() | found if column.nullable else found


@st.composite
def tables(draw: st.DrawFn) -> tuple[tuple[Column, ...], list[Row], list[list[Row]]]:
    """Columns, rows, and these rows in pieces."""
    found = draw(columns())
    one = st.fixed_dictionaries({each.name: _values(each) for each in found})
    rows: list[Row] = draw(st.lists(one, max_size=8))
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    ends = [0, *cuts, len(rows)]
    return found, rows, [rows[start:end] for start, end in pairwise(ends)]


def typed(column: Column, value: Any) -> Any:
    """A value of a row as a reader of types has it."""
    if value is None:
        return None
    match column.kind:
        case ColumnKind.WHOLE:
            return int(value)
        case ColumnKind.NUMBER:
            return float(value)
        case ColumnKind.TIME:
            return datetime.fromisoformat(value)
        case ColumnKind.OBJECT:
            return {each.name: typed(each, value[each.name]) for each in column.of}
        case ColumnKind.LIST:
            return [typed(column.of[0], each) for each in value]
    return value


def flat(columns: tuple[Column, ...], row: Row, above: str = "") -> dict[str, tuple[Column, Any]]:
    """The values of a row by their names in CSV."""
    found: dict[str, tuple[Column, Any]] = {}
    for column in columns:
        value = row.get(column.name)
        if column.kind is ColumnKind.OBJECT:
            found |= flat(column.of, value or {}, f"{above}{column.name}.")
        else:
            found[above + column.name] = column, value
    return found
