"""HDF5 as Keras and h5py write it: its datasets by name, type and shape, and attributes of its root.

https://docs.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html. What large groups and attributes
may lie in instead (fractal heaps) is not gone into: `is_whole` is False then.
"""

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from modelharbor.inspection.source import Malformed, Source

from .headers import text
from .parsed import MOST_COUNT, product
from .window import Window

SIGNATURE: Final = b"\x89HDF\r\n\x1a\n"
MOST_OBJECTS: Final = 20_000
MOST_STEPS: Final = 300_000  # messages, links and nodes that are gone through: some may be the same
MOST_NAME_BYTES: Final = 4096
SHOWN_PATH: Final = 512
MOST_ATTRIBUTE_BYTES: Final = 16 * 1024 * 1024
MOST_DIMENSIONS: Final = 32
DEEPEST_GROUP: Final = 32
DEEPEST_TREE: Final = 8
MOST_PACKED: Final = 1100  # how much deflate packs at the best
CHUNK_BYTES: Final = 16 * 1024
_PICKLED: Final = re.compile(rb"\x80[\x00-\x05].*\.\Z|[(cildVSFIL\]}N].*\n.*\.\Z", re.DOTALL)
UNDEFINED: Final = 2**64 - 1  # an address of nothing

DATASPACE, LINK_INFO, DATATYPE, LINK, EXTERNAL_FILES, LAYOUT = 0x1, 0x2, 0x3, 0x6, 0x7, 0x8
ATTRIBUTE, CONTINUATION, SYMBOL_TABLE, ATTRIBUTE_INFO = 0xC, 0x10, 0x11, 0x15
CONTIGUOUS, CHUNKED, VIRTUAL = 1, 2, 3
_INTEGER, _FLOAT, _TEXT, _BITS, _ENUM, _VARIABLE = 0, 1, 3, 4, 8, 9


@dataclass(frozen=True, slots=True)
class Dataset:
    path: str
    dtype: str | None  # None where it is not of numbers
    shape: list[int]
    elements: int


@dataclass(frozen=True, slots=True)
class _Message:
    kind: int
    start: int
    size: int
    is_shared: bool


