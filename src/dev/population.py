"""The rows of the demo data, one after the other: the same for the same arguments, always."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import cache
from itertools import accumulate
from pathlib import PurePosixPath
from random import Random
from typing import Any, Final

from bson import ObjectId

from modelharbor.auth.viewer import model_principals
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import BaseDocument, Row
from modelharbor.db.files import BlobDocument, FileDocument, FileFormat, FileRole, path_key
from modelharbor.db.models import (
    CardDocument,
    LikeDocument,
    ModelDocument,
    ModelState,
    Stats,
    Visibility,
    trending_score,
)
from modelharbor.db.versions import VersionDocument, VersionStatus
from modelharbor.inspection.formats import role_of
from modelharbor.resolvers.cards import render_card
from modelharbor.resolvers.settling import files_digest

from .distributions import draw_downloads, draw_files, draw_rank, draw_versions, draw_weights_bytes
from .samples import SAMPLES, SampleFile, SampleModel
from .vocabulary import (
    FAMILIES,
    FIRST_NAMES,
    LANGUAGE_NAMES,
    LANGUAGES,
    LAST_NAMES,
    LICENSES,
    ORGANIZATION_FIRST,
    ORGANIZATION_SECOND,
    ORGANIZATIONS,
    PEOPLE,
    QUANTIZATIONS,
    TASKS,
    WORDLESS,
    Family,
    Task,
)

UNTIL: Final = datetime(2026, 11, 20, tzinfo=UTC)
SINCE: Final = UNTIL - timedelta(days=4 * 365)
SAMPLE_DAYS: Final = 60  # the models with real contents are the newest
MOST_OWNERS: Final = 20_000  # all of them are held in memory
MODELS_PER_OWNER: Final = 6
THIN_ABOVE: Final = 2_000  # models; above, one file a version is enough when nobody says more
MONSTER: Final = "monster"  # a tag, and the login of an owner
MONSTER_VERSIONS: Final = 200_000
MONSTER_FILES: Final = 100_000
CARD_SHARE: Final = 0.6
MAX_CARD_BYTES: Final = 65_536  # ours are far shorter
SAMPLE_OWNERS: Final = frozenset({"sentence-transformers", "qwen"})  # have samples only

FAMILY_WEIGHTS: Final = tuple(accumulate(1 / (rank + 3) for rank in range(len(FAMILIES))))
LANGUAGE_WEIGHTS: Final = tuple(accumulate(1 / (rank + 1) ** 1.8 for rank in range(len(LANGUAGES))))
LICENSE_WEIGHTS: Final = tuple(accumulate(1 / (rank + 1) for rank in range(len(LICENSES))))
ROLES: Final = tuple(Role)


@dataclass(frozen=True, slots=True)
class Shape:
    """What is to be made."""

    models: int
    seed: int = 1
    files_per_version: int | None = None  # at most; None: as many as real ones have
    monsters: bool = False
    monster_versions: int = MONSTER_VERSIONS
    monster_files: int = MONSTER_FILES

    def __post_init__(self) -> None:
        least = 2 if self.monsters else 1
        if self.models < least:
            raise ValueError(f"{self.models} models: at least {least} are needed.")
        if self.files_per_version is not None and self.files_per_version < 1:
            raise ValueError("A version has at least one file.")

    @property
    def samples(self) -> int:
        """How many models have real contents."""
        return min(len(SAMPLES), self.models - (2 if self.monsters else 0))

    def random(self, index: int) -> Random:
        """The chances of one model: they do not depend on how many others there are."""
        return Random(f"{self.seed} model {index}")

    def draw_counts(self, random: Random, index: int) -> tuple[int, int]:
        """Versions, and files of each, of an ordinary model or a monster. The first draws of all."""
        versions, files = draw_versions(random), draw_files(random)
        if self.files_per_version is not None:
            files = min(files, self.files_per_version)
        if self.monsters and index == 0:
            return self.monster_versions, 1
        if self.monsters and index == 1:
            return 1, self.monster_files
        return versions, files

    def count(self) -> dict[str, int]:
        """How many rows there will be, nearly: without the few that are known when they are made."""
        versions = files = 0
        for index in range(self.models - self.samples):
            of_model, of_version = self.draw_counts(self.random(index), index)
            versions += of_model
            files += of_model * of_version
        return {
            ModelDocument.Settings.name: self.models,
            VersionDocument.Settings.name: versions,
            FileDocument.Settings.name: files,
            BlobDocument.Settings.name: int(
                files * (0.4 if self.files_per_version is None else 0.78)
            ),
            CardDocument.Settings.name: int(self.models * CARD_SHARE),
            ActorDocument.Settings.name: self.owners,
        }

    @property
    def owners(self) -> int:
        return min(MOST_OWNERS, max(20, self.models // MODELS_PER_OWNER))


@dataclass(frozen=True, slots=True)
class Owner:
    id: ObjectId
    login: str
    kind: ActorKind
    people: tuple[ObjectId, ...]  # who upload: the members, or oneself


@dataclass(slots=True)
class Slot:
    """A file of a model through its versions: at times its contents change."""

    path: str
    role: str
    format: str
    size_bytes: int
    churn: float  # chance that a new version brings new contents
    shared: str | None = None  # name of contents that several models have
    sha256: str = ""
    references: int = 0
    revision: int = 0
    since: datetime = SINCE


@dataclass(slots=True)
class Shared:
    size_bytes: int
    since: datetime
    stored: bool = False
    references: int = 0


@dataclass(slots=True)
class History:
    """What the versions of a model come to, for its counters."""

    versions: int = 0
    files: int = 0
    size_bytes: int = 0
    stored_bytes: int = 0
    ready: list[tuple[ObjectId, datetime]] = field(default_factory=list)  # the newest three
    formats: list[str] = field(default_factory=list)
    parameters: int | None = None
    last_at: datetime = SINCE

    def add_ready(
        self, version_id: ObjectId, at: datetime, formats: list[str], parameters: int | None
    ) -> None:
        self.ready = [*self.ready[-2:], (version_id, at)]
        self.formats, self.parameters = formats, parameters


@dataclass(frozen=True, slots=True)
class Portrait:
    """What is written about a model."""

    name: str
    task: str
    library: str
    license: str | None
    languages: list[str]
    tags: list[str]
    summary: str
    properties: dict[str, Any]
    display_name: str | None = None


def blank(document: type[BaseDocument]) -> Row:
    """The values that a document has when nothing is said, as they are stored."""
    found = {}
    for name, info in document.model_fields.items():
        if not info.is_required() and info.default_factory is None and name != "revision_id":
            value = info.default
            found[info.alias or name] = value.value if isinstance(value, Enum) else value
    return found


class Population:
    """All rows of a shape. Holds the owners, the names and the shared contents; the rest streams by."""

    def __init__(self, shape: Shape, samples: list[SampleModel]) -> None:
        self.shape = shape
        self.samples = samples
        self.done = 0  # models
        self._made = 0  # rows with an id of their own: a part of the next id
        self._salt = hashlib.sha256(f"{shape.seed}".encode()).digest()[:3]
        self._shared: dict[str, Shared] = {}
        self._names: set[str] = set()
        self._people: list[ObjectId] = []
        self._owners: dict[str, Owner] = {}
        self._ranked: list[Owner] = []
        self._actor = blank(ActorDocument)
        self._model = blank(ModelDocument)
        self._version = blank(VersionDocument)
        self._file = blank(FileDocument)
        self._blob = blank(BlobDocument)

    def rows(self) -> Iterator[tuple[str, Row]]:
        """Collection and row. A model comes after its versions: they tell its counters."""
        yield from self._actors()
        ordinary = self.shape.models - len(self.samples)
        for index in range(ordinary):
            yield from self._ordinary(index)
            self.done += 1
        for index, made in enumerate(self.samples):
            yield from self._sample(index, made)
            self.done += 1
        for sha256, shared in self._shared.items():
            yield self._blob_row(
                sha256, shared.size_bytes, shared.references, shared.since, shared.stored
            )

    def _id(self, at: datetime) -> ObjectId:
        """4 bytes of seconds, 3 of the seed, 5 that count: unique, and rising while `at` does."""
        self._made += 1
        seconds = int(at.timestamp()).to_bytes(4, "big")
        return ObjectId(seconds + self._salt + self._made.to_bytes(5, "big"))

    # People and organizations -------------------------------------------------------------------

    def _actors(self) -> Iterator[tuple[str, Row]]:
        random = Random(f"{self.shape.seed} actors")
        people = [self._actor_row(ActorKind.USER, login, name) for login, name in PEOPLE]
        people[0]["is_operator"] = True
        organizations = [
            self._actor_row(ActorKind.ORGANIZATION, login, name) for login, name in ORGANIZATIONS
        ]
        if self.shape.monsters:
            organizations.append(self._actor_row(ActorKind.ORGANIZATION, MONSTER, "Monsters"))
        known = frozenset(row["login"] for row in (*people, *organizations))
        logins = set(known)
        generated = []
        for _ in range(self.shape.owners - len(logins)):
            kind = ActorKind.ORGANIZATION if random.random() < 0.35 else ActorKind.USER
            generated.append(self._actor_row(kind, *_new_name(random, kind, logins)))
        self._people = [
            row["_id"] for row in (*people, *generated) if row["kind"] == ActorKind.USER.value
        ]
        named = [row["_id"] for row in people]
        ranked = [*organizations, *generated[:4], *people, *generated[4:]]
        for row in ranked:
            yield ActorDocument.Settings.name, row
            members: tuple[ObjectId, ...] = (row["_id"],)
            if row["kind"] == ActorKind.ORGANIZATION.value:
                roles = self._roles(random, named if row["login"] in known else [])
                members = tuple(roles)
                for user_id, role in roles.items():
                    yield (
                        MembershipDocument.Settings.name,
                        {
                            "_id": self._id(SINCE),
                            "organization_id": row["_id"],
                            "user_id": user_id,
                            "role": role.value,
                            "created_at": SINCE,
                        },
                    )
            owner = Owner(row["_id"], row["login"], ActorKind(row["kind"]), members)
            self._owners[owner.login] = owner
            if owner.login not in SAMPLE_OWNERS and owner.login != MONSTER:
                self._ranked.append(owner)

    def _actor_row(self, kind: ActorKind, login: str, name: str) -> Row:
        return {
            **self._actor,
            "_id": self._id(SINCE),
            "kind": kind.value,
            "login": login,
            "login_lower": login.lower(),
            "display_name": name,
            "created_at": SINCE,
        }

    def _roles(self, random: Random, named: list[ObjectId]) -> dict[ObjectId, Role]:
        """The named ones, from ADMIN downwards, and some others."""
        roles = dict(zip(named, (Role.ADMIN, Role.MAINTAINER, Role.CONTRIBUTOR), strict=False))
        for _ in range(1 + draw_rank(random, 8)):
            person = random.choice(self._people)
            roles.setdefault(person, random.choice(ROLES) if roles else Role.ADMIN)
        return roles

    # Models -------------------------------------------------------------------------------------

    def _created_at(self, index: int) -> datetime:
        """Rising with the index, ever faster: a hub grows."""
        ordinary = self.shape.models - len(self.samples)
        days = (UNTIL - SINCE).days - 1
        # The index itself spreads them within the step, the same at each run.
        seconds = int(days * 86_400 * ((index + 0.5) / ordinary) ** 0.5)
        return SINCE + timedelta(seconds=seconds)

    def _ordinary(self, index: int) -> Iterator[tuple[str, Row]]:
        random = self.shape.random(index)
        versions, files = self.shape.draw_counts(random, index)
        created_at = self._created_at(index)
        model_id = self._id(created_at)
        family = random.choices(FAMILIES, cum_weights=FAMILY_WEIGHTS)[0]
        owner = self._pick_owner(random, index)
        portrait = self._portrait(random, index, family, owner)
        slots = _slots(random, family, portrait, files)
        history = History()
        monster = self.shape.monsters and index < 2
        yield from self._history(
            random,
            model_id,
            owner,
            created_at,
            versions,
            slots,
            history,
            parameters=portrait.properties["parameters"],
            settled=monster,
        )
        for slot in slots:
            if slot.references:
                yield self._blob_row(
                    slot.sha256, slot.size_bytes, slot.references, slot.since, False
                )
        downloads = draw_downloads(random)
        days = max(1, (UNTIL - created_at).days)
        recent = int(downloads * min(1.0, 30 / days * (0.3 + 2 * random.random())))
        fans = [person for person in self._people[: len(PEOPLE)] if random.random() < 0.02]
        likes = int(downloads**0.55 * random.random() / 2) + len(fans)
        row = self._model_row(model_id, owner, portrait, created_at, history)
        row["stats"] |= {"downloads_all": downloads, "downloads_30d": recent, "likes": likes}
        row["visibility"] = random.choices(
            [
                visibility.value
                for visibility in (Visibility.PUBLIC, Visibility.INTERNAL, Visibility.PRIVATE)
            ],
            (90, 5, 5),
        )[0]
        if random.random() < 0.03:
            row["state"] = ModelState.ARCHIVED.value
        if row["visibility"] == Visibility.PRIVATE.value or random.random() < 0.02:
            row["grants"] = self._grants(random, owner)
        row["aliases"] = _aliases(random, history, owner)
        if random.random() < CARD_SHARE:
            yield (
                CardDocument.Settings.name,
                {
                    "_id": model_id,
                    **_card(portrait, owner.login, family.architecture),
                },
            )
        yield from self._likes(model_id, fans, history.last_at)
        yield self._finished(row)

    def _sample(self, index: int, made: SampleModel) -> Iterator[tuple[str, Row]]:
        sample = made.sample
        random = Random(f"{self.shape.seed} sample {index}")
        # The first ones are the youngest: they lead the list of what is trending.
        created_at = UNTIL - timedelta(days=2 + index * SAMPLE_DAYS / len(SAMPLES))
        model_id = self._id(created_at)
        owner = self._owners[sample.owner]
        history = History()
        seen: set[str] = set()
        for number, files in enumerate(made.versions, 1):
            at = created_at + timedelta(hours=11 * (number - 1))
            version_id = self._id(at)
            for file in files:
                yield self._sample_file(model_id, version_id, file, at)
            history.files += len(files)
            history.stored_bytes += sum(
                {file.sha256: file.size_bytes for file in files if file.sha256 not in seen}.values()
            )
            seen.update(file.sha256 for file in files)
            size = sum(file.size_bytes for file in files)
            formats = sorted({file.format.value for file in files})
            digest = files_digest([(file.path, file.sha256) for file in files])
            version = self._version_row(model_id, version_id, number, owner.people[0], at)
            version |= {"size_bytes": size, "file_count": len(files), "digest": digest}
            version["parameters"] = made.parameters
            history.versions += 1
            history.size_bytes += size
            history.last_at = at
            history.add_ready(version_id, at, formats, made.parameters)
            yield VersionDocument.Settings.name, version
        portrait = Portrait(
            sample.name,
            sample.task,
            sample.library,
            sample.license,
            list(sample.languages),
            list(sample.tags),
            sample.summary,
            sample.properties,
        )
        row = self._model_row(model_id, owner, portrait, created_at, history)
        row["visibility"] = Visibility.PUBLIC.value
        fans = self._people[: len(PEOPLE)]
        recent = int(10 ** (7.7 - index / 25) * (0.9 + 0.2 * random.random()))
        row["stats"] |= {
            "downloads_30d": recent,
            "downloads_all": recent + (recent * index // 20),
            "likes": recent // 5_000 + len(fans),
        }
        newest, newest_at = history.ready[-1]
        row["aliases"] = [_alias("production", newest, owner.people[0], newest_at, protected=True)]
        if len(history.ready) > 1:
            row["aliases"].append(
                _alias("previous", history.ready[-2][0], owner.people[0], newest_at)
            )
        card = render_card(made.card, MAX_CARD_BYTES)
        yield (
            CardDocument.Settings.name,
            {
                "_id": model_id,
                "markdown": card.markdown,
                "metadata": card.metadata,
                "html": card.html,
            },
        )
        yield from self._likes(model_id, fans, history.last_at)
        yield self._finished(row)

    def _pick_owner(self, random: Random, index: int) -> Owner:
        if self.shape.monsters and (index < 2 or random.random() < 1 / 3):
            return self._owners[MONSTER]
        return self._ranked[draw_rank(random, len(self._ranked))]

    def _portrait(self, random: Random, index: int, family: Family, owner: Owner) -> Portrait:
        task = TASKS[random.choice(family.tasks)]
        size, parameters = random.choice(family.sizes)
        about, variant = random.choice(task.fields), random.choice(family.variants)
        endings = (f"-{variant}", f"-{about}", f"-{variant}-{about}", "")
        ending = random.choices(endings, (45, 30, 15, 10))[0]
        languages: list[str] = []
        if task.name not in WORDLESS and random.random() < 0.8:
            many = 1 + draw_rank(random, 5)
            drawn = random.choices(LANGUAGES, cum_weights=LANGUAGE_WEIGHTS, k=many)
            languages = list(dict.fromkeys(drawn))
        license = family.license
        if random.random() < 0.4:
            license = random.choices(LICENSES, cum_weights=LICENSE_WEIGHTS)[0] or ""
        name = self._free_name(random, index, owner, f"{family.name}-{size}{ending}")
        tags = [family.library, family.name.lower(), task.name]
        tags += random.sample(task.topics, k=random.randrange(len(task.topics)))
        tags += [about] if about in ending else []
        if family.library in ("transformers", "sentence-transformers", "diffusers", "timm"):
            tags.append(_container(name))
        if self.shape.monsters and index % 2 == 0:
            tags.append(MONSTER)
        properties = {"architecture": family.architecture, "parameters": parameters}
        properties["dtype"] = random.choice(("bfloat16", "float16", "float32"))
        if family.context_length:
            properties["context_length"] = family.context_length
        tongue = LANGUAGE_NAMES.get(languages[0]) if languages else None
        summary = f"{family.name} {size} for {task.purpose}"
        summary += f" in {tongue}" if tongue else ""
        summary += f", fine-tuned on {about} data." if about in ending else "."
        return Portrait(
            name,
            task.name,
            family.library,
            license or None,
            languages,
            list(dict.fromkeys(tags)),
            summary,
            properties,
            name.replace("-", " ") if random.random() < 0.1 else None,
        )

    def _free_name(self, random: Random, index: int, owner: Owner, wish: str) -> str:
        if self.shape.monsters and index < 2:
            return ("many-versions", "many-files")[index]
        if random.random() < 0.25:
            wish = wish.lower()
        detail = random.choice(
            ("v2", "v3", "4bit", "8bit", "ep3", "ep10", "lr2e-5", "seed42", "512")
        )
        for name in (wish, f"{wish}-{detail}", f"{wish}-run{index}"):
            key = f"{owner.login}/{name}".lower()
            if key not in self._names:
                break
        self._names.add(key)
        return name

    def _grants(self, random: Random, owner: Owner) -> list[Row]:
        actors = [
            random.choice(self._people),
            self._ranked[draw_rank(random, len(self._ranked))].id,
        ]
        return [
            {"actor_id": actor, "role": random.choice(ROLES).value}
            for actor in dict.fromkeys(actors[: random.randrange(3)])
            if actor != owner.id
        ]

    def _model_row(
        self,
        model_id: ObjectId,
        owner: Owner,
        portrait: Portrait,
        created_at: datetime,
        history: History,
    ) -> Row:
        stats = Stats(
            versions=history.versions,
            files=history.files,
            size_bytes=history.size_bytes,
            stored_bytes=history.stored_bytes,
            as_of=UNTIL,
        )
        return {
            **self._model,
            "_id": model_id,
            "owner_id": owner.id,
            "owner_login": owner.login,
            "owner_login_lower": owner.login.lower(),
            "owner_kind": owner.kind.value,
            "name": portrait.name,
            "name_lower": portrait.name.lower(),
            "display_name": portrait.display_name,
            "summary": portrait.summary,
            "task": portrait.task,
            "library": portrait.library,
            "license": portrait.license,
            "languages": portrait.languages,
            "tags": portrait.tags,
            "formats": history.formats,
            "parameters": history.parameters or 0,
            "properties": portrait.properties,
            "grants": [],
            "last_number": history.versions,
            "latest_version_id": history.ready[-1][0] if history.ready else None,
            "stats": stats.model_dump(),
            "created_at": created_at,
            "updated_at": history.last_at,
        }

    def _finished(self, row: Row) -> tuple[str, Row]:
        """What follows from the rest."""
        row["principals"] = model_principals(row)
        stats = row["stats"]
        stats["trending_score"] = trending_score(
            stats["downloads_30d"], stats["likes"], row["created_at"]
        )
        return ModelDocument.Settings.name, row

    def _likes(
        self, model_id: ObjectId, fans: list[ObjectId], at: datetime
    ) -> Iterator[tuple[str, Row]]:
        for fan in fans:
            yield (
                LikeDocument.Settings.name,
                {
                    "_id": self._id(at),
                    "user_id": fan,
                    "model_id": model_id,
                    "created_at": at,
                },
            )

    # Versions and files -------------------------------------------------------------------------

    def _history(
        self,
        random: Random,
        model_id: ObjectId,
        owner: Owner,
        created_at: datetime,
        count: int,
        slots: list[Slot],
        history: History,
        *,
        parameters: int,  # of its weights, where it has any
        settled: bool,  # the last version is no draft
    ) -> Iterator[tuple[str, Row]]:
        """Versions with their files, and the contents that no longer change."""
        files, versions = FileDocument.Settings.name, VersionDocument.Settings.name
        # Many are left alone soon after their beginning.
        span = (UNTIL - created_at).total_seconds() * random.random() ** 2
        has_draft = random.random() < 0.04 and not settled
        for number in range(1, count + 1):
            moment = 0.0 if number == 1 else span * (number - random.random()) / count
            at = created_at + timedelta(seconds=int(moment))
            version_id = self._id(created_at)
            draft = has_draft and number == count
            row = self._version_row(model_id, version_id, number, random.choice(owner.people), at)
            history.versions += 1
            history.last_at = at
            chance = random.random()
            if chance < 0.3:
                row["label"] = f"v{1 + number // 10}.{number % 10}"
            if chance < 0.1:
                row["description"] = "Trained on more data; evaluated on what was held out."
            row["properties"] = {"step": number * 500, "loss": round(4 / (1 + number) ** 0.3, 4)}
            if draft:
                row |= {"status": VersionStatus.DRAFT.value, "published_at": None}
            elif chance > 0.97 and number < count - 2:
                row["status"] = VersionStatus.ARCHIVED.value
            if not (draft and chance < 0.5):  # a draft may still be empty
                for slot in slots:
                    if not slot.sha256 or random.random() < slot.churn:
                        if slot.references:
                            yield self._blob_row(
                                slot.sha256, slot.size_bytes, slot.references, slot.since, False
                            )
                        self._renew(random, model_id, slot, at)
                        history.stored_bytes += slot.size_bytes
                    if slot.shared:
                        self._shared[slot.sha256].references += 1
                    else:
                        slot.references += 1
                    yield (
                        files,
                        {
                            **self._file,
                            "_id": self._id(created_at),
                            "version_id": version_id,
                            "model_id": model_id,
                            "path": slot.path,
                            "path_key": path_key(slot.path),
                            "size_bytes": slot.size_bytes,
                            "sha256": slot.sha256,
                            "role": slot.role,
                            "format": slot.format,
                        },
                    )
                row["file_count"] = len(slots)
                row["size_bytes"] = size = sum(slot.size_bytes for slot in slots)
                history.files += len(slots)
                history.size_bytes += size
            if not draft:
                row["digest"] = files_digest([(slot.path, slot.sha256) for slot in slots])
                if any(slot.role == FileRole.WEIGHTS.value for slot in slots):
                    row["parameters"] = parameters
            if row["status"] == VersionStatus.READY.value:
                formats = sorted({slot.format for slot in slots})
                history.add_ready(version_id, at, formats, row["parameters"])
            yield versions, row

    def _version_row(
        self, model_id: ObjectId, version_id: ObjectId, number: int, by: ObjectId, at: datetime
    ) -> Row:
        return {
            **self._version,
            "_id": version_id,
            "model_id": model_id,
            "number": number,
            "status": VersionStatus.READY.value,
            "created_by_id": by,
            "created_at": at,
            "published_at": at,
        }

    def _renew(self, random: Random, model_id: ObjectId, slot: Slot, at: datetime) -> None:
        """New contents: the first ones may be those that other models have too."""
        slot.references = 0
        slot.since = at
        slot.revision += 1
        if slot.shared and slot.revision == 1:
            slot.sha256 = hashlib.sha256(f"{self.shape.seed} {slot.shared}".encode()).hexdigest()
            shared = self._shared.setdefault(slot.sha256, Shared(slot.size_bytes, at))
            slot.size_bytes = shared.size_bytes
            return
        slot.shared = None
        name = f"{self.shape.seed} {model_id} {slot.path} {slot.revision}"
        slot.sha256 = hashlib.sha256(name.encode()).hexdigest()
        if slot.role != FileRole.WEIGHTS.value and slot.revision > 1:
            slot.size_bytes += random.randrange(1, 200)  # texts grow, tensors keep their shapes

    def _sample_file(
        self, model_id: ObjectId, version_id: ObjectId, file: SampleFile, at: datetime
    ) -> tuple[str, Row]:
        shared = self._shared.setdefault(file.sha256, Shared(file.size_bytes, at, stored=True))
        shared.references += 1
        return FileDocument.Settings.name, {
            **self._file,
            "_id": self._id(at),
            "version_id": version_id,
            "model_id": model_id,
            "path": file.path,
            "path_key": path_key(file.path),
            "size_bytes": file.size_bytes,
            "sha256": file.sha256,
            "role": file.role.value,
            "format": file.format.value,
        }

    def _blob_row(
        self, sha256: str, size_bytes: int, references: int, since: datetime, stored: bool
    ) -> tuple[str, Row]:
        return BlobDocument.Settings.name, {
            **self._blob,
            "_id": self._id(since),
            "sha256": sha256,
            "size_bytes": size_bytes,
            "references": references,
            "stored": stored,
            "created_at": since,
        }


def _new_name(random: Random, kind: ActorKind, taken: set[str]) -> tuple[str, str]:
    """Login and name of someone who is not there yet."""
    if kind is ActorKind.ORGANIZATION:
        first, last = random.choice(ORGANIZATION_FIRST), random.choice(ORGANIZATION_SECOND)
        login = f"{first}-{last}".lower()
    else:
        first, last = random.choice(FIRST_NAMES), random.choice(LAST_NAMES)
        login = random.choice((f"{first}{last}", f"{first}-{last}", f"{first[0]}{last}")).lower()
    unique, number = login, 1
    while unique in taken:
        number += random.randrange(1, 90)
        unique = f"{login}{number}"
    taken.add(unique)
    return unique, f"{first} {last}"


# Files ------------------------------------------------------------------------------------------

COMPANIONS: Final = (
    # path, bytes, chance of new contents in a version, whether models of a family share it
    ("config.json", 700, 0.05, False),
    ("README.md", 5_000, 0.4, False),
    ("tokenizer.json", 2_100_000, 0.02, True),
    ("tokenizer_config.json", 1_300, 0.03, True),
    (".gitattributes", 1_519, 0.0, True),
    ("special_tokens_map.json", 440, 0.02, True),
    ("generation_config.json", 180, 0.05, False),
    ("vocab.txt", 231_508, 0.01, True),
    ("training_args.bin", 5_240, 0.7, False),
    ("merges.txt", 456_318, 0.01, True),
    ("trainer_state.json", 48_000, 0.9, False),
    ("added_tokens.json", 85, 0.02, True),
    ("chat_template.jinja", 4_700, 0.05, True),
    ("LICENSE", 11_357, 0.0, True),
)
FORMATS: Final = {
    ".safetensors": FileFormat.SAFETENSORS,
    ".gguf": FileFormat.GGUF,
    ".bin": FileFormat.PYTORCH_PICKLE,
    ".pt": FileFormat.PYTORCH_PICKLE,
    ".pkl": FileFormat.PYTORCH_PICKLE,
    ".onnx": FileFormat.ONNX,
    ".h5": FileFormat.KERAS,
    ".json": FileFormat.JSON,
    ".png": FileFormat.OTHER,
    ".zip": FileFormat.OTHER,
}
# What the libraries keep tensors in, the usual one first.
WEIGHTS: Final = {
    "diffusers": (
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ),
    "ultralytics": ("best.pt", "best.onnx", "last.pt"),
    "stable-baselines3": ("policy.zip", "policy.pt"),
    "xgboost": ("model.pkl", "model.onnx"),
    "open_clip": ("open_clip_pytorch_model.bin", "open_clip_model.safetensors"),
}
SHARDED_FROM: Final = 5 * 10**9  # parameters: more do not fit into one file of the usual 5 GB
ORDINARY_WEIGHTS: Final = (
    "model.safetensors",
    "pytorch_model.bin",
    "onnx/model.onnx",
    "tf_model.h5",
)


def _container(name: str) -> str:
    """What a model's name says of its files."""
    return next((word for word in ("gguf", "onnx") if word in name.lower()), "safetensors")


