"""Two small data sets, written as raw rows: a healthy one, and the same with damage that no resolver would leave.

Ids, logins, names and paths are the same in every run, so a case of the corpus finds them again.
"""

from copy import deepcopy
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final

from bson import Int64, ObjectId

from modelharbor.auth.viewer import ANONYMOUS, Viewer, job_principals, model_principals
from modelharbor.db.actors import Role
from modelharbor.db.base import Row
from modelharbor.db.tokens import Permission

START: Final = datetime(2026, 1, 1, tzinfo=UTC)
HASHES: Final = [f"{number:064x}" for number in range(1, 9)]
USERS: Final = ("ada", "bob", "cyd", "dan", "eve", "zoe")
ORGANIZATIONS: Final = ("acme", "borg", "corp")
WORDS: Final = ("whale", "tiny", "blue", "vision", "Text", "large", "été")
PATHS: Final = (
    "config.json",
    "weights/model.safetensors",
    "weights/part-2.bin",
    "README.md",
    "a b.txt",
)
TAGS: Final = ("nlp", "vision", "tiny", "blue")
MODELS: Final = 16
JOBS: Final = 12
UPLOADS: Final = 18
KINDS: Final = (
    "actors",
    "memberships",
    "models",
    "versions",
    "files",
    "tokens",
    "likes",
    "jobs",
    "uploads",
    "blobs",
)

Collections = dict[str, list[Row]]


def object_id(collection: str, number: int) -> ObjectId:
    """The same in every run."""
    return ObjectId(f"65{KINDS.index(collection):06x}{number:016x}")


def healthy() -> Collections:
    """Rows as the resolvers would leave them, with every state, visibility and absence that they allow."""
    made = _Maker(Random("healthy"))
    made.people()
    for number in range(MODELS):
        made.model(number)
    for number in range(JOBS):
        made.job(number)
    for number in range(UPLOADS):
        made.upload(number)
    made.quotas()
    made.blobs()
    return made.rows


