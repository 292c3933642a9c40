"""All commands."""

import typer

from . import (
    database,
    doctor,
    imports,
    jobs,
    organizations,
    persisted,
    plan,
    purge,
    schema,
    server,
    tokens,
    users,
    worker,
)
from .elsewhere import add_remote
from .telling import Commands

app = typer.Typer(
    cls=Commands,
    help="A registry of AI models behind a GraphQL API.",
    pretty_exceptions_enable=False,  # its tracebacks show the values of variables: tokens among them
)
app.command("dev")(server.dev)
app.command("serve")(server.serve)
app.command("worker")(worker.worker)
app.command("purge")(purge.purge)
app.command("migrate")(database.migrate)
app.command("seed")(database.seed)
app.command("import")(imports.import_)
add_remote(app)
app.add_typer(users.commands, name="user")
app.add_typer(organizations.organization_commands, name="org")
app.add_typer(organizations.member_commands, name="member")
app.add_typer(tokens.commands, name="token")
app.add_typer(schema.commands, name="schema")
app.add_typer(persisted.commands, name="persisted")
app.add_typer(jobs.commands, name="jobs")
app.command("reindex")(jobs.reindex)
app.command("collect-garbage")(jobs.collect_garbage)
app.command("verify-blobs")(jobs.verify_blobs)
app.add_typer(jobs.analytics, name="analytics")
app.command("plan")(plan.plan)
app.command("doctor")(doctor.doctor)
