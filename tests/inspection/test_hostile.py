"""Files that want to do harm, each through the real fence: what is found, and that nothing happens."""

import bz2
import gzip
import io
import json
import lzma
import operator
import os
import pickle
import struct
import subprocess
import tarfile
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest

from modelharbor.inspection.fence import Fence, open_fence
from modelharbor.settings import Settings
from tests.inspection.crafting import (
    Call,
    Member,
    deflated,
    gguf,
    gguf_key,
    import_and_call,
    keras_zip,
    legacy_torch,
    link,
    numpy_file,
    safetensors,
    stack_global,
    tar,
    tar_of,
    text,
    torch_pickle,
    torch_zip,
    zipped,
)

pytestmark = pytest.mark.anyio
CANARY = Path(tempfile.gettempdir()) / f"modelharbor-canary-{os.getpid()}"
TOUCH = f"touch {CANARY}"
EVIL = pickle.dumps(Call(os.system, TOUCH), 2)
EVIL_TEXT = import_and_call("os", "system", TOUCH)
GOOD = pickle.dumps({"epoch": 3, "loss": [0.5, 0.25]}, 2)
STATE = torch_pickle({"weight": [2, 3]})
WEIGHTS = bytes(24)
UNSAFE, SUSPICIOUS, ERROR = "UNSAFE", "SUSPICIOUS", "ERROR"
DANGEROUS, UNKNOWN = "pickle.import.dangerous", "pickle.import.unknown"
GOOD_SAFETENSORS = safetensors(
    {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)
)


def npy_of_objects(pickled: bytes) -> bytes:
    return numpy_file("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }\n", pickled)


def onnx_file(change: Callable[[Any], None]) -> bytes:
    import onnx

    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [2], [1.0, 2.0])
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    model = onnx.helper.make_model(graph, producer_name="pytorch")
    change(model.graph.initializer[0])
    return bytes(model.SerializeToString())


def external(location: str) -> Callable[[Any], None]:
    def change(tensor: Any) -> None:
        tensor.ClearField("float_data")
        tensor.data_location = 1
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", location

    return change


def huge_dimensions(tensor: Any) -> None:
    tensor.dims[:] = [2**62, 2**62]


def lambda_hdf5() -> bytes:
    config = {"class_name": "Functional", "config": {"layers": [{"class_name": "Lambda"}]}}
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened.attrs["model_config"] = json.dumps(config)
    return file.getvalue()


def overlapping() -> bytes:
    """As in 42.zip's successor: many members of the same bytes."""
    data = bytes(100)
    return zipped(
        [Member(b"a", data), *(Member(b"%d" % n, b"", data, size=100, at=0) for n in range(3))]
    )


def nested(depth: int, inner: bytes) -> bytes:
    for _ in range(depth):
        inner = zipped([Member(b"inner.zip", inner)])
    return inner


def slipping(name: bytes) -> bytes:
    return zipped([Member(name, b"x")])


def many_tensors() -> bytes:
    entries = ",".join(
        f'"t{n}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for n in range(600_000)
    )
    return safetensors(b"{" + entries.encode() + b"}")


def hidden_by_a_frame() -> bytes:
    """A text that reaches beyond its frame: the unpickler in C leaves two bytes of it out, and what is
    the beginning of another text for everyone else is then the end of this one."""
    frame = b"\x8c\x08ab"
    evil = EVIL_TEXT[:-1]
    hidden = b"U" + bytes([len(evil)]) + evil + b"."
    return b"\x80\x04\x95" + struct.pack("<Q", len(frame)) + frame + b"uvwxyz" + hidden


def joblib_like() -> bytes:
    """Bytes of an array in the middle of a pickle, and a call after them."""
    wrapper = b"\x80\x04" + text("joblib.numpy_pickle") + text("NumpyArrayWrapper") + b"\x93)\x81}b"
    return wrapper + bytes(range(64)) + EVIL_TEXT


