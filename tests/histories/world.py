"""What the clients of a history read and write: people, models and what else, as registers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Any, Final

from bson import ObjectId

from modelharbor.auth.viewer import Viewer
from modelharbor.db.actors import ActorDocument, ActorKind, MembershipDocument, Role
from modelharbor.db.base import Row
from modelharbor.db.connection import Database
from modelharbor.db.models import Visibility
from modelharbor.db.tokens import Permission
from modelharbor.resolvers.tokens import issue_token
from modelharbor.schema.nodes import global_id
from tests.documents import insert_actor, insert_model, insert_version

from .checker import Derived, Register, Value

TAGS: Final = ("blue", "green")
WORDS: Final = ("alpha", "beta")
"""How summaries begin."""
VERSIONS: Final = 3
ALIASES: Final = ("prod", "beta")
CREATED: Final = 200
"""Models that may be made in a history."""
ACTIVE, ARCHIVED, DELETED = "ACTIVE", "ARCHIVED", "DELETED"
ANYBODY: Final = "nobody"
ORGANIZATION: Final = "acme"
OUTSIDER: Final = "eve"
"""May be given a role on models."""
COMING: Final = "cyd"
"""Comes to the organization and goes."""
LIKING: Final = ("ada", "bob", "dan")


@dataclass(frozen=True)
class Person:
    login: str
    id: ObjectId
    token: str


@dataclass
class Known:
    """A model of the history."""

    key: str
    owner: str
    owner_id: ObjectId
    id: ObjectId | None = None
    """None: it is not made yet, as far as is known."""
    is_begun: bool = False
    """It is being made, or was."""
    versions: dict[int, ObjectId] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.key

    @property
    def global_id(self) -> str:
        assert self.id is not None
        return global_id("Model", self.id)

    def version_id(self, number: int) -> str:
        return global_id("ModelVersion", self.versions[number])

    def register(self, of: str, *more: str) -> Register:
        return (of, self.key, *more)


@dataclass
class Given:
    """A token that is there to be revoked."""

    id: ObjectId
    text: str
    login: str

    @property
    def register(self) -> Register:
        return ("token", str(self.id))


@dataclass
class World:
    people: dict[str, Person]
    organization_id: ObjectId
    models: dict[str, Known]
    tokens: list[Given]
    chance: Random
    initial: dict[Register, Value] = field(default_factory=dict)
    _derived: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """What was made before: there are many reads, and few different things that they are about."""

    def registers(self, model: Known) -> tuple[Register, ...]:
        """On which it depends what a viewer may do with a model."""
        return (
            model.register("state"),
            model.register("visibility"),
            model.register("grant", OUTSIDER),
            ("member", COMING),
        )

    def viewer(self, login: str, member: str | None) -> Viewer:
        """Who that is while the organization's changing member has this role."""
        if login == ANYBODY:
            return Viewer()
        roles = {}
        if login == "ada":
            roles[self.organization_id] = Role.ADMIN
        if login == COMING and member is not None:
            roles[self.organization_id] = Role(member)
        user = {"_id": self.people[login].id, "is_operator": login == "ops"}
        return Viewer(user=user, roles=roles, scopes=frozenset(Permission))

    def permissions(self, model: Known, login: str) -> Derived:
        """What a viewer may do with it, as a set of names."""
        return self._once(("may", model.key, login), lambda: self._permissions(model, login))

    def _once(self, key: tuple[Any, ...], make: Callable[[], Derived]) -> Derived:
        if key not in self._derived:
            self._derived[key] = make()
        found: Derived = self._derived[key]
        return found

    def _permissions(self, model: Known, login: str) -> Derived:
        def follows(
            state: str | None, visibility: str, grant: str | None, member: str | None
        ) -> frozenset[str]:
            if state is None:
                return frozenset()
            grants = [{"actor_id": self.people[OUTSIDER].id, "role": grant}] if grant else []
            row: Row = {
                "state": state,
                "visibility": visibility,
                "owner_id": model.owner_id,
                "grants": grants,
            }
            found = self.viewer(login, member).on_model(row)
            return frozenset(permission.value for permission in found)

        return Derived(self.registers(model), follows)

    def visible(
        self, model: Known, login: str, states: tuple[str, ...] = (ACTIVE, ARCHIVED)
    ) -> Derived:
        """Whether a viewer finds it."""
        key = ("visible", model.key, login, states)
        return self._once(key, lambda: self._visible(model, login, states))

    def _visible(self, model: Known, login: str, states: tuple[str, ...]) -> Derived:
        may = self.permissions(model, login).follows

        def follows(state: str | None, *rights: Any) -> bool:
            held: Any = may(state, *rights)
            return state in states and "READ" in held

        return Derived(self.registers(model), follows)

    def listed(self, model: Known, login: str, wanted: "Wanted | None" = None) -> Derived:
        """Whether a list of a viewer has it."""
        key = ("listed", model.key, login, wanted and wanted.name)
        return self._once(key, lambda: self._listed(model, login, wanted))

    def lists(
        self, login: str, wanted: "Wanted | None" = None
    ) -> tuple[dict[str, Derived], dict[str, Derived]]:
        """Of all models: whether a list has it, and whether the viewer may see it."""
        begun = self.begun()
        key = ("lists", login, wanted and wanted.name, len(begun))
        if key not in self._derived:
            self._derived[key] = (
                {model.key: self.listed(model, login, wanted) for model in begun},
                {model.key: self.visible(model, login) for model in begun},
            )
        found: tuple[dict[str, Derived], dict[str, Derived]] = self._derived[key]
        return found

    def suggestions(self, login: str, owner: str) -> tuple[dict[str, Derived], dict[str, Derived]]:
        """The same of the completions of a login."""
        listed, rights = self.lists(login)
        own = {model.key for model in self.begun() if model.owner == owner}
        key = ("suggestions", login, owner, len(listed))
        if key not in self._derived:
            self._derived[key] = tuple(
                {name: of for name, of in each.items() if name in own} for each in (listed, rights)
            )
        found: tuple[dict[str, Derived], dict[str, Derived]] = self._derived[key]
        return found

    def _listed(self, model: Known, login: str, wanted: "Wanted | None") -> Derived:
        visible = self.visible(model, login, wanted.states if wanted else (ACTIVE,))
        if wanted is None:
            return visible

        def follows(value: Any, *rights: Any) -> bool:
            return wanted.fits(model, value) and bool(visible.follows(*rights))

        register = model.register(wanted.of, *wanted.more)
        return Derived((register, *visible.registers), follows)

    def draw(self) -> Known:
        """Some model that was there from the beginning, the first ones often."""
        models = [model for model in self.models.values() if model.key[0] != "c"]
        return models[min(int(self.chance.expovariate(0.45)), len(models) - 1)]

    def draw_any(self) -> Known:
        return self.chance.choice(self.begun())

    def begun(self) -> list[Known]:
        return [model for model in self.models.values() if model.is_begun]