class Hdf5:
    """One walk over a file. What is in other files is not looked for, but told of by `elsewhere`."""

    def __init__(self, source: Source, wanted: frozenset[str] = frozenset()) -> None:
        self.datasets: list[Dataset] = []
        self.attributes: dict[str, bytes] = {}  # of the root, those wanted that are texts
        self.elsewhere: list[str] = []  # paths of what lies in other files
        self.pickled: list[str] = []  # attributes that PyTables would unpickle
        self.is_whole = True
        self._wanted = wanted
        self._window = Window(source, CHUNK_BYTES)
        self._size = source.size
        self._objects: set[int] = set()
        self._steps = 0

    def run(self) -> None:
        if self._window.read(0, 8) != SIGNATURE:
            raise self._wrong("signature", "The file does not start as HDF5 does.", 0)
        version = self._number(8, 1)
        if version in (0, 1):
            widths, base = self._window.read(13, 2), 24 + 4 * version
            root = base + 32 + 8
        elif version in (2, 3):
            widths, base = self._window.read(9, 2), 12
            root = base + 24
        else:
            raise self._wrong("version", f"Version {version} is not known.", 8)
        if widths != b"\x08\x08" or self._number(base, 8) != 0:
            self.is_whole = False
            return
        if self._number(base + 16, 8) > self._size:
            raise self._wrong("truncated", "The file ends before its contents do.", self._size)
        self._object(self._number(root, 8), "", 0)

    def _object(self, address: int, path: str, depth: int) -> None:
        if address in self._objects:
            return
        self._objects.add(address)
        if len(self._objects) > MOST_OBJECTS:
            raise self._wrong(
                "too_many_objects", f"There are over {MOST_OBJECTS:,} objects.", address
            )
        if depth > DEEPEST_GROUP:
            raise self._wrong("nesting", f"Groups lie deeper than {DEEPEST_GROUP} levels.", address)
        messages = list(self._messages_of(address))
        kinds = {message.kind: message for message in messages}
        for message in messages:
            if message.kind == SYMBOL_TABLE:
                tree, heap = self._number(message.start, 8), self._number(message.start + 8, 8)
                for name, child in self._symbols(tree, heap, path):
                    self._object(child, f"{path}/{name}" if path else name, depth + 1)
            elif message.kind == LINK:
                self._link(message, path, depth)
            elif message.kind in (LINK_INFO, ATTRIBUTE_INFO):
                self._check_compact(message)
            elif message.kind == EXTERNAL_FILES:
                self.elsewhere.append(path[:SHOWN_PATH])
            elif message.kind == ATTRIBUTE:
                self._attribute(message, path)
        if DATASPACE in kinds and DATATYPE in kinds and LAYOUT in kinds:
            self._dataset(path, kinds)

    def _messages_of(self, address: int) -> Iterator[_Message]:
        """Those of an object's header, also where it goes on elsewhere."""
        if self._window.read(address, 4) == b"OHDR":
            flags = self._number(address + 5, 1)
            at = address + 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
            width = 1 << (flags & 3)
            blocks = [(at + width, self._number(at, width))]
            prefix, is_new = (6 if flags & 4 else 4), True
        else:
            if self._number(address, 1) != 1:
                raise self._broken(address)
            blocks = [(address + 16, self._number(address + 8, 4))]
            prefix, is_new = 8, False
        seen = set()
        for start, size in blocks:  # grows on the way
            if start in seen or start + size > self._size:
                raise self._broken(start)
            seen.add(start)
            at, end = start, start + size
            while at + prefix <= end:
                self._step(at)
                head = self._window.read(at, prefix)
                if is_new:
                    kind, length, flags = head[0], int.from_bytes(head[1:3], "little"), head[3]
                else:
                    kind, length, flags, _ = struct.unpack("<HHB3s", head)
                at += prefix
                if at + length > end:
                    raise self._broken(at)
                if kind == CONTINUATION:
                    start_of, size_of = self._number(at, 8), self._number(at + 8, 8)
                    # The new kind has a signature in front, and both kinds end in a checksum or not.
                    blocks.append((start_of + 4, size_of - 8) if is_new else (start_of, size_of))
                elif kind:
                    yield _Message(kind, at, length, bool(flags & 2))
                at += length

    def _symbols(self, tree: int, heap: int, path: str) -> Iterator[tuple[str, int]]:
        """Names and addresses of what a group holds, in the older way."""
        if self._window.read(heap, 4) != b"HEAP":
            raise self._broken(heap)
        heap_size, names = self._number(heap + 8, 8), self._number(heap + 24, 8)
        left = [(tree, 0)]
        while left:
            node, depth = left.pop()
            self._step(node)
            if depth > DEEPEST_TREE:
                raise self._wrong("nesting", "The tree of a group is too deep.", node)
            signature = self._window.read(node, 4)
            if signature == b"TREE":
                count = self._number(node + 6, 2)
                self._step(node, count)
                left += [
                    (self._number(node + 24 + 8 + 16 * each, 8), depth + 1)
                    for each in reversed(range(count))
                ]
            elif signature == b"SNOD":
                for each in range(self._number(node + 6, 2)):
                    entry = node + 8 + 40 * each
                    self._step(entry)
                    offset = self._number(entry, 8)
                    if offset >= heap_size:
                        raise self._broken(entry)
                    # A link by a name (2) has no address; what it names is met by its own.
                    if self._number(entry + 16, 4) != 2:
                        yield self._name(names + offset), self._number(entry + 8, 8)
            else:
                raise self._broken(node)

    def _name(self, at: int) -> str:
        length = min(MOST_NAME_BYTES, self._size - at)
        if length <= 0:
            raise self._broken(at)
        name, end, _ = self._window.read(at, length).partition(b"\0")
        if not end:
            raise self._broken(at)
        return name.decode("utf-8", "replace")

    def _link(self, message: _Message, path: str, depth: int) -> None:
        flags = self._number(message.start + 1, 1)
        at = message.start + 2
        kind = 0
        if flags & 8:
            kind, at = self._number(at, 1), at + 1
        at += (8 if flags & 4 else 0) + (1 if flags & 0x10 else 0)
        width = 1 << (flags & 3)
        length, at = self._number(at, width), at + width
        if length > MOST_NAME_BYTES or at + length > message.start + message.size:
            raise self._broken(at)
        name = self._window.read(at, length).decode("utf-8", "replace")
        whole = f"{path}/{name}" if path else name
        if kind == 0:
            self._object(self._number(at + length, 8), whole, depth + 1)
        elif kind != 1:  # an external link, or one of a kind that only a plugin follows
            self.elsewhere.append(whole[:SHOWN_PATH])

    def _check_compact(self, message: _Message) -> None:
        flags = self._number(message.start + 1, 1)
        counter = (8 if message.kind == LINK_INFO else 2) if flags & 1 else 0
        if self._number(message.start + 2 + counter, 8) != UNDEFINED:
            self.is_whole = False

    def _attribute(self, message: _Message, path: str) -> None:
        version, flags, name_size, type_size, space_size = struct.unpack(
            "<BBHHH", self._window.read(message.start, 8)
        )
        at, end = message.start + (9 if version == 3 else 8), message.start + message.size
        if version not in (1, 2, 3) or message.is_shared or (version > 1 and flags & 3):
            self.is_whole = False
            return
        sizes = [name_size, type_size, space_size]
        if version == 1:
            sizes = [-(-size // 8) * 8 for size in sizes]
        of_type, of_space = at + sizes[0], at + sizes[0] + sizes[1]
        data = of_space + sizes[2]
        if data > end or type_size < 8:
            raise self._broken(at)
        name = self._window.read(at, name_size).partition(b"\0")[0].decode("utf-8", "replace")
        kind, item = self._number(of_type, 1) & 0xF, self._number(of_type + 4, 4)
        if kind == _TEXT and 0 < item <= end - data:
            value = self._window.read(data, item).rstrip(b"\0")
            if _PICKLED.match(value) or (name == "PSEUDOATOM" and value == b"object"):
                self.pickled.append(f"{path}@{name}"[:SHOWN_PATH])
        if path or name not in self._wanted or self._number(of_space + 1, 1) != 0:  # not one text
            return
        if name in self.attributes:
            raise self._wrong("duplicate_attribute", f"{name!r} is there twice.", at)
        if kind == _TEXT and data + item <= end:
            self.attributes[name] = self._window.read(data, item).rstrip(b"\0")
        elif kind == _VARIABLE and data + 16 <= end:
            length, address, index = struct.unpack("<IQI", self._window.read(data, 16))
            found = self._in_heap(address, index)
            if found is not None:
                self.attributes[name] = found[:length]

    def _in_heap(self, address: int, index: int) -> bytes | None:
        """An object of a global heap, within bounds."""
        if self._window.read(address, 4) != b"GCOL":
            raise self._broken(address)
        at, end = address + 16, address + self._number(address + 8, 8)
        while at + 16 <= end:
            self._step(at)
            number, size = self._number(at, 2), self._number(at + 8, 8)
            if number == 0:
                break
            if number == index:
                if size > MOST_ATTRIBUTE_BYTES:
                    self.is_whole = False
                    return None
                return self._window.read(at + 16, size)
            at += 16 + -(-size // 8) * 8
        raise self._broken(address)

    def _dataset(self, path: str, kinds: dict[int, _Message]) -> None:
        if kinds[DATATYPE].is_shared or kinds[DATASPACE].is_shared:
            self.is_whole = False
            return
        shape = self._shape(kinds[DATASPACE])
        elements = product(shape, "hdf5.shape", kinds[DATASPACE].start)
        dtype, item = self._type(kinds[DATATYPE])
        size = elements * item
        if size > MOST_COUNT:
            raise self._wrong(
                "shape", "A dataset has more bytes than can be counted.", kinds[DATASPACE].start
            )
        layout = kinds[LAYOUT]
        version, kind = self._window.read(layout.start, 2)
        if version >= 3 and kind == VIRTUAL:
            self.elsewhere.append(path[:SHOWN_PATH])
        elif version >= 3 and kind == CONTIGUOUS and EXTERNAL_FILES not in kinds:
            address, held = self._number(layout.start + 2, 8), self._number(layout.start + 10, 8)
            if size and (address == UNDEFINED or held < size or address + size > self._size):
                raise self._wrong(
                    "size", f"The bytes of {text(path, 100)!r} are not there.", layout.start
                )
        elif size > MOST_PACKED * self._size:
            raise self._wrong(
                "size", f"{text(path, 100)!r} claims more than can be packed.", layout.start
            )
        self.datasets.append(Dataset(path[:SHOWN_PATH], dtype, shape, elements))

    def _shape(self, message: _Message) -> list[int]:
        version, rank = self._window.read(message.start, 2)
        if version not in (1, 2) or rank > MOST_DIMENSIONS:
            raise self._broken(message.start)
        at = message.start + (8 if version == 1 else 4)
        if version == 2 and self._number(message.start + 3, 1) == 2:
            return [0]  # of nothing
        if at + 8 * rank > message.start + message.size:
            raise self._broken(at)
        return [self._number(at + 8 * each, 8) for each in range(rank)]

    def _type(self, message: _Message) -> tuple[str | None, int]:
        kind, bits, _, _, item = struct.unpack("<BBBBI", self._window.read(message.start, 8))
        match kind & 0xF:
            case 0:
                return f"{'int' if bits & 8 else 'uint'}{8 * item}", item
            case 1:
                return f"float{8 * item}", item
            case 8:
                return "bool" if item == 1 else None, item
        return None, item

    def _step(self, at: int, count: int = 1) -> None:
        self._steps += count
        if self._steps > MOST_STEPS:
            raise self._wrong("too_many_objects", "The structures of the file are too many.", at)

    def _number(self, at: int, width: int) -> int:
        index = self._window.at(at, width)
        return int.from_bytes(self._window.buffer[index : index + width], "little")

    def _broken(self, at: int) -> Malformed:
        return self._wrong("broken", "The structures of the file do not fit together.", at)

    def _wrong(self, rule: str, detail: str, at: int) -> Malformed:
        """`at` may have been read from the file, and be anywhere."""
        return Malformed(f"hdf5.{rule}", detail, min(at, self._size))
