"""Random writes to all that answers are made of: by the API, and past it by someone with a shell."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import timedelta
from random import Random
from typing import Any, Final

from bson import ObjectId
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import WriteError

from modelharbor.auth.viewer import Viewer, model_principals
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.schema.nodes import global_id
from tests.asking import Asker
from tests.fuzz.data import HASHES, PATHS, START, TAGS, WORDS, Collections

ALL: Final = ("models", "versions", "files", "actors", "memberships", "cards", "blobs", "likes")
TASKS: Final = ("text-generation", "image", "audio", None)
STATES: Final = ("ACTIVE", "ACTIVE", "ARCHIVED", "DELETED")
VISIBILITIES: Final = ("PUBLIC", "PUBLIC", "INTERNAL", "PRIVATE")
OFTEN: Final = {"visible": 8, "task": 4, "status": 3, "version_id": 2, "model_id": 2}
"""What decides in which lists a document is."""
STATUSES: Final = ("READY", "READY", "DRAFT", "ARCHIVED", "DELETED", "FAILED")


@dataclass
class Writes:
    """One after the other, from a seed."""

    random: Random
    database: Database
    ask: Asker
    viewers: dict[str, Viewer]
    number: int = 0

    async def one(self) -> str:
        """What was done; it may have been nothing."""
        self.number += 1
        kinds: list[tuple[Callable[[], Awaitable[str]], int]] = [
            (self.by_api, 6),
            (self.update, 12),
            (self.update_many, 2),
            (self.replace, 2),
            (self.insert, 4),
            (self.delete, 2),
            (self.together, 1),
        ]
        made = self.random.choices([kind for kind, _ in kinds], [share for _, share in kinds])[0]
        try:
            return await made()
        except WriteError:  # it is there already, or what is to be changed is null
            return "nothing"

    async def row(self, collection: str) -> Row:
        ids = await self.database.find(collection, {}, projection={"_id": 1}, sort={"_id": 1})
        _id = self.random.choice(ids)["_id"] if ids else ObjectId()
        rows = await self.database.find(collection, {"_id": _id})
        return rows[0] if rows else {"_id": _id}

    def collection(self) -> str:
        return self.random.choices(ALL, (12, 5, 4, 3, 2, 2, 2, 1))[0]

    def changes(self, collection: str, row: Row) -> Row:
        """Some new values, by stored name."""
        possible = getattr(self, f"of_{collection}")(row)
        names = sorted(possible)
        weights = [OFTEN.get(name, 1) for name in names]
        count = self.random.choice((1, 1, 2))
        found: Row = {}
        for name in dict.fromkeys(self.random.choices(names, weights, k=count)):
            found |= possible[name] if isinstance(possible[name], Whole) else {name: possible[name]}
        roots = [name.partition(".")[0] for name in found]
        return found if len(set(roots)) == len(roots) else dict([next(iter(found.items()))])

    # ---- past the API

    async def update(self) -> str:
        collection = self.collection()
        row = await self.row(collection)
        wanted = self.changes(collection, row)
        data = self.database.data[collection]
        if self.random.random() < 0.3:  # as a pipeline MongoDB itself finds out what differs
            literal = {name: {"$literal": value} for name, value in wanted.items()}
            await data.update_one({"_id": row["_id"]}, [{"$set": literal}])
        elif self.random.random() < 0.1:
            await data.update_one(
                {"_id": row["_id"]}, {"$unset": dict.fromkeys(self.optional(collection), 1)}
            )
            return f"unset in {collection} {row['_id']}"
        else:
            await data.update_one({"_id": row["_id"]}, {"$set": wanted})
        return f"update {collection} {row['_id']} {wanted}"

    def optional(self, collection: str) -> tuple[str, ...]:
        return {
            "models": ("summary", "task"),
            "versions": ("label",),
            "actors": ("display_name",),
        }.get(collection, ("nothing",))

    async def update_many(self) -> str:
        many: tuple[tuple[str, Row, Row], ...] = (
            ("models", {"task": "image"}, {"$set": {"summary": f"New {self.number}"}}),
            ("models", {"visibility": "PUBLIC"}, {"$inc": {"stats.downloads_30d": 3, "stats.downloads_all": 3}}),
            ("models", {"owner_login_lower": "acme"}, {"$push": {"tags": f"t{self.number}"}}),
            ("models", {"tags": "nlp"}, {"$pull": {"tags": "nlp"}}),
            ("models", {}, {"$mul": {"stats.trending_score": self.random.random()}}),
            ("versions", {"number": 1}, {"$set": {"description": f"D{self.number}"}}),
            ("files", {"path": "config.json"}, {"$inc": {"size_bytes": 1}}),
            ("blobs", {}, {"$set": {"inspection.scanner": f"s{self.number}"}}),
        )  # fmt: skip
        collection, query, change = self.random.choice(many)
        await self.database.data[collection].update_many(query, change)
        return f"update many {collection} {query} {change}"

    async def replace(self) -> str:
        collection = self.collection()
        row = await self.row(collection)
        for name, value in self.changes(collection, row).items():
            if "." not in name:
                row[name] = value
        if len(row) == 1:
            return "nothing"
        await self.database.data[collection].replace_one({"_id": row["_id"]}, row)
        return f"replace {collection} {row['_id']}"

    async def insert(self) -> str:
        collection = self.collection()
        row = await self.row(collection)
        for name, value in self.changes(collection, row).items():
            if "." not in name:
                row[name] = value
        if len(row) == 1:
            return "nothing"
        row["_id"] = ObjectId()
        unique: dict[str, Row] = {
            "models": {"name": f"New-{self.number}", "name_lower": f"new-{self.number}"},
            "versions": {"number": 100 + self.number},
            "files": {"path": f"new/{self.number}", "path_key": f"new/{self.number}"},
            "actors": {"login": f"New{self.number}", "login_lower": f"new{self.number}"},
            "blobs": {"sha256": HASHES[-1]},
        }
        await self.database.data[collection].insert_one({**row, **unique.get(collection, {})})
        return f"insert {collection} {row['_id']}"

    async def delete(self) -> str:
        collection = self.collection()
        row = await self.row(collection)
        await self.database.data[collection].delete_one({"_id": row["_id"]})
        return f"delete {collection} {row['_id']}"

    async def together(self) -> str:
        """Several in one commit, of one document twice."""
        model, version, file = [await self.row(name) for name in ("models", "versions", "files")]
        data = self.database.data

        async def work(session: AsyncClientSession) -> None:
            for name, row in (("models", model), ("versions", version), ("files", file)):
                await data[name].update_one(
                    {"_id": row["_id"]}, {"$set": self.changes(name, row)}, session=session
                )
            await data["models"].update_one(
                {"_id": model["_id"]}, {"$set": {"task": "audio"}}, session=session
            )
            await data["models"].update_one(
                {"_id": model["_id"]}, {"$set": {"task": "image"}}, session=session
            )

        await self.database.transaction(work)
        return f"together {model['_id']} {version['_id']} {file['_id']}"

    # ---- what may be stored

    def of_models(self, row: Row) -> Row:
        random, whole = self.random, Whole
        visible = {
            "state": random.choice(STATES),
            "visibility": random.choice(VISIBILITIES),
            "owner_id": row.get("owner_id", START),
            "grants": random.choice((row.get("grants", []), [])),
        }
        owner = random.choice(self.people)
        moved = {"owner_id": owner["_id"], "owner_login": owner["login"], "owner_login_lower": owner["login_lower"]}  # fmt: skip
        aliases = row.get("aliases", [])
        return {
            "summary": random.choice((f"A {random.choice(WORDS)} {self.number}", None)),
            "display_name": random.choice((f"The {random.choice(WORDS)}", None)),
            "name": whole({"name": f"Whale-{self.number}", "name_lower": f"whale-{self.number}"}),
            "visible": whole({**visible, "principals": model_principals(visible)}),
            "owner": whole(moved),
            "task": random.choice(TASKS),
            "library": random.choice(("transformers", None)),
            "license": random.choice(("mit", "apache-2.0", None)),
            "languages": random.sample(("en", "de", "fr"), random.randrange(3)),
            "tags": random.sample(TAGS, random.randrange(4)),
            "formats": ["SAFETENSORS", "JSON"][: random.randrange(3)],
            "parameters": random.choice((0, 1000, 10**9, 10**12)),
            "properties": random.choice(({}, {"size": self.number}, {"size": "big"})),
            "properties.size": self.number,
            "revision": self.number,
            "latest_version_id": random.choice(self.versions)["_id"],
            "aliases": aliases[:1] if random.random() < 0.5 else [],
            "renamed": whole({"aliases.0.name": f"a{self.number}"} if aliases else {}),
            "stats": {**row.get("stats", {}), "likes": random.randrange(9)},
            "stats.likes": random.randrange(9),
            "stats.downloads_30d": random.randrange(60),
            "stats.downloads_all": random.randrange(60),
            "stats.trending_score": random.random() * 4,
            "stats.size_bytes": random.randrange(10**6),
            "stats.versions": random.randrange(9),
            "created_at": START + timedelta(minutes=random.randrange(9000)),
            "updated_at": START + timedelta(minutes=random.randrange(9000)),
            "last_number": self.number,
        }

    def of_versions(self, row: Row) -> Row:
        random = self.random
        return {
            "label": f"v{self.number}",
            "description": random.choice(("New", None)),
            "status": random.choice(STATUSES),
            "parameters": random.choice((None, 5)),
            "tags": random.sample(TAGS, random.randrange(3)),
            "properties": {"size": self.number},
            "size_bytes": random.randrange(10**6),
            "file_count": random.randrange(5),
            "number": 1 + random.randrange(9),
            "created_by_id": random.choice(self.people)["_id"],
            "created_at": START + timedelta(minutes=random.randrange(900)),
            "revision": self.number,
            "model_id": random.choice(self.models)["_id"],
        }

    def of_files(self, row: Row) -> Row:
        random = self.random
        path = random.choice((*PATHS, f"weights/{self.number}"))
        return {
            "path": Whole({"path": path, "path_key": path}),
            "size_bytes": random.randrange(10**6),
            "sha256": random.choice(HASHES),
            "role": random.choice(("WEIGHTS", "CONFIG", "OTHER")),
            "version_id": random.choice(self.versions)["_id"],
        }

    def of_actors(self, row: Row) -> Row:
        return {
            "display_name": f"Whale {self.number}",
            "avatar_url": f"https://pictures.test/{self.number}.png",
            "login": f"login-{self.number}",
            "kind": self.random.choice(("User", "Organization")),
            "turn": self.number,
        }

    def of_memberships(self, row: Row) -> Row:
        return {
            "role": self.random.choice(("VIEWER", "ADMIN")),
            "user_id": self.random.choice(self.people[:6])["_id"],
            "organization_id": self.random.choice(self.people[6:])["_id"],
        }

    def of_cards(self, row: Row) -> Row:
        return {"markdown": f"# {self.number}", "html": f"<p>{self.number}</p>"}

    def of_blobs(self, row: Row) -> Row:
        return {
            "inspection": None,
            "inspection.verdict": self.random.choice(("SAFE", "UNSAFE")),
            "stored": self.random.choice((True, False)),
            "references": self.number,
            "sha256": self.random.choice((*HASHES, f"{self.number:064x}")),
        }

    def of_likes(self, row: Row) -> Row:
        return {"created_at": START}

    def know(self, rows: Collections) -> None:
        """What is there at the beginning."""
        self.people, self.models, self.versions = (
            rows[name] for name in ("actors", "models", "versions")
        )

    # ---- by the API

    async def by_api(self) -> str:
        random = self.random
        viewer = self.viewers[random.choice(("owner", "owner", "stranger", "member"))]
        model = random.choice(self.models)
        version = random.choice(self.versions)
        of_model = global_id("Model", model["_id"])
        of_version = global_id("ModelVersion", version["_id"])
        name, given = random.choice(
            (
                ("likeModel", {"id": of_model}),
                ("unlikeModel", {"id": of_model}),
                ("updateModel", {"id": of_model, "summary": f"Said {self.number}"}),
                ("updateModel", {"id": of_model, "task": random.choice(("image", "audio"))}),
                ("updateModel", {"id": of_model, "addTags": [f"t{self.number}"]}),
                ("updateModel", {"id": of_model, "cardMarkdown": f"# Card {self.number}"}),
                ("updateModel", {"id": of_model, "visibility": random.choice(VISIBILITIES)}),
                ("createModel", {"owner": random.choice(("ada", "acme", "eve")), "name": f"made-{self.number}", "visibility": random.choice(VISIBILITIES), "cardMarkdown": "# New"}),
                ("archiveModel", {"id": of_model}),
                ("restoreModel", {"id": of_model}),
                ("deleteModel", {"id": of_model}),
                ("createModelVersion", {"modelId": of_model}),
                ("updateModelVersion", {"id": of_version, "label": f"l{self.number}"}),
                ("publishModelVersion", {"id": of_version}),
                ("archiveModelVersion", {"id": of_version}),
                ("deleteModelVersion", {"id": of_version}),
                ("setModelAlias", {"modelId": global_id("Model", version["model_id"]), "versionId": of_version, "name": random.choice(("prod", "beta"))}),
                ("deleteModelAlias", {"modelId": of_model, "name": "prod"}),
                ("grantRole", {"subjectId": of_model, "actorId": global_id("User", random.choice(self.people[:6])["_id"]), "role": random.choice(("VIEWER", None))}),
                ("grantRole", {"subjectId": global_id("Organization", self.people[6]["_id"]), "actorId": global_id("User", random.choice(self.people[:6])["_id"]), "role": random.choice(("VIEWER", None))}),
            )
        )  # fmt: skip
        kind = f"{name[0].upper()}{name[1:]}Input"
        document = (
            f"mutation($i: {kind}!) {{ {name}(input: $i) {{ userErrors {{ code message }} }} }}"
        )
        answer = await self.ask(document, viewer, i=given)
        refused = answer.errors or (answer.data or {}).get(name, {}).get("userErrors")
        return f"{name} {given} refused: {refused or None}"


class Whole(dict[str, Any]):
    """Several names that are written together."""