@dataclass(frozen=True)
class Wanted:
    """What the models of a list have in common."""

    name: str
    of: str
    fits: Callable[[Known, Any], bool]
    filter: dict[str, Any]
    states: tuple[str, ...] = ("ACTIVE",)
    more: tuple[str, ...] = ()
    """Of the register."""


def with_tag(tag: str) -> Wanted:
    return Wanted(f"with {tag}", "tags", lambda _, tags: tag in tags, {"tags": {"hasAny": [tag]}})


def with_word(word: str) -> Wanted:
    """For `search`, not for `filter`."""
    return Wanted(
        f"of {word}", "summary", lambda _, summary: (summary or "").split()[:1] == [word], {}
    )


def of_owner(login: str) -> Wanted:
    return Wanted(
        f"of {login}", "tags", lambda model, _: model.owner == login, {"owner": {"eq": login}}
    )


def of_task(task: str) -> Wanted:
    return Wanted(f"of task {task}", "task", lambda _, found: found == task, {"task": {"eq": task}})


TASKS: Final = ("image", "text-generation")
BOTH: Final = (ACTIVE, ARCHIVED)
LISTS: Final = (
    *map(with_tag, TAGS),
    *map(of_task, TASKS),
    of_owner("ada"),
    of_owner(ORGANIZATION),
    Wanted(
        "without blue", "tags", lambda _, tags: "blue" not in tags, {"tags": {"hasNone": ["blue"]}}
    ),
    Wanted(
        "not of task image",
        "task",
        lambda _, found: found != "image",
        {"not": {"task": {"eq": "image"}}},
    ),
    Wanted(
        "with the alias prod",
        "alias",
        lambda _, number: number is not None,
        {"hasAlias": "prod"},
        more=("prod",),
    ),
    Wanted(
        "archived",
        "state",
        lambda _, state: state == ARCHIVED,
        {"state": [ARCHIVED]},
        states=BOTH,
    ),
    Wanted(
        "internal",
        "visibility",
        lambda _, visibility: visibility == "INTERNAL",
        {"visibility": ["INTERNAL"]},
    ),
    Wanted(
        "blue, of some",
        "tags",
        lambda _, tags: "blue" in tags,
        {"and": [{"tags": {"hasAny": ["blue"]}}, {"owner": {"in": ["ada", "ACME", "bob"]}}]},
    ),
)


