"""Pickles, opcode by opcode: what would be imported and called, and where the unpickler would end."""

import io
import pickle
import pickletools
import random
import struct
from typing import Any

import pytest
from picklescan.scanner import (  # type: ignore[import-untyped]  # it has no types
    SafetyLevel,
    scan_pickle_bytes,
)

from modelharbor.inspection.pickles import (
    HARMLESS,
    Judgement,
    Walk,
    judge,
    scan_pickles,
    walk_pickle,
)
from modelharbor.inspection.reports import Report
from modelharbor.inspection.source import of_bytes
from tests.inspection.crafting import Call, import_and_call, text
from tests.inspection.test_inspecting import PLAIN


def walked(contents: bytes) -> Walk:
    return walk_pickle(of_bytes(contents), 0, Report())


def rules(contents: bytes, *, sure: bool = True) -> list[str]:
    report = Report()
    scan_pickles(of_bytes(contents), report, sure=sure)
    return [each.rule for each in report.findings()]


@pytest.mark.parametrize(
    ("module", "name", "expected"),
    [
        ("collections", "OrderedDict", Judgement.HARMLESS),
        ("torch._utils", "_rebuild_tensor_v2", Judgement.HARMLESS),
        ("torch", "bfloat16", Judgement.HARMLESS),
        ("numpy._core.multiarray", "_reconstruct", Judgement.HARMLESS),
        ("numpy.core.multiarray", "scalar", Judgement.HARMLESS),
        ("__builtin__", "set", Judgement.HARMLESS),
        ("uuid", "UUID", Judgement.HARMLESS),
        ("uuid", "_get_command_stdout", Judgement.DANGEROUS),
        ("os", "system", Judgement.DANGEROUS),
        ("os.path", "join", Judgement.DANGEROUS),
        ("builtins", "getattr", Judgement.DANGEROUS),
        ("builtins", "__import__", Judgement.DANGEROUS),
        ("__builtin__", "apply", Judgement.DANGEROUS),
        ("copy_reg", "_reconstructor", Judgement.HARMLESS),
        ("urllib", "urlopen", Judgement.DANGEROUS),  # of Python 2: urllib.request
        ("commands", "getstatusoutput", Judgement.DANGEROUS),
        ("importlib", "import_module", Judgement.DANGEROUS),
        ("importlib.util", "find_spec", Judgement.DANGEROUS),
        ("types", "CodeType", Judgement.DANGEROUS),
        ("types", "SimpleNamespace", Judgement.HARMLESS),
        ("builtins", "type", Judgement.UNKNOWN),
        ("torch.storage", "_load_from_bytes", Judgement.UNKNOWN),
        ("sklearn.linear_model._base", "LinearRegression", Judgement.UNKNOWN),
        ("fasttext.unknown_words", "Table", Judgement.UNKNOWN),
        ("collections", "OrderedDict.fromkeys", Judgement.UNKNOWN),
        ("", "", Judgement.UNKNOWN),
        ("a\nb", "c\ud800", Judgement.UNKNOWN),
    ],
)
def test_judgement(module: str, name: str, expected: Judgement) -> None:
    assert judge(module, name) is expected


def test_nothing_harmless_is_known_to_be_dangerous_elsewhere() -> None:
    """Where picklescan forbids all of a module, each exception is one that was thought about."""
    exceptions = []
    for module, names in HARMLESS.items():
        for name in names:
            found = scan_pickle_bytes(io.BytesIO(f"c{module}\n{name}\n.".encode()), "").globals
            if any(each.safety is SafetyLevel.Dangerous for each in found):
                exceptions.append((module, name))
    assert sorted(exceptions) == [("uuid", "SafeUUID"), ("uuid", "UUID")]


@pytest.mark.parametrize("protocol", range(6))
def test_the_walk_ends_where_the_pickle_does(protocol: int) -> None:
    contents = pickle.dumps(PLAIN, protocol)
    walk = walked(contents + b"more")
    assert (walk.end, walk.why) == (len(contents), "")
    expected = {
        tuple(str(argument).split(" "))
        for opcode, argument, _ in pickletools.genops(contents)
        if opcode.name == "GLOBAL"
    }
    assert expected <= set(walk.imports)
    if protocol >= 4:
        assert ("collections", "OrderedDict") in walk.imports
    assert (walk.hidden, walk.extension) == (None, None)


def test_imports_have_their_places() -> None:
    contents = b"\x80\x02cos\nsystem\n0cacme\nboot\n."
    assert walked(contents).imports == {("os", "system"): 2, ("acme", "boot"): 14}


class Watching(pickle._Unpickler):
    """Python's own in Python, which can be watched: imports nothing, notes what it would."""

    def __init__(self, contents: bytes) -> None:
        super().__init__(io.BytesIO(contents))
        self.asked: list[tuple[str, str]] = []

    def find_class(self, module: str, name: str) -> Any:
        self.asked.append((module, name))
        return Anything

    def persistent_load(self, _: Any) -> Any:
        return Anything()

    def get_extension(self, _: int) -> None:
        self.append(Anything)  # type: ignore[attr-defined]  # it is made by load


