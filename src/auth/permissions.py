"""What a role may do: the one table."""

from typing import Final

from modelharbor.db.actors import Role
from modelharbor.db.tokens import Permission

P = Permission
PERMISSIONS: Final[dict[Role, frozenset[Permission]]] = {
    Role.VIEWER: frozenset({P.READ}),
    Role.DOWNLOADER: frozenset({P.READ, P.DOWNLOAD}),
    Role.CONTRIBUTOR: frozenset({P.READ, P.DOWNLOAD, P.WRITE}),
    Role.MAINTAINER: frozenset({P.READ, P.DOWNLOAD, P.WRITE, P.PUBLISH, P.PROMOTE}),
    Role.ADMIN: frozenset({P.READ, P.DOWNLOAD, P.WRITE, P.PUBLISH, P.PROMOTE, P.ADMINISTER}),
}
OPEN: Final = PERMISSIONS[Role.DOWNLOADER]
"""What everyone may do with a PUBLIC model, and everyone who is known with an INTERNAL one."""
