"""What caches between us and a client may do with an answer: keep it how long, for whom, under which
names it is purged. Pure functions: they are called for each answer.

Only a GET of an operation that is named by hash or id is for caches; all else is `private, no-store`.
"""

import re
import time
from base64 import urlsafe_b64encode
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final, TypeAlias

from starlette.types import Scope

from modelharbor.cache.entries import Access, Entry
from modelharbor.cache.tags import Tag
from modelharbor.errors import PayloadTooLarge

Header: TypeAlias = tuple[bytes, bytes]
Sent: TypeAlias = tuple[int, list[Header], bytes]
"""Status, headers, body."""

ADDRESS_BYTES: Final = 32 * 1024  # of path and query: below what is taken for the head of a request
EVERY: Final = "modelharbor"
"""The key that all have."""
KEYS_BYTES: Final = 8000  # of `Surrogate-Key`; Varnish takes 8 KiB for a header with its name
CREDENTIALS: Final = frozenset(
    {
        b"authorization",
        b"cookie",
        b"proxy-authorization",
        # How proxies in front tell of a client's certificate: RFC 9440, Envoy, nginx, Apache, AWS.
        b"client-cert",
        b"client-cert-chain",
        b"x-forwarded-client-cert",
        b"x-client-cert",
        b"x-ssl-client-cert",
        b"ssl-client-cert",
        b"x-ssl-cert",
        b"x-amzn-mtls-clientcert",
    }
)
"""Headers by which a request says who it is from. Only `Authorization` is read, but who sends another
means an answer for one person."""
CODINGS: Final = ("zstd", "br", "gzip")
"""Of contents, the one that is liked most first: the order of the compression."""
UNKEPT: Final = (b"cache-control", b"private, no-store")
_TAGS: Final = re.compile(r'(?:W/)?"([\x21\x23-\x7e]*)"')
_COLLECTION: Final = re.compile(r"\w+")


class AddressTooLong(PayloadTooLarge):
    status = 414


@dataclass(frozen=True, slots=True)
class Named:
    """A GET of an operation that is named by hash or id."""

    bears_credentials: bool
    known: str | None
    """`If-None-Match`."""
    accepts: str
    """`Accept-Encoding`."""

    @classmethod
    def of(cls, headers: Mapping[bytes, bytes]) -> "Named":
        """By names in lower case."""
        known = headers.get(b"if-none-match")
        return cls(
            not CREDENTIALS.isdisjoint(headers),
            None if known is None else known.decode("latin-1"),
            headers.get(b"accept-encoding", b"").decode("latin-1"),
        )


@dataclass(frozen=True, slots=True)
class Form:
    """What is told of an entry by headers; made once for each, for it takes longer than a hit may."""

    digest: str
    keys: bytes
    """`Surrogate-Key`; empty: it is not sent."""


def form_of(entry: Entry, *, with_keys: bool) -> Form:
    keys = surrogate_keys(entry.tags) if with_keys and is_public(entry) else b""
    return Form(digest_of(entry.body, keys), keys)


def is_public(entry: Entry) -> bool:
    """Whether it is for everybody, where the request bore no credentials: it was then read with the
    rights of nobody."""
    return entry.access is not Access.VIEWER and not entry.is_private


def digest_of(body: bytes, keys: bytes = b"") -> str:
    """With the keys: who asks whether the body is the same has to learn of other keys, too."""
    made = blake2b(body, digest_size=16)
    made.update(keys)
    return made.hexdigest()


def vary_of(method: str, *, with_origins: bool) -> bytes:
    """On what an answer depends, also one that is an error. Compression adds `Accept-Encoding` itself,
    where it came into question."""
    if method == "GET":
        found = b"Authorization, Accept, Accept-Encoding"
        return found + b", Origin" if with_origins else found
    return b"Accept"


def sent(
    status: int,
    media: bytes,
    body: bytes,
    vary: bytes,
    *,
    named: Named | None = None,
    entry: Entry | None = None,
    form: Form | None = None,
    has_errors: bool = False,
    layer: bytes | None = None,
) -> Sent:
    """`entry`: what `body` comes from; `form`: of it. `layer`: for `X-Cache`. A body that tells more than
    the entry, such as what it cost, is this request's alone."""
    if entry is not None and entry.body != body:
        entry = form = None
    if named is None or has_errors or status != 200:
        headers = [
            (b"content-type", media),
            (b"content-length", b"%d" % len(body)),
            UNKEPT,
            (b"vary", vary),
        ]
        if layer is not None:
            headers.append((b"x-cache", layer))
        return status, headers, body
    digest = digest_of(body) if form is None else form.digest
    control, is_kept = UNKEPT, False
    if entry is not None and not named.bears_credentials and is_public(entry):
        left = seconds_left(entry, time.time())
        if left > 0:
            control, is_kept = (b"cache-control", _public(left, int(entry.stale))), True
    headers = [control, (b"vary", vary)]
    if is_kept and form is not None and form.keys:
        headers.append((b"surrogate-key", form.keys))
    if layer is not None:
        headers.append((b"x-cache", layer))
    known = None if named.known is None else matching(named.known, digest, named.accepts)
    if known is not None:
        headers.append((b"etag", known.encode()))
        return 304, headers, b""
    headers += (
        (b"etag", b'"%s"' % digest.encode()),
        (b"content-type", media),
        (b"content-length", b"%d" % len(body)),
    )
    return 200, headers, body


