"""Who pays for a request, how much, and how that is told."""

from functools import lru_cache
from ipaddress import IPv6Address, ip_address, ip_network
from math import ceil
from typing import Any, Final, NamedTuple

from starlette.types import Scope

from modelharbor.auth.viewer import Viewer
from modelharbor.cache.budgets import Budget, Charge, Kind

BAD_TOKEN: Final = 10
"""What a token that is not valid costs: it is looked for in the database."""
BAD_DOCUMENT: Final = 100
"""What a document costs that is refused, or an operation with its variables: it was parsed, measured and
validated for nothing, which can take as long as a page of 20 models with owners, versions and files (141)."""
LEAST: Final = 1
"""What the cheapest operation costs, an answer that is kept, and a dry run."""
LONGEST_ADDRESS: Final = 64


class Principal(NamedTuple):
    """Who pays."""

    name: str
    kind: Kind


def principal_of(scope: Scope, viewer: Viewer | None) -> Principal:
    """`viewer`: who holds the token of the request, as far as that is known before it is read; None: not
    at all. Then its address pays."""
    if viewer is not None and viewer.token_id is not None:
        kind = Kind.OPERATOR if viewer.operates else Kind.TOKEN
        return Principal(f"token:{viewer.token_id}", kind)
    client = scope.get("client")
    return _address("" if client is None else client[0])


@lru_cache(maxsize=4096)
def _address(host: str) -> Principal:
    """One IPv4 address, or the 2^64 of IPv6 that a customer of any provider has to himself."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:  # a socket of the system; or a name, from the server's own proxy
        return Principal(f"address:{host[:LONGEST_ADDRESS]}", Kind.ANONYMOUS)
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is None:
            network = ip_network((address, 64), strict=False)
            return Principal(f"address:{network}", Kind.ANONYMOUS)
        address = address.ipv4_mapped
    return Principal(f"address:{address}", Kind.ANONYMOUS)


def price(requested: int, own: int | None, *, is_dry_run: bool) -> int:
    """What an operation is charged before it runs; `own`: the price of a trusted document, which may be 0."""
    if is_dry_run:
        return LEAST
    return max(requested, LEAST) if own is None else own


def headers(charge: Charge | None) -> list[tuple[bytes, bytes]]:
    """As in https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/ (11), and
    `Retry-After` where the charge was refused; none for who has no limit."""
    if charge is None or charge.budget is None:
        return []
    budget = charge.budget
    name, policy = _policy(budget)
    left = charge.remaining
    if charge.allowed:
        # In so many seconds this much comes back: who spends it evenly is never refused.
        window = max(1, -(-left // budget.rate))
        return [(b"ratelimit-policy", policy), (b"ratelimit", name % (left, window))]
    window = max(1, ceil(charge.retry_after))
    return [
        (b"ratelimit-policy", policy),
        (b"ratelimit", name % (left, window)),
        (b"retry-after", b"%d" % window),
    ]


@lru_cache(maxsize=64)
def _policy(budget: Budget) -> tuple[bytes, bytes]:
    """The format of `RateLimit`, and `RateLimit-Policy`. The unit is not one of the registered ones:
    without it `q` would be a number of requests."""
    name = budget.kind.value.encode()
    seconds = max(1, ceil(budget.limit / budget.rate))
    return b'"%b";r=%%d;t=%%d' % name, b'"%b";q=%d;qu="cost";w=%d' % (name, budget.limit, seconds)


def throttle_status(charge: Charge) -> dict[str, Any] | None:
    """For `extensions.cost`; None for who has no limit."""
    if charge.budget is None:
        return None
    return {
        "maximumAvailable": charge.limit,
        "currentlyAvailable": charge.remaining,
        "restoreRate": charge.restore_rate,
    }
