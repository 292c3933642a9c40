"""`make faults`: the tests of faults in their long form, and the table of what they measured."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

from .figures import FILE, SIZE, table

WHERE: Final = ("tests/faults", "tests/histories", "tests/http/test_leaks.py")


def main() -> int:
    path = Path(os.environ.get(FILE) or ".modelharbor/faults.jsonl").absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *WHERE, "-q", *sys.argv[1:]],
        env={SIZE: "long", **os.environ, FILE: str(path)},
        check=False,
    )
    sys.stdout.write(f"\n{table(path)}\n\nFigures: {path}\n")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
