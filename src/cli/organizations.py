"""`org` and `member`."""

from typing import Annotated

import typer

from modelharbor.db.actors import Role
from modelharbor.resolvers.organizations import (
    create_organization,
    list_members,
    list_organizations,
    set_member,
)

from .running import AsJson, Limit, on_database, show, tell_if_cut

organization_commands = typer.Typer(help="Organizations.")
member_commands = typer.Typer(help="Who belongs to an organization, and as what.")
COLUMNS = {"login": "Login", "display_name": "Name", "created_at": "Created"}
MEMBER_COLUMNS = {"login": "Login", "role": "Role"}
Organization = Annotated[str, typer.Argument(metavar="ORG", help="Login of the organization.")]
User = Annotated[str, typer.Argument(metavar="USER", help="Login of the person.")]


@organization_commands.command()
def create(
    login: Annotated[str, typer.Argument(metavar="LOGIN", help="Unique name.")],
    admin: Annotated[str, typer.Option(metavar="USER", help="Who becomes its first ADMIN.")],
    name: Annotated[str | None, typer.Option(help="Name to show.")] = None,
) -> None:
    """Make an organization with its first ADMIN."""
    organization = on_database(
        lambda database: create_organization(
            database, login=login, admin_login=admin, display_name=name
        )
    )
    typer.echo(f"Made the organization {organization['login']}.")


@organization_commands.command("list")
def list_(limit: Limit = 1000, as_json: AsJson = False) -> None:
    """List organizations by login."""
    rows = on_database(lambda database: list_organizations(database, limit=limit))
    show(rows, COLUMNS, as_json=as_json)
    tell_if_cut(rows, limit)


@organization_commands.command("members")
@member_commands.command("list")
def members(organization: Organization, as_json: AsJson = False) -> None:
    """List the members of an organization with their roles."""
    rows = on_database(lambda database: list_members(database, organization_login=organization))
    show(rows, MEMBER_COLUMNS, as_json=as_json)


@member_commands.command()
def grant(
    organization: Organization,
    user: User,
    role: Annotated[
        Role, typer.Argument(case_sensitive=False, help="Each may more than the one before.")
    ],
) -> None:
    """Make a person a member, or give a member another role."""
    changed = _set(organization, user, role)
    typer.echo(f"{user} is {'now' if changed else 'already'} {role.value} of {organization}.")


@member_commands.command()
def revoke(organization: Organization, user: User) -> None:
    """Take a membership away. The last ADMIN stays."""
    changed = _set(organization, user, None)
    typer.echo(
        f"{user} is no longer a member of {organization}."
        if changed
        else f"{user} was no member of {organization}."
    )


def _set(organization: str, user: str, role: Role | None) -> bool:
    return on_database(
        lambda database: set_member(
            database, organization_login=organization, user_login=user, role=role
        )
    )
