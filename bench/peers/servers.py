"""The servers that are measured side by side: how each is started, and what is particular to it."""

import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from bench.serving import COMPUTED
from modelharbor.dev.engines import EngineError

NODE_FOLDER: Final = Path(__file__).parent / "node"
OURS: Final = "ours"
UNCOALESCED: Final = "ours-uncoalesced"
UNCOMPILED: Final = "ours-uncompiled"
HANDWRITTEN: Final = "handwritten"
NODE: Final = ("apollo", "yoga")
MLFLOW: Final = "mlflow"
OPERATIONS: Final = ("model", "page", "filtered", "series", "search")
OF_MLFLOW: Final = ("model", "page", "filtered")  # it has no series and no search by words

Command = Callable[[Path, int], list[str]]
"""Folder of the data and port to the words of the command; the first is the program."""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    title: str
    command: Command
    variables: dict[str, str] = field(default_factory=dict)
    """Of the environment, beside those that say where the engines are."""
    ready: str = "/readyz"
    """Path that it answers when it has started."""
    operations: tuple[str, ...] = OPERATIONS

    @property
    def speaks_graphql(self) -> bool:
        """Whether it takes the documents, and answers as we do."""
        return self.name != MLFLOW


def _module(name: str) -> Command:
    return lambda folder, port: [sys.executable, "-m", f"bench.peers.{name}", "--port", str(port)]


def _script(name: str) -> Command:
    return lambda folder, port: [node(), str(NODE_FOLDER / f"{name}.js"), str(port)]


def node() -> str:
    found = shutil.which("node")
    if found is None:
        raise EngineError("no node found: install Node 20.19 or newer")
    return str(Path(found).resolve())


def mlflow_store(folder: Path) -> Path:
    """The SQLite file of MLflow."""
    return folder / "mlflow.db"


def _mlflow(folder: Path, port: int) -> list[str]:
    return [
        str(folder / "mlflow" / "bin" / "python"),
        *("-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{mlflow_store(folder)}"),
        *("--artifacts-destination", str(folder / "mlflow-artifacts")),
        *("--uvicorn-opts", "--log-level warning --no-access-log"),
    ]


PRODUCTION: Final = {"NODE_ENV": "production"}
SERVERS: Final = (
    Server(OURS, "modelharbor", _module("harbor"), COMPUTED),
    Server(
        UNCOALESCED,
        "modelharbor, without coalescing",
        _module("harbor"),
        COMPUTED | {"MODELHARBOR_COALESCING": "false"},
    ),
    Server(
        UNCOMPILED,
        "modelharbor, without compiled plans",
        _module("harbor"),
        COMPUTED | {"MODELHARBOR_COMPILED_PLANS": "false"},
    ),
    Server(HANDWRITTEN, "Handwritten, no GraphQL", _module("handwritten")),
    Server("apollo", "Apollo Server", _script("apollo"), PRODUCTION),
    Server("yoga", "GraphQL Yoga, graphql-jit", _script("yoga"), PRODUCTION),
    Server(
        MLFLOW,
        "MLflow, REST",
        _mlflow,
        # Its background jobs have nothing to do here, and would look for work all the time.
        {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        "/health",
        OF_MLFLOW,
    ),
)
