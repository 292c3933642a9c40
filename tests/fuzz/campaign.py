"""Many cases, one after the other, and what came of them."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from random import Random
from typing import Final

from modelharbor.errors import HarborError
from modelharbor.execution.documents import InvalidDocument
from modelharbor.execution.execute import UNEXPECTED
from modelharbor.schema import core

from .compare import Case, Compared, Difference, World, compared, compared_together, shapes
from .documents import Operation, Writer, Written, draw_variables
from .shrink import shrunk
from .spots import draw_spot

PER_DOCUMENT: Final = 4  # cases: it costs more to make and validate a document than to run it
BROKEN: Final = 0.08  # share of cases whose variables do not fit
FAILING: Final = 0.15  # share of cases with reads that fail
DAMAGED: Final = 0.26  # share of cases on the damaged data
SPOTTED: Final = 0.4  # share of the other cases with damage in one place
TOGETHER: Final = 0.1  # share of documents whose cases run at the same time, with shared reads
LIVE: Final = 0.1  # share of cases that read everything from the database


@dataclass
class Found:
    """A case that differs, as small as it could be made."""

    case: Case
    found: Difference
    original: Case


@dataclass
class Tally:
    """What came of the cases."""

    cases: int = 0
    documents: int = 0
    invalid: Counter[str] = field(default_factory=Counter)
    """Documents that were not valid, by the first problem; they are not used."""
    clean: int = 0
    """Queries without any error: those that a plan is for."""
    clean_by_plan: int = 0
    by_plan: int = 0
    refused: int = 0
    with_errors: int = 0
    fallbacks: Counter[str] = field(default_factory=Counter)
    clean_fallbacks: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    """Of all cases."""
    planned_shapes: Counter[str] = field(default_factory=Counter)
    """Of the cases that ran as a plan."""
    replayed_shapes: Counter[str] = field(default_factory=Counter)
    """Of the cases that began as a plan, and whose answer graphql-core then made of the same reads."""
    fields: Counter[str] = field(default_factory=Counter)
    """Of the documents that ran as a plan, such as `Model.name`."""
    differing: Counter[str] = field(default_factory=Counter)
    """Cases that differ, by kind of difference."""
    found: list[Found] = field(default_factory=list)
    by_order: list[Compared] = field(default_factory=list)
    """Cases that differ, but graphql-core gives both answers, in one order of reads and in another."""
    clean_examples: dict[str, Case] = field(default_factory=dict)
    """By reason, a query without errors that graphql-core ran."""

    def add(self, done: Compared, operation: Operation) -> None:
        self.cases += 1
        occurred = shapes(done) | operation.shapes
        self.shapes.update(occurred)
        fallback, answer = done.plan.fallback, done.core.answer
        is_clean = answer is not None and not answer.errors and "mutation" not in occurred
        self.clean += is_clean
        self.refused += answer is not None and answer.is_refused
        self.with_errors += bool(answer and answer.errors and not answer.is_refused)
        if fallback is None:
            self.by_plan += 1
            self.clean_by_plan += is_clean
            self.planned_shapes.update(occurred)
            self.fields.update(operation.fields)
        else:
            if fallback == UNEXPECTED:
                self.replayed_shapes.update(occurred)
            self.fallbacks[fallback] += 1
            if is_clean:
                self.clean_fallbacks[fallback] += 1
                self.clean_examples.setdefault(fallback, done.case)
        if done.is_by_order:
            self.by_order.append(done)
        else:
            self.differing.update(list(done.found))

    @property
    def differences(self) -> int:
        return len(self.found)

    def lines(self, seconds: float) -> Iterator[str]:
        """The report."""
        invalid = sum(self.invalid.values())
        yield f"{self.cases} cases of {self.documents} documents in {seconds:.0f} s ({self.cases / seconds:.0f} a second)"
        yield f"{self.differences} differ {dict(self.differing)}; {len(self.by_order)} more by the order of reads alone"
        yield f"{_share(self.documents - invalid, self.documents)} of the documents are valid"
        yield f"{_share(self.refused, self.cases)} refused, {_share(self.with_errors, self.cases)} with errors"
        yield f"{_share(self.by_plan, self.cases)} ran as a plan; of the {self.clean} queries without errors {_share(self.clean_by_plan, self.clean)}"
        for reason, count in self.fallbacks.most_common():
            yield f"  {count:7} {reason} ({self.clean_fallbacks[reason]} without errors)"
        yield "Shapes: how often, how often as a plan, how often as one that failed"
        for shape, count in self.shapes.most_common():
            yield f"  {count:7} {self.planned_shapes[shape]:7} {self.replayed_shapes[shape]:7} {shape}"
        for problem, count in self.invalid.most_common(5):
            yield f"  not valid, {count}: {problem}"


def _share(part: int, whole: int) -> str:
    return f"{100 * part / (whole or 1):.1f} %"


async def campaign(
    world: World,
    cases: int,
    seed: str,
    progress: Callable[[Tally], None] = lambda tally: None,
    most_found: int = 20,
) -> Tally:
    """Runs so many cases; ends early when so many of them differ."""
    tally = Tally()
    number = 0
    while tally.cases < cases and tally.differences < most_found:
        random = Random(f"{seed}/{number}")
        viewer = random.choice(list(world.viewers["healthy"]))
        written = Writer(core, world.values, random, viewer).write()
        tally.documents += 1
        try:
            world.document(written.text)
        except (InvalidDocument, HarborError) as refused:
            tally.invalid[str(refused)[:200]] += 1
        else:
            place = f"{seed}/{number}"
            operations = [random.choice(written.operations) for _ in range(PER_DOCUMENT)]
            group = [
                drawn(world, written, operation, random, viewer, f"{place}/{part}")
                for part, operation in enumerate(operations)
            ]
            for operation, done in zip(
                operations, await _compared(world, group, random), strict=True
            ):
                tally.add(done, operation)
                is_new = done.found and not done.is_by_order
                if is_new and tally.differences < most_found:
                    tally.found.append(await smallest(world, done))
        number += 1
        progress(tally)
    return tally


async def _compared(world: World, cases: list[Case], random: Random) -> list[Compared]:
    if random.random() < TOGETHER:
        data = cases[0].data
        return await compared_together(
            world, [replace(case, failures=None, spot=None, data=data) for case in cases]
        )
    return [await compared(world, case, random.random() < LIVE) for case in cases]


def drawn(
    world: World, written: Written, operation: Operation, random: Random, viewer: str, seed: str
) -> Case:
    """A case of a document."""
    variables = draw_variables(operation, world.values, random, random.random() < BROKEN)
    if not written.is_mutation:
        viewer = random.choice(list(world.viewers["healthy"]))
    is_damaged = not written.is_mutation and random.random() < DAMAGED
    failures = random.randrange(10**6) if random.random() < FAILING else None
    data = "damaged" if is_damaged else "healthy"
    spot = None
    if not is_damaged and failures is None and random.random() < SPOTTED:
        spot = draw_spot(random, operation.fields)
    return Case(written.text, operation.name, variables, viewer, data, failures, spot, seed)


async def smallest(world: World, done: Compared) -> Found:
    """The same kind of difference in the smallest case."""
    kinds = set(done.found)

    async def still_differs(case: Case) -> bool:
        try:
            world.document(case.document).operation(case.operation_name)
        except (InvalidDocument, HarborError):
            return False
        again = await compared(world, case)
        return not again.is_by_order and kinds <= set(again.found)

    case = await shrunk(done.case, still_differs)
    again = await compared(world, case)
    return Found(case, again.found or done.found, done.case)


def timer() -> Callable[[], float]:
    start = time.monotonic()
    return lambda: max(0.001, time.monotonic() - start)
