"""Tags: what an answer was made of, and what a change concerns. Where both have one, the answer is old.

`models/65f…`                 one document
`files?version_id=65f…`       the documents below one parent
`models.summary`              that name of any document, by an update
`models.summary@task:ocr`     the same of documents that have this value (after the update)
`models+@principal:public`    a document that is new in a list
`models-`                     a document that is gone, or changed in a way that is not told
"""

from typing import Final, TypeAlias

from modelharbor.db.models import ModelDocument

Tag: TypeAlias = str

PARENTS: Final = {
    "versions": ("model_id",),
    "files": ("version_id",),
    "memberships": ("organization_id", "user_id"),
    "tokens": ("user_id",),
}
"""Stored names by which documents are listed below a parent: any change of one concerns that list."""
WITHIN: Final = ("task", "library", "license", "owner_login_lower")
"""Stored names of models, beside `principals`, by whose value lists are told apart."""
assert set(WITHIN) <= set(ModelDocument.model_fields)


def entity(collection: str, key: object) -> Tag:
    """One document, by its `_id` (blobs: by `sha256`)."""
    return f"{collection}/{key}"


def below(collection: str, name: str, value: object) -> Tag:
    """All documents whose `name`, one of PARENTS, has this value."""
    return f"{collection}?{name}={value}"


def changed(collection: str, name: str, within: str | None = None) -> Tag:
    """An update of `name`, of any document or of those `within` a value."""
    return f"{collection}.{name}" if within is None else f"{collection}.{name}@{within}"


def added(collection: str, within: str) -> Tag:
    """An insert of a document within a value."""
    return f"{collection}+@{within}"


def gone(collection: str) -> Tag:
    return f"{collection}-"


def of_principal(principal: str) -> str:
    """For `within`."""
    return f"principal:{principal}"


def of_value(name: str, value: object) -> str:
    """For `within`; `name` is one of WITHIN."""
    return f"{name}:{value}"
