"""The audits of graphql-http: what GraphQL over HTTP asks of a server, against a real one."""

import json
import subprocess

from modelharbor.settings import Settings
from tests.conformance.driving import HERE, install
from tests.http.processes import served

AUDITS = 61  # of graphql-http 1.23


def test_every_audit_passes(settings: Settings) -> None:
    install()
    with served(settings) as url:
        told = subprocess.run(
            ["node", "audit.js", f"{url}/graphql"],
            cwd=HERE,
            check=True,
            timeout=120,
            capture_output=True,
            text=True,
        )
    results = json.loads(told.stdout)
    assert [result for result in results if result["status"] != "ok"] == []
    assert len(results) == AUDITS