def seconds_left(entry: Entry, now: float) -> int:
    """Of its life: what is told instead of `max-age` and `Age`. Clocks of processes differ a little."""
    return int(min(entry.max_age, entry.made_at + entry.max_age - now))


@lru_cache(maxsize=1024)
def _public(left: int, stale: int) -> bytes:
    found = f"public, max-age={left}"
    return (f"{found}, stale-while-revalidate={stale}" if stale else found).encode()


def matching(known: str, digest: str, accepts: str) -> str | None:
    """The tag among those of `If-None-Match` that the client has a right answer with; None: it has none.

    Each content coding has a tag of its own (RFC 9110, 8.8.3.3). One that the client does not take now
    is no match: a cache would hand on what it keeps under that tag.
    """
    if f'"{digest}"' == known:
        return known
    found = _TAGS.findall(known)
    for coding in codings(accepts):
        if f"{digest}-{coding}" in found:
            return f'"{digest}-{coding}"'
    return f'"{digest}"' if digest in found or known.strip() == "*" else None


def tag_with(tag: bytes, coding: bytes) -> bytes:
    """The strong tag of the same contents in a content coding."""
    if tag.startswith(b"W/") or tag.endswith(b'-%s"' % coding):
        return tag
    return b'%s-%s"' % (tag[:-1], coding)


@lru_cache(maxsize=128)
def codings(accepts: str) -> tuple[str, ...]:
    """Those of CODINGS that an `Accept-Encoding` takes, in our order."""
    qualities: dict[str, bool] = {}
    for part in accepts.split(","):
        name, *options = (each.strip().lower() for each in part.split(";"))
        qualities[name] = all(_is_above_zero(option) for option in options)
    others = qualities.get("*", False)
    return tuple(coding for coding in CODINGS if qualities.get(coding, others))


def _is_above_zero(option: str) -> bool:
    name, _, value = option.partition("=")
    try:
        return name.strip() != "q" or float(value) > 0
    except ValueError:
        return False


@lru_cache(maxsize=128)
def distinct(vary: bytes) -> bytes:
    """Each name once, as it was first written."""
    found: dict[bytes, bytes] = {}
    for name in vary.split(b","):
        found.setdefault(name.strip().lower(), name.strip())
    found.pop(b"", None)
    return b"*" if b"*" in found else b", ".join(found.values())


def uncompressed(headers: Iterable[Header]) -> list[Header]:
    """As they leave where nothing can be compressed: with one `Vary`."""
    found, vary = [], b""
    for header in headers:
        if header[0] == b"vary":
            vary += header[1] + b", "
        else:
            found.append(header)
    found.append((b"vary", distinct(vary + b"Accept-Encoding")))
    return found


def compressed(headers: Iterable[Header]) -> list[Header]:
    """As they leave the compression: with one `Vary`, and the tag of what was compressed."""
    found: list[Header] = []
    vary, tag, coding = -1, -1, b""
    for header in headers:
        name, value = header
        if name == b"vary":
            if vary >= 0:
                found[vary] = (name, b"%s, %s" % (found[vary][1], value))
                continue
            vary = len(found)
        elif name == b"etag":
            tag = len(found)
        elif name == b"content-encoding":
            coding = value
        found.append(header)
    if vary >= 0:
        found[vary] = (b"vary", distinct(found[vary][1]))
    if tag >= 0 and coding:
        found[tag] = (b"etag", tag_with(found[tag][1], coding))
    return found


def surrogate_keys(tags: Collection[Tag]) -> bytes:
    """EVERY, and one for each tag. Past KEYS_BYTES those of one collection become one, of the largest
    first."""
    keys = {surrogate_key(tag) for tag in tags}
    most = (KEYS_BYTES - len(EVERY)) // (_KEY_LENGTH + 1)
    if len(keys) > most:
        groups: dict[Tag, set[str]] = {}
        for tag in tags:
            groups.setdefault(_collection(tag), set()).add(surrogate_key(tag))
        for collection in sorted(groups, key=lambda name: (-len(groups[name]), name)):
            keys = keys - groups[collection] | {surrogate_key(collection)}
            if len(keys) <= most:
                break
    return " ".join((EVERY, *sorted(keys))).encode()


def purged_by(tags: Iterable[Tag]) -> set[str]:
    """The keys under which lies what a change of these tags made old."""
    found: set[str] = set()
    for tag in tags:
        found |= {surrogate_key(tag), surrogate_key(_collection(tag))}
    return found


_KEY_LENGTH: Final = 8


def surrogate_key(tag: Tag) -> str:
    """Short, and always the same: 48 bits. Two tags with one key purge each other, no more."""
    return urlsafe_b64encode(blake2b(tag.encode(), digest_size=6).digest()).decode()


def _collection(tag: Tag) -> Tag:
    found = _COLLECTION.match(tag)
    return found[0] if found else tag


def check_address(scope: Scope) -> None:
    """AddressTooLong. Proxies end at 8 KiB to 64 KiB; by POST an operation may be longer."""
    size = len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > ADDRESS_BYTES:
        raise AddressTooLong(
            f"The address has {size} bytes; the limit is {ADDRESS_BYTES}: send the operation by POST."
        )
