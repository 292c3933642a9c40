"""The operations that GraphiQL opens with run on the schema as it is served."""

from pathlib import Path

import pytest
from graphql import GraphQLSchema, OperationDefinitionNode, build_schema, parse, validate

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "web" / "src" / "examples").glob("*.graphql"))


@pytest.fixture(scope="module")
def served() -> GraphQLSchema:
    return build_schema((ROOT / "schema.graphql").read_text())


def test_there_are_examples() -> None:
    assert [path.stem for path in EXAMPLES] == [
        "analytics",
        "create-model",
        "create-uploads",
        "facets",
        "model",
        "search",
        "trending",
        "viewer",
        "watch-jobs",
    ]
    shown = (ROOT / "web" / "src" / "examples.ts").read_text()
    assert [path.name for path in EXAMPLES if f"examples/{path.name}?raw" not in shown] == []


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_is_valid(path: Path, served: GraphQLSchema) -> None:
    document = parse(path.read_text())
    assert validate(served, document) == []
    for operation in document.definitions:
        assert isinstance(operation, OperationDefinitionNode)
        assert operation.name is not None  # the tab takes its title from the first
