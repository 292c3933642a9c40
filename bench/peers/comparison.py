"""Answers are compared before anything is timed: what is not the same is not measured side by side."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from bench.operation import Operation, WrongAnswer

SHOWN: Final = 200  # characters of a value in a message


def first_difference(expected: Any, found: Any, path: str = "") -> str | None:
    """Path of the first place that differs, such as `data.models.nodes[3].id`; None where none does.

    Objects are compared by their keys, whatever their order, numbers by their value.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in [*expected, *(key for key in found if key not in expected)]:
            at = f"{path}.{key}" if path else key
            if key not in expected or key not in found:
                return at
            inner = first_difference(expected[key], found[key], at)
            if inner is not None:
                return inner
        return None
    if isinstance(expected, list) and isinstance(found, list):
        for index, (one, other) in enumerate(zip(expected, found, strict=False)):
            inner = first_difference(one, other, f"{path}[{index}]")
            if inner is not None:
                return inner
        return f"{path}[{min(len(expected), len(found))}]" if len(expected) != len(found) else None
    same = isinstance(expected, bool) is isinstance(found, bool) and expected == found
    return None if same else path or "."


def value_at(answer: Any, path: str) -> Any:
    """What stands at a path of `first_difference`; None where there is nothing."""
    for part in path.replace("]", "").replace("[", ".").split("."):
        try:
            answer = answer[int(part)] if isinstance(answer, list) else answer[part]
        except (KeyError, IndexError, TypeError):
            return None
    return answer


def check_same(
    operation: Operation, variables: Mapping[str, Any], answers: Mapping[str, Any]
) -> None:
    """Raise WrongAnswer unless all servers, by name, give the answer of the first, and it is whole."""
    (reference, expected), *others = answers.items()
    operation.check(expected)
    for server, found in others:
        path = first_difference(expected, found)
        if path is not None:
            raise WrongAnswer(
                f"{server} answers {operation.name} with {json.dumps(variables)} otherwise than "
                f"{reference}, first at {path}: {_shown(value_at(found, path))}, "
                f"not {_shown(value_at(expected, path))}"
            )


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def leaves(value: Any) -> int:
    """Scalars and nulls in an answer."""
    if isinstance(value, Mapping):
        return sum(leaves(each) for each in value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return sum(leaves(each) for each in value)
    return 1