def tensors_of(*spans: tuple[int, int], shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {
        f"t{n}": {"dtype": "F32", "shape": list(shape), "data_offsets": list(span)}
        for n, span in enumerate(spans)
    }


def number_of_zeros() -> bytes:
    """Names from the memo, by numbers whose beginnings are those of harmless ones."""
    named = {0: "collections", 1: "OrderedDict", 2: "os", 10: "system"}
    puts = b"".join(text(name) + b"q" + bytes([key]) + b"0" for key, name in named.items())
    gets = b"g" + b"0" * 4096 + b"2\ng" + b"0" * 4095 + b"10\n"
    return b"\x80\x04" + puts + gets + b"\x93" + text(TOUCH) + b"\x85R."


def tar_header(name: bytes, size: int, kind: bytes = b"0", summed: str = "unsigned") -> bytes:
    """Of the oldest kind, which has no sign."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:124] = b"0000644\0" + b"0000000\0" * 2
    header[124:148] = b"%011o\0" % size + b"00000000000\0"
    header[148:157] = b" " * 8 + kind
    total = sum(header) if summed != "signed" else sum(struct.unpack("512b", header))
    header[148:156] = b"%05o\00077" % total if summed == "and more" else b"%06o\0 " % total
    return bytes(header)


def old_tar(name: bytes = b"pickle", summed: str = "unsigned") -> bytes:
    padding = bytes(-len(EVIL) % 512)
    return tar_header(name, len(EVIL), summed=summed) + EVIL + padding + bytes(1024)


def tar_of_folder() -> bytes:
    """Some readers skip the bytes that a folder says to have, others read members there."""
    return tar_header(b"folder", 512 * 8, b"5") + b"\x01" * 512 + old_tar() + bytes(4096)


def tar_of_sizes() -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as opened:
        entry = tarfile.TarInfo("weights")
        entry.pax_headers = {"size": "0", "comment": "x"}
        opened.addfile(entry)
    return archive.getvalue()


def tar_with_a_long_link() -> bytes:
    return tar_of(link("l", "../" * 50 + "etc/passwd"))


def hdf5_behind(front: bytes, at: int) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.h5")
        with h5py.File(path, "w", userblock_size=at) as file:
            file.attrs["model_config"] = json.dumps({"class_name": "Lambda"})
        contents = front.ljust(at) + path.read_bytes()[at:]
        path.write_bytes(contents)
        with h5py.File(path) as file:
            assert "model_config" in file.attrs
    return contents


def hdf5_in_safetensors() -> bytes:
    inner = hdf5_behind(b"", 1024)[1024:]
    header = {"w": {"dtype": "U8", "shape": [len(inner)], "data_offsets": [0, len(inner)]}}
    return safetensors(json.dumps(header).encode().ljust(1024 - 8), inner)


def pickled_attribute() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened.create_group("g").attrs["TITLE"] = np.bytes_(EVIL)
    return file.getvalue()


def in_safetensors(data: bytes) -> bytes:
    header = {"w": {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}}
    return safetensors(header, data)


LAMBDA_ZIP = keras_zip({"class_name": "Lambda", "config": {}})
END_AT = len(LAMBDA_ZIP) - 22


def lambda_zip_of_no_members() -> bytes:
    """Python's reader goes by the size of the directory, whatever their number is said to be."""
    return in_safetensors(LAMBDA_ZIP[: END_AT + 8] + bytes(4) + LAMBDA_ZIP[END_AT + 12 :])


def lambda_zip_from_behind_itself() -> bytes:
    """All places are too large by the same number, which Python's reader takes off."""
    changed, by = bytearray(LAMBDA_ZIP), 10_000
    _, at = struct.unpack_from("<2L", changed, END_AT + 12)
    struct.pack_into("<L", changed, END_AT + 16, at + by)
    while at < END_AT:
        lengths = struct.unpack_from("<3H", changed, at + 28)
        (place,) = struct.unpack_from("<L", changed, at + 42)
        struct.pack_into("<L", changed, at + 42, place + by)
        at += 46 + sum(lengths)
    return in_safetensors(bytes(changed))


def two_wide_directories() -> bytes:
    """One right before its locator, the other where that says."""
    contents = bytearray(zipped([Member(b"archive/data.pkl", GOOD)], wide=True))
    struct.pack_into("<Q", contents, len(contents) - 22 - 20 + 8, 8)
    return bytes(contents)


def keras_operation(function: str) -> bytes:
    return keras_zip({"class_name": "TFOpLambda", "config": {"function": function}})


PE = b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\x00\x00" + bytes(100)
ELF = b"\x7fELF\x02\x01\x01" + bytes(100)
ZIP = zipped([Member(b"a.txt", b"text")])
CASES: dict[str, tuple[Callable[[], bytes], str, str]] = {
    # Pickles: what is called.
    **{
        f"os_system_in_protocol_{number}": (
            partial(pickle.dumps, Call(os.system, TOUCH), number),
            UNSAFE,
            DANGEROUS,
        )
        for number in range(6)
    },
    "stacked": (lambda: GOOD + EVIL, UNSAFE, DANGEROUS),
    "stacked_deep": (lambda: GOOD * 50 + EVIL, UNSAFE, DANGEROUS),
    "as_plain_text": (lambda: EVIL_TEXT, UNSAFE, DANGEROUS),
    "as_json_would_begin_after_it": (lambda: EVIL_TEXT + b'{"a": 1}', UNSAFE, DANGEROUS),
    "named_by_numbers_of_many_digits": (number_of_zeros, SUSPICIOUS, "pickle.import.hidden"),
    "import_that_does_it_before_other_data": (
        lambda: b"cantigravity\ngeohash\n.\nmore text",
        UNSAFE,
        DANGEROUS,
    ),
    "yaml_that_calls": (
        lambda: b"model: !!python/object/apply:os.system [id]\n",
        SUSPICIOUS,
        "text.yaml_object",
    ),
    "yaml_that_calls_by_another_name": (
        lambda: b"%TAG !e! tag:yaml.org,2002:python/\n--- !e!object/apply:os.system [id]\n",
        SUSPICIOUS,
        "text.yaml_object",
    ),
    # Two files in one, and archives that readers differ about.
    "hdf5_behind_a_text": (lambda: hdf5_behind(b"# notes", 8192), SUSPICIOUS, "polyglot.hdf5"),
    "hdf5_in_safetensors": (hdf5_in_safetensors, SUSPICIOUS, "polyglot.hdf5"),
    "hdf5_with_a_pickled_attribute": (pickled_attribute, SUSPICIOUS, "hdf5.pickle"),
    "zip_of_no_members_in_safetensors": (lambda_zip_of_no_members, UNSAFE, "keras.lambda"),
    "zip_from_behind_itself_in_safetensors": (
        lambda_zip_from_behind_itself,
        UNSAFE,
        "keras.lambda",
    ),
    "zip_with_two_wide_directories": (two_wide_directories, SUSPICIOUS, "zip.mismatch"),
    "tar_without_a_sign": (old_tar, UNSAFE, DANGEROUS),
    "tar_with_a_signed_sum": (lambda: old_tar(b"p\xff\xfe", "signed"), UNSAFE, DANGEROUS),
    "tar_with_more_behind_its_sum": (lambda: old_tar(summed="and more"), UNSAFE, DANGEROUS),
    "tar_with_a_folder_of_some_size": (tar_of_folder, SUSPICIOUS, "tar.ambiguous"),
    "tar_with_another_size": (tar_of_sizes, SUSPICIOUS, "tar.ambiguous"),
    "tar_with_a_sparse_member": (
        lambda: tar_header(b"s", 0, b"S") + bytes(1024),
        SUSPICIOUS,
        "tar.ambiguous",
    ),
    "tar_with_a_long_link": (tar_with_a_long_link, UNSAFE, "tar.slip"),
    "lzma_of_a_small_dictionary": (
        lambda: (
            struct.pack("<BLq", 0x5D, 0x100, -1)
            + lzma.compress(
                EVIL, lzma.FORMAT_ALONE, filters=[{"id": lzma.FILTER_LZMA1, "dict_size": 4096}]
            )[13:]
        ),
        UNSAFE,
        DANGEROUS,
    ),
    "joblib_of_old": (
        lambda: b"ZF" + hex(len(EVIL)).encode().ljust(19) + zlib.compress(EVIL),
        SUSPICIOUS,
        "compressed.joblib",
    ),
    "keras_configuration_that_is_not_read": (
        lambda: zipped(
            [Member(b"config.json", json.dumps({"class_name": "Lambda"}).encode("utf-16"))]
        ),
        SUSPICIOUS,
        "keras.unread",
    ),
    "keras_writes_a_file": (
        lambda: keras_operation("io.write_file"),
        SUSPICIOUS,
        "keras.custom_function",
    ),
    "keras_calls_python": (
        lambda: keras_operation("numpy_function"),
        SUSPICIOUS,
        "keras.custom_function",
    ),
    "unknown_global": (
        lambda: import_and_call("acme_private.loader", "boot"),
        SUSPICIOUS,
        UNKNOWN,
    ),
    "unknown_global_only_imported": (lambda: b"cacme_private.loader\nboot\n.", SUSPICIOUS, UNKNOWN),
    "named_by_the_memo": (
        lambda: (
            b"\x80\x04" + text("os") + b"\x94" + text("system") + b"\x940h\x00h\x01\x93"
            b"" + text("true") + b"\x85R."
        ),
        UNSAFE,
        DANGEROUS,
    ),
    "named_by_other_opcodes": (
        lambda: stack_global(text("os"), text("x") + text("system") + b"N00" + text("y") + b"0"),
        SUSPICIOUS,
        "pickle.import.hidden",
    ),
    "named_by_a_duplicate": (
        lambda: stack_global(text("code"), b"2"),
        SUSPICIOUS,
        "pickle.import.hidden",
    ),
    "named_by_strings_of_python_2": (
        lambda: stack_global(b"U\x02os", b"U\x06system"),
        UNSAFE,
        DANGEROUS,
    ),
    "named_by_escapes": (
        lambda: stack_global(b"Vo\\u0073\n", b"Vsys\\u0074em\n"),
        UNSAFE,
        DANGEROUS,
    ),
    "named_by_a_quoted_escape": (
        lambda: stack_global(b"S'\\x6fs'\n", b"S'system'\n"),
        SUSPICIOUS,
        "pickle.import.hidden",
    ),
    "inst": (lambda: f"(S'{TOUCH}'\nios\nsystem\n.".encode(), UNSAFE, DANGEROUS),
    "inst_on_an_unfinished_last_line": (
        lambda: f"(S'{TOUCH}'\nios\nsystemX".encode(),
        UNSAFE,
        DANGEROUS,
    ),
    "obj": (lambda: f"(cos\nsystem\nS'{TOUCH}'\no.".encode(), UNSAFE, DANGEROUS),
    "newobj": (lambda: pickle.dumps(Call(subprocess.Popen, TOUCH), 4), UNSAFE, DANGEROUS),
    "extension_code": (lambda: b"\x80\x02\x82\x01(tR.", SUSPICIOUS, "pickle.extension"),
    "cut_after_the_call": (lambda: EVIL[:-1], UNSAFE, DANGEROUS),
    "broken_after_the_call": (lambda: EVIL[:-1] + b"\xff\xff", UNSAFE, DANGEROUS),
    "text_broken_after_the_call": (lambda: EVIL_TEXT[:-1] + b"?", UNSAFE, DANGEROUS),
    "behind_a_long_argument": (
        lambda: b"\x80\x03B" + struct.pack("<I", 20_000_000) + bytes(20_000_000) + b"0" + EVIL[2:],
        UNSAFE,
        DANGEROUS,
    ),
    "behind_a_long_line": (
        lambda: b"S'" + b"x" * 3_000_000 + b"'\n0" + EVIL_TEXT,
        UNSAFE,
        DANGEROUS,
    ),
    "odd_numbers_in_the_memo": (
        lambda: b"Vsystem\np +1_0\n0Vos\ng10\n\x93" + b"S'true'\n\x85R.",
        UNSAFE,
        DANGEROUS,
    ),
    **{
        f"calls_{module}_{name}": (
            partial(import_and_call, module, name),
            UNSAFE,
            DANGEROUS,
        )
        for module, name in (
            ("builtins", "eval"),
            ("builtins", "__import__"),
            ("__builtin__", "exec"),
            ("__builtin__", "execfile"),
            ("commands", "getoutput"),
            ("posix", "system"),
            ("runpy", "run_path"),
            ("importlib", "import_module"),
            ("pip._internal.cli.main", "main"),
            ("functools", "partial"),
            ("marshal", "loads"),
            ("torch", "load"),
            ("numpy", "load"),
            ("shutil", "rmtree"),
            ("socket", "create_connection"),
            ("ctypes", "CDLL"),
        )
    },
    "attribute_of_a_harmless_class": (
        lambda: stack_global(text("collections"), text("OrderedDict.__init__.__globals__")),
        SUSPICIOUS,
        UNKNOWN,
    ),
    "pickle_within_a_pickle": (
        lambda: pickle.dumps({"a": 1}, 2)[:-1] + b"ctorch.storage\n_load_from_bytes\n(C\x01xtR.",
        SUSPICIOUS,
        UNKNOWN,
    ),
    "getter_of_attributes": (
        lambda: pickle.dumps(Call(operator.attrgetter, "system"), 2),
        UNSAFE,
        DANGEROUS,
    ),
    "hidden_by_a_frame": (hidden_by_a_frame, SUSPICIOUS, "pickle.frame"),
    "hidden_by_a_frame_without_a_header": (
        lambda: hidden_by_a_frame()[2:],
        SUSPICIOUS,
        "pickle.frame",
    ),
    # Pickles: what cannot be read.
    "protocol_that_does_not_exist": (lambda: b"\x80\x02\x80\x09N.", ERROR, "pickle.malformed"),
    "opcode_that_does_not_exist": (lambda: b"\x80\x02]\xff.", ERROR, "pickle.malformed"),
    "cut": (lambda: GOOD[:-5], ERROR, "pickle.malformed"),
    "claims_exabytes": (
        lambda: b"\x80\x04\x8e" + struct.pack("<Q", 2**63) + b"xx.",
        ERROR,
        "pickle.malformed",
    ),
    "claims_negative": (lambda: b"\x80\x02T\xff\xff\xff\xffxx.", ERROR, "pickle.malformed"),
    "empty_stack": (lambda: b"\x80\x02.", ERROR, "pickle.malformed"),
    "text_of_opcodes_with_a_call_behind": (
        lambda: b"N0" * 2_500_000 + EVIL_TEXT,
        ERROR,
        "pickle.too_long",
    ),
    "call_behind_other_plain_text": (lambda: b"N.(dp0\n." + EVIL_TEXT, UNSAFE, DANGEROUS),
    "opcode_bomb": (lambda: b"\x80\x02" + b"N0" * 2_500_000 + b"N.", ERROR, "pickle.too_long"),
    "trailing_data": (lambda: GOOD + b"\x00more", SUSPICIOUS, "pickle.trailing"),
    "joblib_array_with_a_call_behind": (joblib_like, SUSPICIOUS, "pickle.joblib"),
    # Compressed pickles.
    "gzip": (lambda: gzip.compress(EVIL), UNSAFE, DANGEROUS),
    "gzip_second_member": (
        lambda: gzip.compress(b"") + gzip.compress(EVIL_TEXT),
        UNSAFE,
        DANGEROUS,
    ),
    "zlib": (lambda: zlib.compress(EVIL), UNSAFE, DANGEROUS),
    "bzip2": (lambda: bz2.compress(EVIL), UNSAFE, DANGEROUS),
    "xz": (lambda: lzma.compress(EVIL), UNSAFE, DANGEROUS),
    "lzma": (lambda: lzma.compress(EVIL, lzma.FORMAT_ALONE), UNSAFE, DANGEROUS),
    "lz4": (lambda: b"\x04\x22\x4d\x18\x60\x40\x82" + bytes(20), SUSPICIOUS, "compressed.lz4"),
    "gzip_bomb": (lambda: gzip.compress(bytes(300_000_000), 1), SUSPICIOUS, "compressed.ratio"),
    "gzip_cut": (lambda: gzip.compress(GOOD)[:-9], ERROR, "compressed.truncated"),
    "gzip_trailing": (lambda: gzip.compress(GOOD) + b"more", SUSPICIOUS, "compressed.trailing"),
    "gzip_in_gzip": (
        lambda: gzip.compress(gzip.compress(gzip.compress(gzip.compress(EVIL)))),
        SUSPICIOUS,
        "compressed.nested",
    ),
    # PyTorch.
    "torch_zip": (lambda: torch_zip(EVIL), UNSAFE, DANGEROUS),
    "torch_zip_unknown_global": (
        lambda: torch_zip(b"\x80\x02cacme_private.loader\nboot\n)R."),
        SUSPICIOUS,
        UNKNOWN,
    ),
    "torch_zip_wrong_sum": (
        lambda: torch_zip(EVIL, crc=1, descriptor=b"PK\x07\x08" + bytes(12)),
        UNSAFE,
        DANGEROUS,
    ),
    "torch_zip_wrong_sum_of_a_harmless_pickle": (
        lambda: torch_zip(STATE, WEIGHTS, crc=1),
        SUSPICIOUS,
        "zip.crc",
    ),
    "torch_zip_pickle_of_another_name": (
        lambda: zipped([Member(b"archive/data.pkl", GOOD), Member(b"archive/notes.txt", EVIL)]),
        UNSAFE,
        DANGEROUS,
    ),
    "torch_zip_pickle_as_a_storage": (
        lambda: torch_zip(STATE, EVIL_TEXT + bytes(24)),
        UNSAFE,
        DANGEROUS,
    ),
    "torch_zip_storage_too_short": (lambda: torch_zip(STATE, bytes(3)), ERROR, "pytorch.storage"),
    "legacy_torch": (lambda: legacy_torch(EVIL), UNSAFE, DANGEROUS),
    "legacy_torch_cut": (lambda: legacy_torch(STATE)[:60], ERROR, "pickle.malformed"),
    "legacy_torch_computed_magic": (
        lambda: import_and_call("builtins", "eval", "0x1950A86A20F9469CFC6C") + GOOD * 4,
        UNSAFE,
        DANGEROUS,
    ),
    "legacy_torch_tar": (
        lambda: tar(("sys_info", GOOD), ("pickle", EVIL), ("storages", GOOD)),
        UNSAFE,
        DANGEROUS,
    ),
    # Zip archives.
    "zip_slip": (lambda: slipping(b"../../etc/cron.d/x"), UNSAFE, "zip.slip"),
    "zip_slip_absolute": (lambda: slipping(b"/etc/passwd"), UNSAFE, "zip.slip"),
    "zip_slip_backslashes": (lambda: slipping(b"a\\..\\..\\x"), UNSAFE, "zip.slip"),
    "zip_slip_drive": (lambda: slipping(b"C:\\windows\\x"), UNSAFE, "zip.slip"),
    "zip_name_with_nul": (lambda: slipping(b"data.pkl\x00.txt"), SUSPICIOUS, "zip.name"),
    "zip_link": (
        lambda: zipped([Member(b"a", b"/etc/passwd", attributes=0o120777 << 16)]),
        SUSPICIOUS,
        "zip.link",
    ),
    "zip_bomb": (lambda: zipped([deflated("a", bytes(300_000_000))]), SUSPICIOUS, "zip.ratio"),
    "zip_overlap": (overlapping, UNSAFE, "zip.overlap"),
    "zip_nested_too_deep": (lambda: nested(4, EVIL), SUSPICIOUS, "zip.nested"),
    "zip_nested": (lambda: nested(3, EVIL), UNSAFE, DANGEROUS),
    "zip_packed_pickle": (lambda: zipped([deflated("a.txt", EVIL)]), UNSAFE, DANGEROUS),
    "zip_packed_by_bzip2": (
        lambda: zipped([Member(b"a", EVIL, bz2.compress(EVIL), 12)]),
        UNSAFE,
        DANGEROUS,
    ),
    "zip_packed_by_lzma": (
        lambda: zipped(
            [
                Member(
                    b"a",
                    EVIL,
                    b"\x09\x04\x05\x00"
                    + lzma.compress(EVIL, lzma.FORMAT_ALONE)[:5]
                    + lzma.compress(EVIL, lzma.FORMAT_ALONE)[13:],
                    14,
                )
            ]
        ),
        UNSAFE,
        DANGEROUS,
    ),
    "zip_packed_by_something_else": (
        lambda: zipped([Member(b"a", EVIL, method=99)]),
        ERROR,
        "zip.method",
    ),
    "zip_packed_pickle_that_is_damaged": (
        lambda: zipped([Member(b"a.pkl", EVIL, b"\xff" * 50, 8)]),
        ERROR,
        "zip.damaged",
    ),
    "zip_other_name_in_front": (
        lambda: zipped([Member(b"a.txt", b"x", local_name=b"a.pkl")]),
        SUSPICIOUS,
        "zip.mismatch",
    ),
    "zip_other_method_in_front": (
        lambda: zipped([Member(b"a.txt", b"x", local_method=8)]),
        SUSPICIOUS,
        "zip.mismatch",
    ),
    "zip_other_size_in_front": (
        lambda: zipped([Member(b"a.txt", b"x", local_size=9)]),
        SUSPICIOUS,
        "zip.mismatch",
    ),
    "zip_other_sum_in_front": (
        lambda: zipped([Member(b"a.txt", b"x", local_crc=9)]),
        SUSPICIOUS,
        "zip.mismatch",
    ),
    "zip_encrypted_in_front_alone": (
        lambda: zipped([Member(b"a.pkl", EVIL, local_flags=1)]),
        UNSAFE,
        "zip.encrypted",
    ),
    "zip_encrypted_in_the_directory_alone": (
        lambda: zipped([Member(b"a.pkl", EVIL, flags=1, local_flags=0)]),
        UNSAFE,
        "zip.encrypted",
    ),
    "zip_same_name_twice": (
        lambda: zipped([Member(b"data.pkl", GOOD), Member(b"data.pkl", EVIL)]),
        UNSAFE,
        "zip.duplicate",
    ),
    "zip_hidden_between": (
        lambda: zipped([Member(b"a", b"x"), Member(b"b", b"y", before=EVIL)]),
        SUSPICIOUS,
        "zip.hidden",
    ),
    "zip_hidden_behind": (lambda: zipped([Member(b"a", b"x")], gap=EVIL), SUSPICIOUS, "zip.hidden"),
    "zip_trailing": (lambda: ZIP + b"more", SUSPICIOUS, "zip.trailing"),
    "zip_within_the_comment": (
        lambda: zipped([Member(b"data.pkl", GOOD)], comment=zipped([Member(b"data.pkl", EVIL)])),
        UNSAFE,
        "polyglot.prefix",
    ),
    "zip_cut": (lambda: torch_zip(STATE, WEIGHTS)[:-30], ERROR, "zip.directory"),
    "zip_members_not_counted": (
        lambda: zipped([Member(b"a", b"x"), Member(b"a.pkl", EVIL)], count=1),
        UNSAFE,
        "zip.mismatch",
    ),
    "zip_too_many_members": (
        lambda: zipped([Member(b"a", b"x")], count=100_001, wide=True),
        SUSPICIOUS,
        "zip.members",
    ),
    "zip_member_behind_the_end": (
        lambda: zipped([Member(b"a", b"x", at=2_000_000)]),
        SUSPICIOUS,
        "zip.header",
    ),
    # Two files in one, programs.
    "safetensors_and_zip": (
        lambda: GOOD_SAFETENSORS + zipped([Member(b"data.pkl", EVIL)]),
        UNSAFE,
        "polyglot.zip",
    ),
    "text_and_zip": (lambda: b"# Read me\n" + ZIP, SUSPICIOUS, "polyglot.zip"),
    "image_and_zip": (
        lambda: b"\x89PNG\r\n\x1a\n" + bytes(50) + ZIP,
        SUSPICIOUS,
        "polyglot.zip",
    ),
    "pickle_and_zip": (lambda: GOOD + ZIP, SUSPICIOUS, "polyglot.zip"),
    "tar_and_zip": (lambda: tar(("a", b"x")) + ZIP, SUSPICIOUS, "polyglot.zip"),
    "elf_and_zip": (lambda: ELF + ZIP, SUSPICIOUS, "executable.elf"),
    "script_and_zip": (lambda: b"#!/bin/sh\nexit\n" + ZIP, SUSPICIOUS, "polyglot.zip"),
    "elf": (lambda: ELF, SUSPICIOUS, "executable.elf"),
    "pe": (lambda: PE, SUSPICIOUS, "executable.pe"),
    "mach_o": (lambda: b"\xcf\xfa\xed\xfe" + bytes(100), SUSPICIOUS, "executable.mach_o"),
    "elf_in_a_zip": (lambda: zipped([Member(b"lib.so", ELF)]), SUSPICIOUS, "executable.elf"),
    # Tar archives.
    "tar_slip": (lambda: tar(("../../x", b"x")), UNSAFE, "tar.slip"),
    "tar_slip_by_a_link": (lambda: tar_of(link("a", "../../etc")), UNSAFE, "tar.slip"),
    "tar_slip_by_a_long_name": (lambda: tar(("a/" * 80 + "../" * 99, b"x")), UNSAFE, "tar.slip"),
    "tar_device": (
        lambda: tar_of(link("null", "", tarfile.CHRTYPE)),
        SUSPICIOUS,
        "tar.device",
    ),
    "tar_cut": (lambda: tar(("a", bytes(5000)))[:1500], ERROR, "tar.truncated"),
    "tar_with_a_torch_zip": (lambda: tar(("model.ckpt", torch_zip(EVIL))), UNSAFE, DANGEROUS),
    "tar_gzipped": (lambda: gzip.compress(tar(("a.pkl", EVIL))), UNSAFE, DANGEROUS),
    # NumPy.
    "numpy_objects": (lambda: npy_of_objects(EVIL), UNSAFE, DANGEROUS),
    "numpy_objects_in_npz": (
        lambda: zipped([deflated("a.npy", npy_of_objects(EVIL))]),
        UNSAFE,
        DANGEROUS,
    ),
    "numpy_pickle_as_npz": (lambda: zipped([Member(b"a.npy", EVIL)]), UNSAFE, DANGEROUS),
    "numpy_objects_by_an_escape": (
        lambda: numpy_file("{'descr': '|\\x4f', 'fortran_order': False, 'shape': (1,), }\n", EVIL),
        SUSPICIOUS,
        "numpy.header",
    ),
    # Keras.
    "keras_lambda": (
        lambda: keras_zip(
            {"config": {"layers": [{"module": "keras.layers", "class_name": "Lambda"}]}}
        ),
        UNSAFE,
        "keras.lambda",
    ),
    "keras_lambda_alone_in_a_zip": (
        lambda: zipped([Member(b"config.json", b'{"class_name": "Lambda"}')]),
        UNSAFE,
        "keras.lambda",
    ),
    "keras_foreign_module": (
        lambda: keras_zip({"module": "os", "class_name": "function", "config": "system"}),
        UNSAFE,
        "keras.foreign_module",
    ),
    "keras_lambda_in_hdf5": (lambda_hdf5, UNSAFE, "keras.lambda"),
    # safetensors.
    "safetensors_header_2e63": (
        lambda: safetensors(tensors_of((0, 8)), bytes(8), 2**63),
        ERROR,
        "safetensors.header_too_large",
    ),
    "safetensors_header_100_mb": (
        lambda: safetensors(tensors_of((0, 8)), bytes(8), 100_000_001),
        ERROR,
        "safetensors.header_too_large",
    ),
    "safetensors_many_tensors": (many_tensors, ERROR, "safetensors.too_many_tensors"),
    "safetensors_overlap": (
        lambda: safetensors(tensors_of((0, 8), (4, 12)), bytes(12)),
        ERROR,
        "safetensors.overlap",
    ),
    "safetensors_hole": (
        lambda: safetensors(tensors_of((0, 8), (16, 24)), bytes(24)),
        ERROR,
        "safetensors.hole",
    ),
    "safetensors_shape_overflow": (
        lambda: safetensors(tensors_of((0, 8), shape=(2**40, 2**40)), bytes(8)),
        ERROR,
        "safetensors.shape",
    ),
    "safetensors_claims_a_terabyte": (
        lambda: safetensors(tensors_of((0, 2**40), shape=(2**38,)), bytes(8)),
        ERROR,
        "safetensors.truncated",
    ),
    "safetensors_with_a_script": (
        lambda: GOOD_SAFETENSORS + b"<script>",
        ERROR,
        "safetensors.trailing",
    ),
    # GGUF.
    "gguf_array_of_4_million": (
        lambda: gguf(gguf_key("a") + struct.pack("<IIQ", 9, 0, 4_000_000) + bytes(1000), 1),
        ERROR,
        "source.truncated",
    ),
    "gguf_trailing": (lambda: gguf() + bytes(8) + EVIL * 20, SUSPICIOUS, "gguf.trailing"),
    "gguf_nested_arrays": (
        lambda: gguf(gguf_key("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000, 1),
        ERROR,
        "gguf.nesting",
    ),
    "gguf_claims_a_terabyte": (lambda: gguf(b"", 2**40, 2**40), ERROR, "gguf.too_many_tensors"),
    # ONNX.
    "onnx_external_traversal": (
        lambda: onnx_file(external("../../etc/passwd")),
        UNSAFE,
        "onnx.external_path",
    ),
    "onnx_external_absolute": (
        lambda: onnx_file(external("/etc/passwd")),
        UNSAFE,
        "onnx.external_path",
    ),
    "onnx_dimensions_2e62": (lambda: onnx_file(huge_dimensions), ERROR, "onnx.shape"),
}


@pytest.fixture(scope="module")
async def fence() -> AsyncIterator[Fence]:
    async with open_fence(Settings(), most=2) as fence:
        yield fence


@pytest.mark.parametrize("name", CASES)
async def test_hostile(fence: Fence, name: str) -> None:
    make, verdict, rule = CASES[name]
    contents = make()

    async def read(start: int, end: int) -> bytes:
        return contents[start:end]

    begun = time.monotonic()
    found = await fence.inspect(read, len(contents))
    assert time.monotonic() - begun < 15
    rules = [each.rule for each in found.findings]
    assert (found.verdict.value, rule in rules) == (verdict, True), found.findings
    assert not CANARY.exists()
    assert fence._server is not None
    process = psutil.Process(fence._server._process.pid)
    assert process.children() == []
    with suppress(psutil.AccessDenied):  # it is hidden from all but root
        assert process.net_connections("inet") == []


def test_the_canary_sings() -> None:
    """What is pickled in these tests does harm where it is loaded."""
    try:
        pickle.loads(EVIL)
        assert CANARY.exists()
        CANARY.unlink()
        pickle.loads(EVIL_TEXT)
        assert CANARY.exists()
        CANARY.unlink()
        pickle.load(io.BytesIO(hidden_by_a_frame()))
        assert CANARY.exists()
        CANARY.unlink()
        pickle.loads(number_of_zeros())
        assert CANARY.exists()
    finally:
        CANARY.unlink(missing_ok=True)


@pytest.mark.parametrize("length", [1, 30, 60, 100, 150, 200, 250, 300])
async def test_no_beginning_of_a_file_is_taken_for_whole(fence: Fence, length: int) -> None:
    whole = [
        torch_zip(STATE, WEIGHTS),
        legacy_torch(STATE, ["0"], struct.pack("<Q", 6) + WEIGHTS),
        npy_of_objects(pickle.dumps([{"a": np.float32(1)}], 2) * 8),
        safetensors(tensors_of((0, 400), shape=(100,)), bytes(400)),
    ]
    for contents in whole:
        cut = contents[: max(10, len(contents) - length)]

        async def read(start: int, end: int, cut: bytes = cut) -> bytes:
            return cut[start:end]

        found = await fence.inspect(read, len(cut))
        assert found.verdict.value in (SUSPICIOUS, ERROR), (length, found)
