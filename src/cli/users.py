"""`user`."""

from typing import Annotated

import typer

from modelharbor.resolvers.users import create_user, list_users, set_operator

from .running import AsJson, Limit, on_database, show, tell_if_cut

commands = typer.Typer(help="People.")
COLUMNS = {
    "login": "Login",
    "display_name": "Name",
    "is_operator": "Operator",
    "created_at": "Created",
}
Login = Annotated[str, typer.Argument(metavar="LOGIN", help="Unique name.")]
Operator = Annotated[
    bool,
    typer.Option("--operator", help="The right to operate the whole site.", show_default=False),
]


@commands.command()
def create(
    login: Login,
    name: Annotated[str | None, typer.Option(help="Name to show.")] = None,
    operator: Operator = False,
) -> None:
    """Make a person."""
    user = on_database(
        lambda database: create_user(database, login=login, display_name=name, is_operator=operator)
    )
    typer.echo(f"Made the user {user['login']}.")


@commands.command("list")
def list_(limit: Limit = 1000, as_json: AsJson = False) -> None:
    """List people by login."""
    rows = on_database(lambda database: list_users(database, limit=limit))
    show(rows, COLUMNS, as_json=as_json)
    tell_if_cut(rows, limit)


@commands.command()
def grant(login: Login, operator: Operator = False) -> None:
    """Give a person a right over the whole site."""
    _set_operator(login, asked=operator, is_operator=True)


@commands.command()
def revoke(login: Login, operator: Operator = False) -> None:
    """Take such a right away."""
    _set_operator(login, asked=operator, is_operator=False)


def _set_operator(login: str, *, asked: bool, is_operator: bool) -> None:
    if not asked:
        raise typer.BadParameter("say which right: --operator.")
    user = on_database(
        lambda database: set_operator(database, login=login, is_operator=is_operator)
    )
    typer.echo(f"{user['login']} is {'now' if is_operator else 'no longer'} an operator.")
