"""Suggestions tell names of the schema, so one setting is for both: without introspection there are none."""

from typing import Any

import pytest

from modelharbor.settings import Settings
from tests.http.serving import codes, serving

pytestmark = pytest.mark.anyio
ORDERED = "query($o:ModelOrder!){models(orderBy:$o){nodes{id}}}"
FILTERED = "query($f:ModelFilter!){models(filter:$f){nodes{id}}}"


@pytest.mark.parametrize(
    ("query", "variables"),
    [
        ("{modelz{nodes{id}}}", {}),
        ("{models(frist:1){nodes{id}}}", {}),
        ("{models(filter:{tsk:{}}){nodes{id}}}", {}),
        ("{models(orderBy:{field:TRENDIN}){nodes{id}}}", {}),
        ("{viewer{...on Modell{id}}}", {}),
        ("query($f:ModelFiltre){models(filter:$f){nodes{id}}}", {}),
        ("{__typename @skp(if:true)}", {}),
        (ORDERED, {"o": {"field": "TRENDIN"}}),
        (FILTERED, {"f": {"tsk": {}}}),
    ],
)
async def test_a_mistake_tells_no_name_without_introspection(
    settings: Settings, query: str, variables: Any
) -> None:
    async with serving(settings, None) as server:
        open_answer = await server.ask(query, variables=variables)
    async with serving(settings.model_copy(update={"introspection": False}), None) as server:
        closed_answer = await server.ask(query, variables=variables)
    assert codes(open_answer) == codes(closed_answer)
    assert "Did you mean" not in closed_answer.text
    assert ("Did you mean" in open_answer.text) is ("@skp" not in query)
