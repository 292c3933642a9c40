"""What the rows of an export look like, known before the first is there."""

from dataclasses import dataclass
from enum import Enum


class ColumnKind(Enum):
    TEXT = "text"  # str: also ids, enum values, hashes, addresses
    WHOLE = "whole"  # int of 64 bits, or its digits as a str (BigInt)
    NUMBER = "number"  # float
    BOOLEAN = "boolean"
    TIME = "time"  # str, RFC 3339 in UTC
    JSON = "json"  # any value
    OBJECT = "object"  # dict with the names of `of`
    LIST = "list"  # list of values as the one column in `of`


@dataclass(frozen=True, slots=True)
class Column:
    """`name`: as it stands in a row; rows are as GraphQL answers them, with its scalars in JSON."""

    name: str
    kind: ColumnKind
    nullable: bool = True
    of: tuple["Column", ...] = ()
