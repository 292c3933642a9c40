"""Model files made by hand, byte by byte: as libraries write them, and as none of them would."""

import io
import json
import pickle
import struct
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # of PyTorch's files from before it used zip


class Call:
    """Pickled, it is a call of a function by its name."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def text(value: str) -> bytes:
    """The opcode that pushes it."""
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def import_and_call(module: str, name: str, argument: str = "x") -> bytes:
    """In protocol 0, so that it is plain text."""
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


def stack_global(module: bytes, name: bytes, argument: str = "x") -> bytes:
    """In protocol 4, by opcodes that push the names."""
    return b"\x80\x04" + module + name + b"\x93" + text(argument) + b"\x85R."


@dataclass(frozen=True)
class Member:
    """Of a zip archive. What is said in front of it and in the directory, where these differ."""

    name: bytes
    data: bytes
    packed: bytes | None = None  # None: as the method says
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    local_name: bytes | None = None
    local_flags: int | None = None
    local_method: int | None = None
    local_crc: int | None = None
    local_size: int | None = None
    at: int | None = None  # where the directory says that it is
    attributes: int = 0
    before: bytes = b""  # other data in front of it
    extra: bytes = b""  # in front of it alone, as PyTorch aligns its storages
    descriptor: bytes = b""


def deflated(name: str, data: bytes) -> Member:
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return Member(name.encode(), data, packer.compress(data) + packer.flush(), 8)


def zipped(
    members: Sequence[Member],
    *,
    comment: bytes = b"",
    count: int | None = None,
    gap: bytes = b"",
    wide: bool = False,
) -> bytes:
    body, directory = bytearray(), bytearray()
    for member in members:
        packed = member.data if member.packed is None else member.packed
        crc = zlib.crc32(member.data) if member.crc is None else member.crc
        size = len(member.data) if member.size is None else member.size
        name = member.name
        local: dict[str, Any] = {
            "name": name if member.local_name is None else member.local_name,
            "flags": member.flags if member.local_flags is None else member.local_flags,
            "method": member.method if member.local_method is None else member.local_method,
            "crc": crc if member.local_crc is None else member.local_crc,
            "size": size if member.local_size is None else member.local_size,
        }
        body += member.before
        at = len(body) if member.at is None else member.at
        streamed = bool(member.descriptor)
        body += struct.pack(
            "<4s5H3L2H",
            b"PK\x03\x04",
            20,
            local["flags"],
            local["method"],
            0,
            0x21,
            0 if streamed else local["crc"],
            0 if streamed else len(packed),
            0 if streamed else local["size"],
            len(local["name"]),
            len(member.extra),
        )
        body += local["name"] + member.extra + packed + member.descriptor
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\x01\x02",
            0x0314,
            20,
            member.flags,
            member.method,
            0,
            0x21,
            crc,
            len(packed),
            size,
            len(name),
            0,
            0,
            0,
            0,
            member.attributes,
            at,
        )
        directory += name
    body += gap
    start = len(body)
    number = len(members) if count is None else count
    end = b""
    if wide:
        end = struct.pack(
            "<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, number, number, len(directory), start
        ) + struct.pack("<4sLQL", b"PK\x06\x07", 0, start + len(directory), 1)
        number, start = 0xFFFF, 0xFFFF_FFFF
    end += struct.pack(
        "<4s4H2LH", b"PK\x05\x06", 0, 0, number, number, len(directory), start, len(comment)
    )
    return bytes(body + directory + end + comment)


def torch_zip(pickled: bytes, *storages: bytes, **changes: Any) -> bytes:
    """As torch.save writes: nothing packed, sizes behind the members, storages aligned to 64 bytes."""
    members = [
        Member(b"archive/data.pkl", pickled),
        Member(b"archive/byteorder", b"little"),
        *(Member(f"archive/data/{n}".encode(), data) for n, data in enumerate(storages)),
        Member(b"archive/version", b"3\n"),
        Member(b"archive/.data/serialization_id", b"1" * 40),
    ]
    written, at = [], 0
    for member in members:
        crc = zlib.crc32(member.data)
        head = 30 + len(member.name)
        padding = -(at + head + 4) % 64
        streamed = replace(
            member,
            flags=0x808,
            extra=struct.pack("<2sH", b"FB", padding) + b"Z" * padding,
            descriptor=struct.pack("<4s3L", b"PK\x07\x08", crc, len(member.data), len(member.data)),
        )
        at += head + 4 + padding + len(member.data) + 16
        written.append(streamed)
    written[0] = replace(written[0], **changes)
    return zipped(written)


def torch_pickle(tensors: dict[str, list[int]], extra: bytes = b"") -> bytes:
    """A state dict of float32 tensors, in the opcodes that torch.save writes."""
    out = b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01("
    for number, (name, shape) in enumerate(tensors.items()):
        elements = 1
        for dimension in shape:
            elements *= dimension
        strides: list[int] = []
        step = 1
        for dimension in reversed(shape):
            strides.insert(0, step)
            step *= dimension
        out += text(name)
        out += b"ctorch._utils\n_rebuild_tensor_v2\n((" + text("storage")
        out += b"ctorch\nFloatStorage\n" + text(str(number)) + text("cpu") + _integer(elements)
        out += b"tQK\x00" + _tuple(shape) + _tuple(strides)
        out += b"\x89ccollections\nOrderedDict\n)RtR"
    return out + extra + b"u."


def _integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def _tuple(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(_integer(value) for value in values) + b"t"


def legacy_torch(pickled: bytes, keys: Sequence[str] = (), storages: bytes = b"") -> bytes:
    """As torch.save wrote before it used zip."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}
    first = [pickle.dumps(each, 2) for each in (MAGIC_NUMBER, 1001, system)]
    return b"".join(first) + pickled + pickle.dumps(list(keys), 2) + storages


def safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def gguf(values: bytes = b"", count: int = 0, tensors: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + values


def gguf_key(name: str) -> bytes:
    raw = name.encode()
    return struct.pack("<Q", len(raw)) + raw


def tar(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def tar_of(*entries: tarfile.TarInfo) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for entry in entries:
            archive.addfile(entry)
    return file.getvalue()


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def keras_zip(config: Any, **members: bytes) -> bytes:
    return zipped(
        [
            Member(b"metadata.json", json.dumps({"keras_version": "3.8.0"}).encode()),
            Member(b"config.json", json.dumps(config).encode()),
            *(Member(name.encode(), data) for name, data in members.items()),
        ]
    )


def numpy_file(header: str, data: bytes = b"") -> bytes:
    raw = header.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data
