"""The printed schema: current, sorted, and nothing of it lost."""

from collections import Counter
from pathlib import Path

from graphql import build_schema, lexicographic_sort_schema, print_schema

from modelharbor.schema import schema
from modelharbor.schema.sdl import schema_text, sorted_text

ROOT = Path(__file__).parents[2]


def test_schema_graphql_is_current() -> None:
    """`make schema` renews it."""
    assert (ROOT / "schema.graphql").read_bytes() == schema_text().encode()


def test_nothing_is_lost_by_sorting() -> None:
    unsorted, text = schema.as_str(), schema_text()
    assert print_schema(build_schema(text)) == print_schema(
        lexicographic_sort_schema(build_schema(unsorted))
    )
    applied = [
        Counter(word.split("(")[0] for word in printed.split() if word.startswith("@"))
        for printed in (text, unsorted)
    ]
    assert applied[0] == applied[1]
    assert applied[0]["@cost"] > 30


def test_everything_without_an_order_is_sorted() -> None:
    assert (
        sorted_text(
            '''
            type Query implements B & A @second @first { z(y: Int = 1, x: [Int!] = [2, 1]): Int "About a." a: E @cost(weight: 2, by: ["y", "x"]) }
            input I { b: Int = 3 a: Int }
            enum E { C "About B." B @deprecated(reason: "old") }
            union U = Query | Other
            """About it."""
            type Other { id: ID }
            interface B { z: Int }
            interface A { z: Int }
            scalar S @specifiedBy(url: "https://example.org")
            directive @second on OBJECT | FIELD_DEFINITION
            directive @first on OBJECT
            directive @cost(weight: Int, by: [String!]) on FIELD_DEFINITION
            '''
        )
        == '''\
directive @cost(by: [String!], weight: Int) on FIELD_DEFINITION

directive @first on OBJECT

directive @second on FIELD_DEFINITION | OBJECT

interface A {
  z: Int
}

interface B {
  z: Int
}

enum E {
  "About B."
  B @deprecated(reason: "old")
  C
}

input I {
  a: Int
  b: Int = 3
}

"""About it."""
type Other {
  id: ID
}

type Query implements A & B @second @first {
  "About a."
  a: E @cost(by: ["y", "x"], weight: 2)
  z(x: [Int!] = [2, 1], y: Int = 1): Int
}

scalar S @specifiedBy(url: "https://example.org")

union U = Other | Query
'''
    )
