"""How people write which model, or which version of it: `owner/name`, `owner/name@alias`, `owner/name:12`."""

import re
from dataclasses import dataclass
from typing import Final

from modelharbor.errors import BadUserInput, Refused

from .names import valid_alias, valid_login, valid_model_name

NUMBER: Final = re.compile(r"[1-9][0-9]{0,8}")
SHAPE: Final = "A reference is `owner/name`, `owner/name@alias` or `owner/name:number`"


@dataclass(frozen=True, slots=True)
class Reference:
    """At most one of `alias` and `number`; neither, or the alias `latest`: the latest version."""

    owner: str
    name: str
    alias: str | None = None
    number: int | None = None


def parse_reference(text: str) -> Reference:
    """Raises BadUserInput, which says what is wrong."""
    if len(text) > 300:
        raise BadUserInput(f"{SHAPE}: this one has {len(text)} characters.")
    owner, slash, rest = text.partition("/")
    if not slash:
        raise BadUserInput(f"{SHAPE}: the `/` is missing.")
    name, at, alias = rest.partition("@")
    name, colon, number = (name, "", "") if at else rest.partition(":")
    if colon and not NUMBER.fullmatch(number):
        raise BadUserInput(f"{SHAPE}: a version's number counts from 1.")
    try:
        valid_login(owner)
        valid_model_name(name)
        if at and alias != "latest":
            valid_alias(alias)
    except Refused as refused:
        raise BadUserInput(f"{SHAPE}. {refused.message}") from None
    if alias == "latest":
        return Reference(owner, name)
    return Reference(owner, name, alias or None, int(number) if colon else None)
