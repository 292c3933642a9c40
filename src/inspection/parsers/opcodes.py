"""Pickles, gone through opcode by opcode with nothing imported and nothing called.

Of what a pickle builds, this keeps what leads to tensors: names of globals, tuples, numbers, texts,
and the calls that are made of them as descriptions. Everything else is a placeholder. What a pickle
may do when it is loaded is judged elsewhere.
"""

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final, cast

from modelharbor.inspection.source import Malformed, Source

MOST_OPCODES: Final = 500_000
MOST_BYTES: Final = 32 * 1024 * 1024  # of one pickle
CHUNK_BYTES: Final = 64 * 1024
LONGEST_LINE: Final = 64 * 1024


class TooLarge(Exception):
    """There is more of it than is gone through; this does not make it malformed."""


@dataclass(frozen=True, slots=True, eq=False)
class Global:
    name: str  # module and name, with a dot between


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """What a persistent id stands for: an object that is outside of the pickle."""

    key: Any


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What a call has made; `value` is what `on_call` says of it."""

    value: Any


class Container:
    """A list, dict, set or object: what is in it is not kept."""


_MARK: Final = object()


class Stream:
    """A source, or a part of it, as the file that `pickletools` reads."""

    def __init__(self, source: Source, start: int = 0, end: int | None = None) -> None:
        self.at = start
        self._source = source
        self._end = source.size if end is None else end
        self._buffer = b""
        self._base = start
        self.most = start + MOST_BYTES

    def tell(self) -> int:
        return self.at

    def read(self, length: int) -> bytes:
        length = max(min(length, self._end - self.at), 0)
        if self.at + length > self.most:
            raise TooLarge
        index = self.at - self._base
        if index + length > len(self._buffer):
            size = min(max(length, CHUNK_BYTES), self._end - self.at)
            self._buffer, self._base, index = self._source.read(self.at, size), self.at, 0
        self.at += length
        return self._buffer[index : index + length]

    def readline(self) -> bytes:
        """TooLarge where a line is longer than LONGEST_LINE."""
        start = self.at
        index = start - self._base
        end = self._buffer.find(b"\n", index) + 1 if index >= 0 else 0
        if end:
            return self.read(end - index)
        line = self.read(LONGEST_LINE)
        end = line.find(b"\n") + 1
        if not end and len(line) == LONGEST_LINE:
            raise TooLarge
        self.at = start + (end or len(line))
        return line[: end or len(line)]


class Walk:
    """One pickle. `on_call` is told each call of a global, `on_item` each value of a text key."""

    def __init__(
        self,
        on_call: Callable[[str, Any], Any],
        on_item: Callable[[str, Any], None],
    ) -> None:
        self._on_call = on_call
        self._on_item = on_item
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.opcodes = 0
        self.protocol = 0

    def run(self, stream: Stream) -> Any:
        """What the pickle is. Malformed where it is broken, TooLarge where it goes on for too long."""
        start = stream.at
        stream.most = start + MOST_BYTES
        self._stack, self._memo = [], {}
        try:
            for opcode, argument, position in pickletools.genops(cast("IO[bytes]", stream)):
                self.opcodes += 1
                if self.opcodes > MOST_OPCODES:
                    raise TooLarge
                start = position or start
                self._do(opcode.name, argument)
            return self._stack.pop()
        except (ValueError, IndexError, KeyError, OverflowError) as problem:
            raise Malformed("pickle.broken", "The pickle is broken.", start) from problem

    def _do(self, name: str, argument: Any) -> None:
        stack = self._stack
        match name:
            case "PROTO":
                self.protocol = argument
            case "MARK":
                stack.append(_MARK)
            case "GLOBAL" | "INST":
                made: Any = Global(argument.replace(" ", ".", 1))
                stack.append(self._call(made, self._to_mark()) if name == "INST" else made)
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                is_named = isinstance(module, str) and isinstance(attribute, str)
                stack.append(Global(f"{module}.{attribute}") if is_named else Container())
            case "REDUCE" | "NEWOBJ":
                arguments, of = stack.pop(), stack.pop()
                stack.append(self._call(of, arguments))
            case "NEWOBJ_EX":
                _, arguments, of = stack.pop(), stack.pop(), stack.pop()
                stack.append(self._call(of, arguments))
            case "OBJ":
                of, *rest = self._to_mark()
                stack.append(self._call(of, tuple(rest)))
            case "BUILD" | "APPEND":
                stack.pop()
            case "POP":
                stack.pop()
            case "POP_MARK" | "APPENDS" | "ADDITEMS":
                self._to_mark()
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                self._item(key, value)
            case "SETITEMS":
                items = self._to_mark()
                for key, value in zip(items[::2], items[1::2], strict=True):
                    self._item(key, value)
            case "DICT" | "LIST" | "FROZENSET":
                items = self._to_mark()
                if name == "DICT":
                    for key, value in zip(items[::2], items[1::2], strict=True):
                        self._item(key, value)
                stack.append(Container())
            case "TUPLE":
                stack.append(tuple(self._to_mark()))
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(name[-1])
                if len(stack) < length:
                    raise IndexError
                items = stack[-length:]
                del stack[-length:]
                stack.append(tuple(items))
            case "BINPERSID":
                stack.append(Stored(stack.pop()))
            case "PERSID":
                stack.append(Stored(argument))
            case "DUP":
                stack.append(stack[-1])
            case "MEMOIZE":
                self._memo[len(self._memo)] = stack[-1]
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self._memo[argument] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(name == "NEWTRUE")
            case "STOP" | "FRAME" | "READONLY_BUFFER":
                pass
            case (
                "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET" | "NEXT_BUFFER" | "EXT1" | "EXT2" | "EXT4"
            ):
                stack.append(Container())
            case _:  # numbers and texts, which `genops` has read
                stack.append(argument)

    def _call(self, of: Any, arguments: Any) -> Any:
        if isinstance(of, Global) and isinstance(arguments, tuple):
            return self._on_call(of.name, arguments)
        return Container()

    def _item(self, key: Any, value: Any) -> None:
        if isinstance(key, str):
            self._on_item(key, value)

    def _to_mark(self) -> Any:
        """What is above the last mark; the mark goes with it."""
        stack = self._stack
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = tuple(stack[index + 1 :])
                del stack[index:]
                return items
        raise IndexError
