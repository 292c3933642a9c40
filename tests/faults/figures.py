"""What the tests of faults measured: a line of JSON each, and a table for people."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

SIZE: Final = "FAULTS"  # environment: `long` for the numbers of the report
FILE: Final = "FAULTS_FIGURES"  # environment: where the lines are appended; unset: nowhere

Record = Callable[..., None]


def is_long() -> bool:
    return os.environ.get(SIZE) == "long"


def record(fault: str, goals: Mapping[str, Any], **figures: Any) -> None:
    """`goals` in words, by the names of the figures."""
    path = os.environ.get(FILE)
    if path:
        line = {"fault": fault, "long": is_long(), "figures": figures, "goals": dict(goals)}
        with Path(path).open("a") as file:
            file.write(json.dumps(line, default=str) + "\n")


def table(path: Path) -> str:
    rows = [("fault", "figure", "measured", "goal")]
    for text in path.read_text().splitlines():
        line = json.loads(text)
        for number, (name, value) in enumerate(line["figures"].items()):
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            fault = line["fault"] if number == 0 else ""
            rows.append((fault, name.replace("_", " "), shown, str(line["goals"].get(name, ""))))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