def _slots(random: Random, family: Family, portrait: Portrait, count: int) -> list[Slot]:
    """`count` files: the first weights, what goes with them, then more weights and checkpoints."""
    own = max(1, count - 4)
    parameters: int = portrait.properties["parameters"]
    container = _container(portrait.name)
    if container == "gguf":
        stem = portrait.name.lower().replace("-gguf", "")
        weights = [f"{stem}-{level}.gguf" for level in random.sample(QUANTIZATIONS, k=8)]
        several = 1 + draw_rank(random, 8)
    elif container == "onnx":
        weights, several = ["onnx/model.onnx", "onnx/model_quantized.onnx"], 1
    elif own > 1 and parameters > SHARDED_FROM and family.library not in WEIGHTS:
        several = random.randrange(2, min(12, own) + 1)
        weights = [f"model-{at:05d}-of-{several:05d}.safetensors" for at in range(1, several + 1)]
    else:
        weights = list(WEIGHTS.get(family.library, ORDINARY_WEIGHTS))
        several = 1 + draw_rank(random, 3)
    first = min(several, own, len(weights))
    size = draw_weights_bytes(random)
    slots = [_slot(path, size, 0.75) for path in weights[:first]]
    if random.random() < 0.06:  # the base itself, unchanged
        slots[0].shared = f"{family.name} {parameters} {slots[0].path}"
    for path, usual, churn, shared in COMPANIONS[: max(0, count - first)]:
        slot = _slot(path, int(usual * (0.7 + 0.6 * random.random())), churn)
        if shared and random.random() < 0.7:
            slot.shared = f"{family.name} {path}"
        slots.append(slot)
    checkpoints = range(500, 500 * (count - len(slots)) + 1, 500)
    slots += [
        _slot(f"checkpoints/step-{step:08d}/model.safetensors", size, 0.0) for step in checkpoints
    ]
    return slots