async def make_world(database: Database, chance: Random, tokens: int) -> World:
    """In an empty database."""
    people, actors = {}, {}
    initial: dict[Register, Value] = {}
    for login in ("ada", "bob", COMING, "dan", OUTSIDER, "ops"):
        actor = await insert_actor(login, display_name=f"{login} 0", is_operator=login == "ops")
        _, token = await issue_token(database, actor.id, "all", list(Permission))
        people[login], actors[login] = Person(login, actor.id, token), actor
        initial["display", login] = f"{login} 0"
    acme = await insert_actor(ORGANIZATION, ActorKind.ORGANIZATION, display_name="acme 0")
    initial["display", ORGANIZATION] = "acme 0"
    await MembershipDocument(
        organization_id=acme.id, user_id=people["ada"].id, role=Role.ADMIN
    ).insert()
    world = World(people, acme.id, {}, [], chance, initial)
    initial["member", COMING] = None
    public, private = Visibility.PUBLIC, Visibility.PRIVATE
    for key, owner, visibility in (
        *((f"m{number}", actors["ada"], public) for number in range(4)),
        *((f"p{number}", acme, private) for number in range(2)),
        ("q0", actors["ada"], private),
        ("m4", acme, public),
        ("m5", actors["ada"], public),
    ):
        await _make_model(database, world, key, owner, visibility)
    for number in range(CREATED):
        model = Known(f"c{number}", "ada", actors["ada"].id)
        world.models[model.key] = model
        _begin(world, model, None, "PUBLIC", None, frozenset())
    for number in range(tokens):
        login = ("ada", "bob", OUTSIDER)[number % 3]
        document, text = await issue_token(
            database, people[login].id, f"to be revoked {number}", [Permission.READ]
        )
        world.tokens.append(Given(document.id, text, login))
        initial[world.tokens[-1].register] = True
    return world


async def _make_model(
    database: Database, world: World, key: str, owner: ActorDocument, visibility: Visibility
) -> None:
    model = Known(key, owner.login, owner.id)
    tags = frozenset({TAGS[0]}) if len(world.models) % 2 else frozenset()
    row = await insert_model(
        owner, key, visibility=visibility, summary=f"alpha {key}", tags=sorted(tags)
    )
    model.id, model.is_begun = row.id, True
    for number in range(1, VERSIONS + 1):
        version = await insert_version(database, row, {"a": 7}, label=f"{key} {number} 0")
        model.versions[number] = version.id
        world.initial[model.register("label", str(number))] = f"{key} {number} 0"
        world.initial[model.register("files", str(number))] = frozenset({"a"})
    world.models[key] = model
    _begin(world, model, ACTIVE, visibility.value, f"alpha {key}", tags)


def _begin(
    world: World,
    model: Known,
    state: str | None,
    visibility: str,
    summary: str | None,
    tags: frozenset[str],
) -> None:
    world.initial |= {
        model.register("state"): state,
        model.register("visibility"): visibility,
        model.register("summary"): summary,
        model.register("tags"): tags,
        model.register("card"): None,
        model.register("task"): None,
        model.register("versions"): frozenset(model.versions),
        model.register("grant", OUTSIDER): None,
        **{model.register("alias", alias): None for alias in ALIASES},
        **{model.register("like", login): False for login in LIKING},
    }


async def stored(database: Database, world: World, register: Register) -> Any:
    """What the database has now."""
    of, key, *more = register
    if of == "token":
        row = await database.data["tokens"].find_one({"_id": ObjectId(key)})
        return row is not None and row["revoked_at"] is None
    if of == "display":
        row = await database.data["actors"].find_one({"login_lower": key})
        return row and row["display_name"]
    if of == "member":
        row = await database.data["memberships"].find_one(
            {"organization_id": world.organization_id, "user_id": world.people[key].id}
        )
        return row and row["role"]
    model = world.models[key]
    if of == "like":
        like = {"user_id": world.people[more[0]].id, "model_id": model.id}
        return await database.data["likes"].find_one(like) is not None
    if of == "label":
        row = await database.data["versions"].find_one({"_id": model.versions[int(more[0])]})
        return row and row["label"]
    if of == "card":
        row = await database.data["cards"].find_one({"_id": model.id})
        return row and row["markdown"]
    if of == "versions":
        rows = database.data["versions"].find({"model_id": model.id})
        return frozenset([row["number"] async for row in rows])
    if of == "files":
        rows = database.data["files"].find({"version_id": model.versions[int(more[0])]})
        return frozenset([row["path"] async for row in rows])
    named = {"owner_login_lower": model.owner, "name_lower": model.name}
    row = await database.data["models"].find_one({"_id": model.id} if model.id else named)
    if row is None:
        return None
    if model.id is None:
        model.id = row["_id"]
    return _of_model(model, row, of, more)


def _of_model(model: Known, row: Row, of: str, more: list[str]) -> Any:
    if of == "grant":
        return row["grants"][0]["role"] if row["grants"] else None
    if of == "alias":
        numbers = {version_id: number for number, version_id in model.versions.items()}
        pointing = {alias["name"]: numbers[alias["version_id"]] for alias in row["aliases"]}
        return pointing.get(more[0])
    return frozenset(row["tags"]) if of == "tags" else row[of]
