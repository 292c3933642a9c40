"""`doctor`."""

import asyncio

import typer
from rich.table import Table
from rich.text import Text

from modelharbor.http.console import BUILT
from modelharbor.resolvers.doctor import Status, examine

from .running import AsJson, print_table, read_settings, show_json

STYLES = {Status.OK: "green", Status.WARN: "yellow", Status.FAIL: "bold red"}


def doctor(as_json: AsJson = False) -> None:
    """Check engines, indexes and storage, and say what to do. Exit code 1 if something fails."""
    findings = asyncio.run(examine(read_settings(), BUILT))
    if as_json:
        show_json(
            [
                {
                    "name": finding.name,
                    "status": finding.status.value,
                    "detail": finding.detail,
                    "remedy": finding.remedy,
                }
                for finding in findings
            ]
        )
    else:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding in findings:
            status = Text(finding.status.value, STYLES[finding.status])
            table.add_row(status, finding.name, Text(finding.detail))
            if finding.remedy is not None:
                table.add_row("", "", Text(finding.remedy))
        print_table(table)
    if any(finding.status is Status.FAIL for finding in findings):
        raise typer.Exit(1)