class WatchingInC(pickle.Unpickler):
    """The one that everybody uses."""

    def __init__(self, contents: bytes) -> None:
        super().__init__(io.BytesIO(contents))
        self.asked: list[tuple[str, str]] = []

    def find_class(self, module: str, name: str) -> Any:
        self.asked.append((module, name))
        return Anything

    def persistent_load(self, _: Any) -> Any:
        return Anything()


class Anything:
    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __call__(self, *_: Any) -> "Anything":
        return Anything()

    def append(self, _: Any) -> None:
        pass

    add = append

    def extend(self, _: Any) -> None:
        pass

    update = extend

    def __setitem__(self, _: Any, __: Any) -> None:
        pass


@pytest.mark.parametrize("kind", [Watching, WatchingInC])
def test_it_sees_all_that_the_unpickler_would_import(kind: type[Watching]) -> None:
    """Random opcodes: whatever Python's own unpickler asks for, the walk has seen, under that name or
    as something hidden; and it never says broken before the unpickler does."""
    random_numbers = random.Random(7)
    pushes = [
        b"N", b"I1\n", b"K\x01", b")", b"]", b"}", b"(", b"(", text("os"), text("system"), text("a"),
        b"\x8c\x01b", b"S'c'\n", b"U\x01d", b"Vsys\\u0074em\n", b"h\x00", b"h\x01", b"g0\n", b"C\x01x",
        b"cos\nsystem\n", b"ccollections\nOrderedDict\n",
    ]  # fmt: skip
    changes = [
        b"0", b"1", b"2", b"t", b"l", b"d", b"a", b"e", b"s", b"u", b"\x85", b"\x86", b"\x87", b"q\x00",
        b"p1\n", b"\x94", b"R", b"b", b"\x81", b"o", b"ios\nsystem\n", b"\x93", b"\x93", b".", b"\x8f",
        b"\x90", b"\x91", b"Q", b"\x82\x01", b"\x95\x02\x00\x00\x00\x00\x00\x00\x00",
    ]  # fmt: skip
    asked_for = 0
    for _ in range(6000):
        number = random_numbers.randrange(3, 14)
        contents = b"".join(
            random_numbers.choice(pushes if random_numbers.random() < 0.6 else changes)
            for _ in range(number)
        )
        contents += random_numbers.choice((b".", b"", b"\xff"))
        unpickler = kind(contents)
        ended = False
        try:
            unpickler.load()
            ended = True
        except Exception:  # each is where it ends
            pass
        walk = walked(contents)
        asked_for += len(unpickler.asked)
        for each in unpickler.asked:
            seen = each in walk.imports or walk.hidden is not None
            assert seen or walk.frame is not None, contents
        if ended:
            assert walk.end is not None or walk.frame is not None, contents
    assert asked_for > 500


@pytest.mark.parametrize(
    ("contents", "sure", "expected"),
    [
        (b"N.", True, []),
        (b"N.", False, []),
        (b"cat\ndog\n.", False, ["pickle.import.unknown"]),
        (b"cat\ndog\n.\nmore words\n", False, []),
        (b"cat\ndog\nbird\n", False, []),
        (import_and_call("acme", "boot"), False, ["pickle.import.unknown"]),
        (pickle.dumps([1], 2) + b"\n", True, ["pickle.trailing"]),
        (b"\x80\x02", True, ["pickle.malformed"]),
        (b"", True, []),
    ],
)
def test_what_counts_as_a_pickle(contents: bytes, sure: bool, expected: list[str]) -> None:
    assert rules(contents, sure=sure) == expected


def test_many_imports_are_counted() -> None:
    contents = b"".join(f"cacme{n}\nboot\n0".encode() for n in range(50)) + b"N."
    report = Report()
    scan_pickles(of_bytes(b"\x80\x02" + contents), report)
    found = report.findings()
    assert len(found) == 11
    assert found[-1].detail == "There are 50 of these in all."


def test_names_are_shown_printable_and_short() -> None:
    contents = b"\x80\x04" + text("a\x1b[31m\n" + "b" * 200) + text("c") + b"\x93."
    report = Report()
    scan_pickles(of_bytes(contents), report)
    detail = report.findings()[0].detail
    assert "\x1b" not in detail
    assert "\n" not in detail
    assert len(detail) < 250


def test_arguments_are_not_read_that_nobody_needs() -> None:
    contents = b"\x80\x04\x8e" + struct.pack("<Q", 50_000_000) + bytes(50_000_000) + b"."
    read = 0

    class Counting:
        def __call__(self, start: int, length: int) -> bytes:
            nonlocal read
            read += length
            return contents[start : start + length]

    source = of_bytes(contents)
    source._read_at = Counting()
    assert walk_pickle(source, 0, Report()).end == len(contents)
    assert read < 10_000


def test_calls_are_dumped_as_calls() -> None:
    assert walked(pickle.dumps(Call(print, "x"), 4)).imports == {("builtins", "print"): 30}