def _slot(path: str, size: int, churn: float) -> Slot:
    name = PurePosixPath(path)
    format = FORMATS.get(name.suffix, FileFormat.TEXT)
    return Slot(path, role_of(path, format).value, format.value, max(1, size), churn)


# Aliases and cards ------------------------------------------------------------------------------


def _aliases(random: Random, history: History, owner: Owner) -> list[Row]:
    if not history.ready or random.random() < 0.6:
        return []
    newest, at = history.ready[-1]
    older, _ = history.ready[0]
    by = random.choice(owner.people)
    if random.random() < 0.3:
        return [_alias("champion", older, by, at), _alias("challenger", newest, by, at)]
    found = [_alias("production", older, by, at, protected=random.random() < 0.3)]
    if random.random() < 0.6:
        found.append(_alias("staging", newest, by, at))
    return found


def _alias(
    name: str, version_id: ObjectId, by: ObjectId, at: datetime, *, protected: bool = False
) -> Row:
    return {
        "name": name,
        "version_id": version_id,
        "protected": protected,
        "set_by_id": by,
        "set_at": at,
    }


OWNER_WORD, MODEL_WORD, ARCHITECTURE_WORD = "THEOWNER", "THEMODEL", "THEARCHITECTURE"


@cache
def _template(task: Task) -> tuple[str, str]:
    """Markdown and HTML of a card, with words for what differs: rendering is slower than making all the rest."""
    markdown = (
        f"\n# {MODEL_WORD}\n\n"
        f"A model for **{task.purpose}**.\n\n"
        "## How to use it\n\n"
        "```graphql\n{\n"
        f'  model(owner: "{OWNER_WORD}", name: "{MODEL_WORD}") {{\n'
        "    latestVersion { number files(first: 10) { nodes { path downloadUrl } } }\n"
        "  }\n}\n```\n\n"
        "## Architecture\n\n"
        f"`{ARCHITECTURE_WORD}`, trained on data about {', '.join(task.fields)}.\n\n"
        "| Split | Share |\n|---|---|\n| train | 90 % |\n| test | 10 % |\n\n"
        "## Limits\n\n"
        "- It can be wrong, and sounds as sure as ever then.\n"
        "- It was not tested outside its own domain.\n"
    )
    return markdown, render_card(markdown, MAX_CARD_BYTES).html


def _card(portrait: Portrait, owner: str, architecture: str) -> Row:
    metadata: dict[str, Any] = {}
    if portrait.license:
        metadata["license"] = portrait.license
    metadata |= {"library_name": portrait.library, "pipeline_tag": portrait.task}
    if portrait.languages:
        metadata["language"] = portrait.languages
    metadata["tags"] = portrait.tags
    lines = ["---"]
    for key, value in metadata.items():
        if isinstance(value, list):
            lines += [f"{key}:", *(f'- "{item}"' for item in value)]
        else:
            lines.append(f'{key}: "{value}"')
    lines.append("---\n")
    words = {OWNER_WORD: owner, MODEL_WORD: portrait.name, ARCHITECTURE_WORD: architecture}
    markdown, html = _template(TASKS[portrait.task])
    for (
        word,
        meaning,
    ) in words.items():  # plain letters, digits, `.`, `_` and `-`: nothing to escape
        markdown, html = markdown.replace(word, meaning), html.replace(word, meaning)
    return {"markdown": "\n".join(lines) + markdown, "metadata": metadata, "html": html}
