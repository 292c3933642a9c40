"""Who sees what is told by both engines: these tests run by plans, and again by graphql-core."""

import pytest

from tests.asking import Asker

BOTH = ("test_permissions", "test_visibility")
"""Modules. The others take long, or ask about plans alone; answers are compared in tests/execution."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_of_both = metafunc.module.__name__.rpartition(".")[2] in BOTH
    # What changes something has no plan.
    if is_of_both and "ask" in metafunc.fixturenames and "mutation" not in metafunc.definition.name:
        metafunc.parametrize("engine", ["plan", "graphql-core"], indirect=True)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "plan"))


@pytest.fixture
def ask(ask: Asker, engine: str) -> Asker:
    return ask.by_core if engine == "graphql-core" else ask
