"""What no single count shows is refused over HTTP too, with measure, value and limit, before any command."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from modelharbor.settings import Settings
from tests.http.serving import Server, codes, serving

pytestmark = pytest.mark.anyio


@pytest.fixture
async def real(settings: Settings) -> AsyncIterator[Server]:
    """Our own schema."""
    async with serving(settings, None) as server:
        yield server


SHARED = " ".join(f"query Q{n}($a:ID!){{...F}}" for n in range(41))
DOUBLED = "".join(f"fragment F{n} on Model{{...F{n + 1} ...F{n + 1}}}" for n in range(11))
FILTERED = "query($f:ModelFilter!){models(filter:{or:[$f,$f,$f]}){nodes{id}}}"
BOMBS: dict[str, tuple[str, Any, int | None, int]] = {
    "tokens": ('{model(id:"x"){' + "id " * 1992 + "}}", {}, None, 2000),
    "fields": (f'{{model(id:"x"){{...F0}}}} {DOUBLED} fragment F11 on Model{{id}}', {}, 2049, 2000),
    "overlaps": ('{model(id:"x"){' + "id " * 1000 + "}}", {}, None, 20_000),
    "operations": (" ".join(f"query Q{n}{{viewer{{id}}}}" for n in range(51)), {}, 51, 50),
    "variableUses": (
        f"{SHARED} fragment F on Query{{nodes(ids:[{'$a ' * 50}]){{id}}}}",
        {"a": "x"},
        41 * 50,
        2000,
    ),
    "inputValues": (FILTERED, {"f": {"or": [{}] * 1665}}, 2 + 3 * 1667, 5000),
}


@pytest.mark.parametrize("measure", BOMBS)
async def test_over_a_limit_nothing_runs(real: Server, commands: list[str], measure: str) -> None:
    text, variables, value, limit = BOMBS[measure]
    response = await real.ask(text, variables=variables, operationName=None)
    [error] = response.json()["errors"]
    found = error["extensions"]
    assert codes(response) == ["OPERATION_TOO_COMPLEX"]
    assert (found["measure"], found.get("value"), found["limit"]) == (measure, value, limit)
    assert value is None or f"is {value}; the limit is {limit}." in error["message"]
    assert "data" not in response.json()
    assert commands == []


async def test_variables_may_be_used_often_while_they_are_small(real: Server) -> None:
    response = await real.ask(FILTERED, variables={"f": {"or": [{}] * 5}})
    assert response.json() == {"data": {"models": {"nodes": []}}}


async def test_the_server_lives_after_all_of_it(real: Server) -> None:
    for text, variables, _, _ in BOMBS.values():
        await real.ask(text, variables=variables)
    assert (await real.ask("{__typename}")).json() == {"data": {"__typename": "Query"}}
