"""The command line."""

import sys
from typing import Final

REMOTE: Final = frozenset({"push", "pull", "export", "login", "logout"})


def main() -> None:
    """Those that need the client alone do not wait until all of the server is imported."""
    if sys.argv[1:2] and sys.argv[1] in REMOTE:
        from .elsewhere import app
    else:
        from .commands import app
    app()