class _Maker:
    def __init__(self, random: Random) -> None:
        self.random = random
        self.rows: Collections = {name: [] for name in (*KINDS, "cards", "job_logs", "quotas")}

    def maybe(self, value: Any, share: float = 0.6) -> Any:
        return value if self.random.random() < share else None

    def actor(self, login: str) -> ObjectId:
        return object_id("actors", (*USERS, *ORGANIZATIONS).index(login))

    def people(self) -> None:
        for login in (*USERS, *ORGANIZATIONS):
            self.rows["actors"].append(
                {
                    "_id": self.actor(login),
                    "kind": "User" if login in USERS else "Organization",
                    "login": login.title() if login == "zoe" else login,
                    "login_lower": login,
                    "display_name": self.maybe(f"{login.title()} Whale"),
                    "avatar_url": self.maybe(f"https://pictures.test/{login}.png"),
                    "is_operator": login == "cyd",
                    "turn": 0,
                    "created_at": START,
                }
            )
        roles = [
            ("acme", "ada", "ADMIN"),
            ("acme", "bob", "VIEWER"),
            ("acme", "dan", "MAINTAINER"),
            ("borg", "bob", "CONTRIBUTOR"),
            ("borg", "ada", "DOWNLOADER"),
            ("corp", "eve", "ADMIN"),
            ("corp", "dan", "VIEWER"),
        ]
        for number, (organization, user, role) in enumerate(roles):
            self.rows["memberships"].append(
                {
                    "_id": object_id("memberships", number),
                    "organization_id": self.actor(organization),
                    "user_id": self.actor(user),
                    "role": role,
                    "created_at": START,
                }
            )
        for number in range(9):
            login = USERS[number % 4]
            self.rows["tokens"].append(
                {
                    "_id": object_id("tokens", number),
                    "user_id": self.actor(login),
                    "name": f"token {number}",
                    "prefix": f"mh_{number}",
                    "secret_sha256": f"{number:064x}",
                    "scopes": ["READ", "DOWNLOAD", "WRITE"][: 1 + number % 3],
                    "created_at": START + timedelta(hours=number),
                    "last_used_at": self.maybe(START + timedelta(days=1)),
                    "expires_at": self.maybe(START + timedelta(days=900)),
                    "revoked_at": START if number == 5 else None,
                }
            )

    def model(self, number: int) -> None:
        random = self.random
        owner = ("acme", "ada", "borg", "bob", "acme", "corp", "eve", "acme")[number % 8]
        _id = object_id("models", number)
        name = f"{WORDS[number % 5]}-{number}"
        state = {5: "ARCHIVED", 11: "ARCHIVED", 13: "DELETED"}.get(number, "ACTIVE")
        visibility = ("PUBLIC", "PRIVATE", "PUBLIC", "INTERNAL", "PUBLIC")[number % 5]
        grants = [{"actor_id": self.actor("eve"), "role": "DOWNLOADER"}] if number % 4 == 1 else []
        if number == 6:
            grants.append({"actor_id": self.actor("corp"), "role": "ADMIN"})
        versions = self.versions(number, _id)
        there = [row for row in versions if row["status"] != "DELETED"]
        ready = [row for row in versions if row["status"] == "READY"]
        created = START + timedelta(days=number % 3, hours=number)
        row: Row = {
            "_id": _id,
            "owner_id": self.actor(owner),
            "owner_login": owner,
            "owner_login_lower": owner,
            "owner_kind": "User" if owner in USERS else "Organization",
            "name": name,
            "name_lower": name.lower() if state != "DELETED" else f"{name.lower()}#{_id}",
            "display_name": self.maybe(f"The {name}"),
            "summary": self.maybe(f"A {random.choice(WORDS)} <whale> & more", 0.8),
            "task": self.maybe(random.choice(("text-generation", "image"))),
            "library": self.maybe("transformers"),
            "license": self.maybe(random.choice(("mit", "apache-2.0"))),
            "languages": random.sample(("en", "de", "fr"), random.randrange(3)),
            "tags": random.sample(TAGS, random.randrange(4)),
            "formats": ["SAFETENSORS", "JSON"][: random.randrange(3)],
            "parameters": (0, 1000, Int64(2**33))[number % 3],
            "properties": random.choice(
                ({}, {"size": number}, {"size": "big", "nested": {"a": [1, None, {"b": 0.5}]}})
            ),
            "visibility": visibility,
            "state": state,
            "grants": grants,
            "revision": 1 + number % 3,
            "last_number": len(versions),
            "latest_version_id": ready[-1]["_id"] if ready else None,
            "aliases": [
                {
                    "name": alias,
                    "version_id": random.choice(there)["_id"],
                    "protected": random.random() < 0.5,
                    "set_by_id": self.maybe(self.actor(random.choice(USERS))),
                    "set_at": created,
                }
                for alias in random.sample(("prod", "beta", "stable"), random.randrange(3))
                if there
            ],
            "stats": {
                "downloads_30d": random.randrange(50),
                "downloads_all": random.choice((7, 2**40, 2**53 + 1)),
                "likes": number % 3,
                "versions": sum(row["status"] != "DELETED" for row in versions),
                "files": sum(row["file_count"] for row in versions),
                "size_bytes": sum(row["size_bytes"] for row in versions),
                "stored_bytes": 100 * number,
                "trending_score": round(random.random() * 3, 2),
                "as_of": created,
            },
            "created_at": created,
            "updated_at": created + timedelta(minutes=number % 4, milliseconds=number),
            "deleted_at": START if state == "DELETED" else None,
        }
        row["principals"] = model_principals(row)
        self.rows["models"].append(row)
        if random.random() < 0.7:
            metadata = random.choice(({}, {"tags": ["x", 1], "at": START}))
            self.rows["cards"].append(
                {
                    "_id": _id,
                    "markdown": f"# {name}",
                    "metadata": metadata,
                    "html": f"<h1>{name}</h1>",
                }
            )
        for login in USERS:
            if likes(login, number):
                self.rows["likes"].append(
                    {
                        "_id": object_id("likes", len(self.rows["likes"])),
                        "user_id": self.actor(login),
                        "model_id": _id,
                        "created_at": START,
                    }
                )

    def versions(self, model: int, model_id: ObjectId) -> list[Row]:
        made = []
        for number in range(1, 1 + model % 5):
            count = len(self.rows["versions"])
            status = (
                "READY", "READY", "DRAFT", "ARCHIVED", "DELETED", "READY", "PROCESSING", "QUARANTINED", "FAILED", "UPLOADING",
            )[count % 10]  # fmt: skip
            _id = object_id("versions", count)
            files = self.files(_id, model_id, self.random.randrange(len(PATHS)))
            row: Row = {
                "_id": _id,
                "model_id": model_id,
                "number": number,
                "label": self.maybe(f"v{number}"),
                "description": self.maybe("New"),
                "status": status,
                "status_reason": "No" if status in ("QUARANTINED", "FAILED") else None,
                "parameters": (None, 1000, Int64(2**40))[count % 3],
                "tags": self.random.sample(TAGS, self.random.randrange(3)),
                "properties": self.random.choice(({}, {"size": number}, {"accuracy": 0.25})),
                "digest": HASHES[number] if status in ("READY", "ARCHIVED") else None,
                "size_bytes": sum(row["size_bytes"] for row in files),
                "file_count": len(files),
                "created_by_id": self.maybe(self.actor(self.random.choice(USERS)), 0.8),
                "created_at": START + timedelta(hours=number // 2),
                "published_at": START + timedelta(hours=9) if status == "READY" else None,
                "revision": 1,
            }
            made.append(row)
            self.rows["versions"].append(row)
        return made

    def files(self, version_id: ObjectId, model_id: ObjectId, count: int) -> list[Row]:
        made = [
            {
                "_id": object_id("files", len(self.rows["files"]) + index),
                "version_id": version_id,
                "model_id": model_id,
                "path": path,
                "size_bytes": self.random.choice((0, 17, 2**41)),
                "sha256": self.random.choice(HASHES),
                "role": self.random.choice(("WEIGHTS", "CONFIG", "OTHER")),
                "format": self.random.choice(("SAFETENSORS", "JSON", "OTHER")),
            }
            for index, path in enumerate(PATHS[:count])
        ]
        self.rows["files"].extend(made)
        return made

    def job(self, number: int) -> None:
        states = ("QUEUED", "RUNNING", "SUCCEEDED", "FAILED", "RETRYING", "DEAD", "CANCELLING")
        state, random = states[number % 7], Random(f"job {number}")
        creator = self.actor(USERS[number % 4]) if number % 5 else None
        model = self.rows["models"][number]
        subjects = (
            {"type": "Model", "id": model["_id"]},
            {"type": "ModelVersion", "id": object_id("versions", number)},
            None,
        )
        at = START + timedelta(minutes=number)
        total = random.choice((None, 0, 10, 2**40))
        _id = object_id("jobs", number)
        row: Row = {
            "_id": _id,
            "kind": ("IMPORT_MODEL", "REINDEX", "GARBAGE_COLLECT")[number % 3],
            "state": state,
            "input": {},
            "scopes": [],
            "created_by_id": creator,
            "principals": job_principals(creator, model["owner_id"]),
            "subject": subjects[number % 3],
            "parent_id": object_id("jobs", number // 3) if number in (4, 5, 7) else None,
            "priority": number % 2,
            "turn": JOBS - number,
            "attempt": number % 3,
            "max_attempts": 5,
            "heartbeat_at": at if state == "RUNNING" else None,
            "progress": {
                "current": random.choice((0, 3, 10, 2**40)),
                "total": total,
                "unit": "bytes",
                "rate": random.choice((None, 0.0, 2.5)),
                "message": random.choice((None, "Reading")),
                "updated_at": at,
                "sequence": 100 + number,
            },
            "steps": [
                {
                    "name": name,
                    "state": "SUCCEEDED",
                    "started_at": at,
                    "finished_at": random.choice((None, at)),
                }
                for name in ("read", "write")[: number % 3]
            ],
            "result": {"files": number} if state == "SUCCEEDED" else None,
            "error": None,
            "created_at": at,
            "started_at": random.choice((None, at)),
            "finished_at": random.choice((None, at)),
        }
        if state in ("FAILED", "DEAD"):
            code = random.choice(("NOT_FOUND", "WORKER_DIED", "odd"))
            row["error"] = {"code": code, "message": "No", "path": random.choice((None, ["owner"]))}
        self.rows["jobs"].append(row)
        for line in range(number % 4):
            self.rows["job_logs"].append(
                {
                    "_id": ObjectId(f"65fffffe{number:08x}{line:08x}"),
                    "job_id": _id,
                    "level": ("INFO", "WARNING", "CRITICAL")[line % 3],
                    "message": f"line {line}",
                    "at": at,
                }
            )

    def upload(self, number: int) -> None:
        states = (
            "CREATED", "UPLOADING", "PAUSED", "RECEIVED", "VERIFYING", "COMPLETED", "FAILED", "ABORTED", "EXPIRED",
        )  # fmt: skip
        state, random = states[number % 9], Random(f"upload {number}")
        version = self.rows["versions"][number]
        model = next(row for row in self.rows["models"] if row["_id"] == version["model_id"])
        creator = self.actor(USERS[number % 4]) if number % 5 else None
        files = [row for row in self.rows["files"] if row["version_id"] == version["_id"]]
        file = random.choice(files) if files and state == "COMPLETED" else None
        is_open = number % 9 < 5
        size = random.choice((0, 10, 2**40))
        received = size if state == "COMPLETED" else random.choice((0, size // 2))
        at = START + timedelta(minutes=number)
        error = {"code": random.choice(("CHECKSUM_MISMATCH", "odd")), "message": "No", "path": None}
        self.rows["uploads"].append(
            {
                "_id": object_id("uploads", number),
                "version_id": version["_id"],
                "model_id": model["_id"],
                "owner_id": model["owner_id"],
                "principals": job_principals(creator, model["owner_id"]),
                "created_by_id": creator,
                "part_of": object_id("uploads", 1) if number == 10 else None,
                "path": f"p{number}",
                "path_key": f"p{number}",
                "size_bytes": Int64(size),
                "sha256": random.choice((None, HASHES[number % 8])),
                "protocol": "INSTANT" if state == "COMPLETED" and number % 2 else "TUS",
                "state": state,
                "is_open": is_open,
                "received_bytes": Int64(received),
                "segments": [],
                "rate": random.choice((None, 0.0, 2.5)),
                "sequence": number,
                "token": 0,
                "holder": None,
                "held_until": None,
                "expires_at": at + timedelta(days=1),
                "created_at": at,
                "updated_at": at,
                "ended_at": None if is_open else at,
                "error": error if state == "FAILED" else None,
                "file_id": file["_id"] if file else None,
                "job_id": object_id("jobs", number % JOBS) if number % 3 else None,
            }
        )

    def blobs(self) -> None:
        """Of all contents but the last: never inspected, inspected, not here, damaged."""
        verdicts = ("SAFE", "UNSAFE", "SUSPICIOUS", "ERROR", "SKIPPED")
        levels = ("CRITICAL", "WARNING", "INFO")
        for number, sha256 in enumerate(HASHES[:-1]):
            inspection = {
                "verdict": verdicts[number % 5],
                "format": "SAFETENSORS",
                "scanner": "modelharbor 1",
                "scanned_at": START,
                "findings": [
                    {
                        "severity": levels[at],
                        "rule": f"rule.{at}",
                        "detail": "It is odd.",
                        "offset": (None, 0, Int64(2**40))[at],
                    }
                    for at in range(number % 4)
                ],
                "tensors": {
                    "tensor_count": number,
                    "parameter_count": Int64(2**40),
                    "parameters_by_dtype": {"F32": Int64(2**40), "U8": number},
                    "architecture": (None, "llama")[number % 2],
                    "context_length": (None, 8192, Int64(2**40))[number % 3],
                    "quantization": None,
                }
                if number % 2
                else None,
                "header": (None, {"a": [1, None, {"b": 0.5}]}, "text")[number % 3],
            }
            self.rows["blobs"].append(
                {
                    "_id": object_id("blobs", number),
                    "sha256": sha256,
                    "key": None,
                    "size_bytes": 17,
                    "references": 1,
                    "stored": number % 4 != 3,
                    "damaged_at": START if number % 8 == 7 else None,
                    "inspection": None if number % 4 == 2 else inspection,
                    "created_at": START,
                }
            )

    def quotas(self) -> None:
        for number, login in enumerate(("acme", "ada", "corp")):
            self.rows["quotas"].append(
                {
                    "_id": self.actor(login),
                    "limit_bytes": (None, 0, Int64(2**40))[number],
                    "reserved_bytes": number,
                    "open_uploads": number,
                }
            )


def likes(login: str, model: int) -> bool:
    """Whether a person likes a model: what a mutation may say without changing anything."""
    return (USERS.index(login) + model) % 3 == 0


GONE: Final = ObjectId("65ffffff0000000000000001")
ABSENT: Final = object()  # the row has no such key
NAN: Final = float("nan")
LARGE: Final = Int64(2**40)

# By collection and stored name. Left out is what makes a loader itself fail (an actor without
# `kind`, aliases that are no rows): it would fail the keys that happen to be in the same batch.
DAMAGE: Final[dict[str, dict[str, tuple[Any, ...]]]] = {
    "actors": {
        "kind": ("Robot", "Model"),
        "login": (ABSENT, None, 5, {"a": 1}),
        "display_name": (ABSENT, 5, True, ["a"], 1.5),
        "avatar_url": (5, {"a": 1}, True),
    },
    "memberships": {
        "user_id": (GONE, object_id("actors", 6)),
        "role": ("KING", None, ABSENT, 5),
    },
    "models": {
        "owner_id": (GONE, None, ABSENT, 5),
        "owner_login": (None, 5),
        "name": (ABSENT, None, 5, ["a"], True),
        "display_name": (ABSENT, 5, 2.5, {"a": 1}, ["a"]),
        "summary": (ABSENT, 5, {"a": 1}),
        "license": (7, NAN),
        "languages": (ABSENT, None, "en", {"a": 1}, ["en", None], [1, "de"], 5),
        "tags": (ABSENT, None, [None], ["nlp", {"a": 1}], [True, 2.5], [["nlp"]]),
        "properties": (ABSENT, None, NAN, [1, GONE], {"at": START, "n": NAN}, "text"),
        "visibility": ("SECRET", None, 5),
        "parameters": (ABSENT, None, "7", "x", NAN, 1.5, True),
        "revision": (ABSENT, None, "3", "x", 1.0, 1.5, NAN, LARGE, True),
        "latest_version_id": (GONE, None, 5, "x"),
        "created_at": (ABSENT, None, "2026-01-01", 5),
        "updated_at": (ABSENT, None, "2026-01-01", 5, []),
        "stats.downloads_30d": (ABSENT, None, "7", NAN, 1.5, {"a": 1}),
        "stats.likes": (ABSENT, None, "7", "x", LARGE, NAN, 2.0, True),
        "stats.versions": (None, "x", LARGE),
        "stats.files": (ABSENT, LARGE, {"a": 1}),
        "stats.trending_score": (None, "1.5", "x", NAN, True, float("inf")),
        "stats.as_of": (ABSENT, None, 5),
    },
    "versions": {
        "number": (LARGE, "x", None),
        "label": (ABSENT, 5, {"a": 1}),
        "status": ("LOST", None, 5, ABSENT),
        "status_reason": (ABSENT, 5, {"a": 1}),
        "parameters": (ABSENT, "12", "x", NAN, 1.5, True),
        "tags": (ABSENT, None, "nlp", {"a": 1}, ["nlp", None], [5]),
        "properties": (ABSENT, NAN, [GONE], 5),
        "digest": (5, ["a"], True),
        "size_bytes": (ABSENT, None, "12", NAN, 1.5, Int64(2**62)),
        "file_count": (ABSENT, None, LARGE, "3"),
        "created_by_id": (GONE, 5, {"a": 1}, object_id("models", 1)),
        "created_at": (ABSENT, None, "x", 5),
        "published_at": (ABSENT, "x", 5),
        "revision": (ABSENT, "x", NAN, LARGE),
    },
    "files": {
        "path": (ABSENT, None, 5),
        "size_bytes": (ABSENT, None, "12", NAN),
        "sha256": (ABSENT, None, 5),
        "role": ("KING", None, ABSENT, ["WEIGHTS"]),
        "format": ("KING", None, ABSENT, 5, {"a": 1}),
    },
    "cards": {
        "markdown": (ABSENT, None, 5),
        "metadata": (ABSENT, None, NAN, [GONE], "x"),
        "html": (ABSENT, None, {"a": 1}),
    },
    "tokens": {
        "name": (ABSENT, None, 5),
        "scopes": (ABSENT, None, ["READ", None], ["FLY", "READ"], "READ", {"a": 1}),
        "created_at": (ABSENT, "x"),
        "last_used_at": ("x", 5),
    },
    "jobs": {
        "kind": ("LOST", None, 5, ABSENT),
        "state": ("LOST", None, ABSENT),
        "subject": (
            {"type": "Robot", "id": GONE},
            {"type": "Model"},
            5,
            ABSENT,
            {"type": "User", "id": object_id("actors", 1)},
        ),
        "parent_id": (GONE, 5),
        "progress": (ABSENT, None, 5, {}),
        "progress.current": (ABSENT, None, "7", NAN, 1.5),
        "progress.total": ("x", LARGE, 1.5),
        "progress.rate": (NAN, "x", -1.0),
        "steps": (ABSENT, None, [None], [5], {"a": 1}),
        "attempt": (LARGE, None, "x"),
        "error": ({}, 5, {"code": "CONFLICT"}, {"code": 5, "message": "x", "path": None}),
        "result": (NAN, [GONE], 5),
        "created_by_id": (GONE, 5),
        "created_at": (ABSENT, None, "x"),
    },
    "job_logs": {
        "level": ("LOUD", None, 5, ABSENT),
        "message": (ABSENT, None, 5),
        "at": (None, "x"),
    },
    "uploads": {
        "version_id": (GONE, None, ABSENT, 5),
        "model_id": (GONE, 5),
        "path": (ABSENT, None, 5),
        "state": ("LOST", None, ABSENT),
        "protocol": ("FTP", None, ABSENT),
        "size_bytes": (ABSENT, None, "12", NAN, 0),
        "received_bytes": (ABSENT, None, "12", NAN, 1.5, LARGE),
        "rate": (NAN, "x", -1.0),
        "sha256": (5, "x"),
        "error": ({}, 5, {"code": "CONFLICT"}),
        "file_id": (GONE, 5),
        "job_id": (GONE, 5),
        "created_by_id": (GONE, 5),
        "expires_at": (ABSENT, None, "x"),
        "ended_at": ("x", 5),
    },
    "blobs": {
        "inspection": (None, {"verdict": "SAFE"}),
        "inspection.scanner": (ABSENT, 5, {"a": 1}),
        "inspection.scanned_at": (ABSENT, "x", 5),
        "inspection.findings": (ABSENT, None, [None], 5, [{}], [{"severity": "LOUD"}]),
        "inspection.tensors": (ABSENT, {}, 5, {"tensor_count": LARGE, "context_length": None}),
        "inspection.header": (ABSENT, NAN, [GONE], {"at": START}, 5),
    },
    "quotas": {
        "limit_bytes": ("x", NAN),
        "reserved_bytes": (ABSENT, None, "x"),
    },
}
SHARE: Final = {"actors": 0.25, "memberships": 0.4, "models": 0.35, "versions": 0.35, "files": 0.2, "cards": 0.4, "tokens": 0.5, "jobs": 0.4, "job_logs": 0.3, "uploads": 0.4, "quotas": 0.4, "blobs": 0.4}  # fmt: skip


def damaged() -> Collections:
    """The healthy rows, some of them damaged in one or two places, and some gone."""
    random = Random("damaged")
    rows = healthy()
    for collection, fields in DAMAGE.items():
        for row in rows[collection]:
            if random.random() < SHARE[collection]:
                for path in random.sample(sorted(fields), random.choice((1, 1, 2))):
                    _damage(row, path, random.choice(fields[path]))
    rows["actors"] = [row for row in rows["actors"] if row["login_lower"] != "zoe"]
    rows["versions"] = [row for index, row in enumerate(rows["versions"]) if index % 9 != 8]
    return rows


def _damage(row: Row, path: str, value: Any) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        row = row[parent]
        if row is None:
            return
    if value is ABSENT:
        row.pop(name, None)
    else:
        row[name] = deepcopy(value)


def viewers(rows: Collections) -> dict[str, Viewer]:
    """Who asks, by name."""
    by_login = {row["login_lower"]: row for row in rows["actors"]}
    scopes = frozenset(Permission) - {Permission.OPERATE}

    def viewer(login: str, scopes: frozenset[Permission]) -> Viewer:
        user = by_login[login]
        roles = {
            row["organization_id"]: Role(row["role"])
            for row in _healthy_memberships()
            if row["user_id"] == user["_id"]
        }
        return Viewer(user=user, roles=roles, scopes=scopes)

    return {
        "anonymous": ANONYMOUS,
        "owner": viewer("ada", scopes),
        "member": viewer("bob", scopes),
        "operator": viewer("cyd", frozenset(Permission)),
        "stranger": viewer("eve", scopes),
        "reader": viewer("dan", frozenset({Permission.READ})),
        "scopeless": viewer("ada", frozenset({Permission.WRITE})),
    }


def _healthy_memberships() -> list[Row]:
    made = _Maker(Random("healthy"))
    made.people()
    return made.rows["memberships"]


LOGINS: Final = {
    "owner": "ada",
    "member": "bob",
    "operator": "cyd",
    "stranger": "eve",
    "reader": "dan",
    "scopeless": "ada",
}
