"""`rateLimit`: what the operation that asks costs, by both engines."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from modelharbor.auth.links import DownloadLinks
from modelharbor.auth.viewer import ANONYMOUS
from modelharbor.cache.budgets import LARGEST, MILLION, Budgets, Kind
from modelharbor.context import Context
from modelharbor.execution.budgets import count_rows, dry_run
from modelharbor.execution.execute import Answer, run
from modelharbor.loaders.budgets import Spending
from modelharbor.schema import core, schema
from tests.asking import GUARD_SECONDS, Asker

pytestmark = pytest.mark.anyio
ALL = "limit cost requestedCost remaining restoreRate resetAt nodeCount"


@dataclass(kw_only=True)
class Charged(Context):
    spending: Spending | None = None


async def asked(ask: Asker, text: str, *, spent: int = 0, plans: bool = True) -> Answer:
    """As the endpoint runs it, for an address that has spent something of its 1,000."""
    changes = {"budget_anonymous": 10, "budget_seconds": 100.0, "compiled_plans": plans}
    settings = ask.settings.model_copy(update=changes)
    document = ask.documents.get(text)
    operation = document.operation(None)
    values = operation.coerce({})
    requested = ask.documents.check_cost(operation, values)
    measured = dry_run(core, document, operation, values)
    charge = Budgets(settings).charge("a", Kind.ANONYMOUS, 1 if measured else requested)
    charge.answered((spent + charge.cost) * MILLION)

    def nodes() -> int:
        return count_rows(ask.documents.guard.prices, document, operation, values)

    context = Charged(
        database=ask.database,
        cache=ask.cache,
        viewer=ANONYMOUS,
        links=DownloadLinks(b"k" * 32, "http://test"),
        settings=settings,
        storage=ask.storage,
        request_id="test",
        spending=Spending(charge, requested, nodes),
    )
    runs = measured or (document, operation)
    deadline = asyncio.get_running_loop().time() + GUARD_SECONDS
    return await run(schema, *runs, {}, context, deadline, values)


def without_time(answer: Answer) -> Any:
    assert answer.errors == []
    assert answer.data is not None
    data = {key: dict(value) for key, value in answer.data.items()}
    for value in data.values():
        value.pop("resetAt", None)
    return data


@pytest.mark.parametrize("plans", [True, False])
async def test_it_tells_what_the_operation_costs(ask: Asker, plans: bool) -> None:
    text = f"{{ rateLimit {{ {ALL} }} models(first: 50) {{ nodes {{ owner {{ login }} }} }} }}"
    before = datetime.now(UTC)
    answer = await asked(ask, text, spent=300, plans=plans)
    assert (answer.fallback is None) is plans
    assert answer.data is not None
    reset = datetime.fromisoformat(answer.data["rateLimit"]["resetAt"])
    assert timedelta(seconds=40) <= reset - before + timedelta(milliseconds=1)
    assert reset <= datetime.now(UTC) + timedelta(seconds=40.1)
    assert without_time(answer) == {
        "rateLimit": {
            "limit": 1000,
            "cost": 101,
            "requestedCost": 101,
            "remaining": 599,
            "restoreRate": 10,
            "nodeCount": 50,
        },
        "models": {"nodes": []},
    }


@pytest.mark.parametrize("plans", [True, False])
async def test_a_dry_run_answers_it_alone(ask: Asker, plans: bool) -> None:
    text = f"""{{
      a: rateLimit(dryRun: true) {{ {ALL} }}
      models(first: 50) {{ nodes {{ owner {{ login }} }} }}
      b: rateLimit {{ cost }}
    }}"""
    answer = await asked(ask, text, plans=plans)
    assert (answer.fallback is None) is plans
    assert without_time(answer) == {
        "a": {
            "limit": 1000,
            "cost": 1,
            "requestedCost": 102,
            "remaining": 999,
            "restoreRate": 10,
            "nodeCount": 50,
        },
        "b": {"cost": 1},
    }


async def test_who_has_no_limit_reads_the_largest_number(ask: Asker) -> None:
    answer = await ask(f"{{ rateLimit {{ {ALL} }} }}")
    assert answer.errors == []
    assert answer.fallback is None
    told = answer.data["rateLimit"]
    assert told.pop("resetAt")
    assert told == {
        "limit": LARGEST,
        "cost": 0,
        "requestedCost": 0,
        "remaining": LARGEST,
        "restoreRate": LARGEST,
        "nodeCount": 0,
    }
    assert answer.commands == []
