"""constraints.txt names a tested version, and nothing but that, of everything that is installed."""

import re
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
LINES = (ROOT / "constraints.txt").read_text().splitlines()
TESTED = {
    canonicalize_name(name): version
    for name, _, version in (line.partition("==") for line in LINES)
}


def declared() -> list[Requirement]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    return [
        Requirement(text)
        for text in [
            *project["project"]["dependencies"],
            *project["project"]["optional-dependencies"]["embedded"],
            *project["dependency-groups"]["dev"],
        ]
    ]


def test_lines_are_names_and_numbers_sorted() -> None:
    assert [
        line for line in LINES if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*", line)
    ] == []
    assert sorted(LINES, key=str.lower) == LINES
    assert len(TESTED) == len(LINES)


@pytest.mark.parametrize("requirement", declared(), ids=lambda requirement: requirement.name)
def test_each_dependency_has_a_tested_version_within_its_range(requirement: Requirement) -> None:
    assert requirement.specifier.contains(TESTED[canonicalize_name(requirement.name)])


def test_what_dependencies_need_is_there_too() -> None:
    missing: set[str] = set()
    pending, seen = [(r.name, frozenset(r.extras)) for r in declared()], set()
    while pending:
        name, extras = pending.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        if canonicalize_name(name) not in TESTED:
            missing.add(name)
            continue
        for text in distribution(name).requires or []:
            needed = Requirement(text)
            if needed.marker is None or any(
                needed.marker.evaluate({"extra": extra}) for extra in ["", *extras]
            ):
                pending.append((needed.name, frozenset(needed.extras)))
    assert missing == set()
