"""A pickle of plain values, read by an interpreter that can do nothing else: it imports nothing, and its memory and time are bounded.

Whoever wrote the pickle may want harm. Each opcode makes at most some 20 bytes for each of its own, calls make no more than an honest
writer's did, and nothing that may be nested is ever hashed: a hash of tuples within tuples ends the process.
"""

import pickletools
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from asyncckpt.errors import CorruptCheckpointError, UnsafeCheckpointError
from asyncckpt.format.record import newer
from asyncckpt.state.walk import SCALARS

_FREE_CONTAINERS = 2**16
_BYTES_OF_A_CONTAINER = 4  # honest ones have a path, or a call, of at least so many bytes each
_SET = 3  # an empty set takes the memory of so many lists
_SAME_HASH_PAIRS = 2**26  # comparisons in all sets together: a second
_DTYPE = re.compile(r"torch (bool|bits\w+|(q?u?int|b?float|complex)\d\w*)")


class _Call(NamedTuple):
    name: str


_GLOBALS: dict[str, Any] = {
    **{f"torch {name}": _Call(name) for name in ("Size", "device")},
    **{f"__builtin__ {name}": _Call(name) for name in ("set", "complex")},
    "_codecs encode": _Call("encode"),
    **{str(dtype).replace(".", " "): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
}
"""What a pickle of our values may name, as pickletools shows it; far less than what `weights_only` allows."""


def unpickle(pickled: bytes) -> Any:
    """The value of a pickle of protocol 2, as `torch.save` writes plain values.

    Raises:
        UnsafeCheckpointError: It names or calls anything but plain values, or would take memory or time out of proportion.
        CorruptCheckpointError: It is malformed.
        FormatVersionError: It names an element type that this torch lacks.
    """
    machine = _Machine(len(pickled))
    steps = machine.steps
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "STOP":
                return machine.pop()
            if opcode.name not in steps:
                raise UnsafeCheckpointError(
                    f"the state file's pickle has the opcode {opcode.name}, which no plain value needs"
                )
            steps[opcode.name](argument)
    except (ValueError, TypeError, IndexError, OverflowError, RuntimeError) as error:
        raise CorruptCheckpointError(f"the state file's pickle is malformed: {str(error)[:200]}") from error
    raise CorruptCheckpointError("the state file's pickle has no end")


class _Machine:
    """The stack machine of a pickle. `steps`: what each opcode does with its argument."""

    def __init__(self, size_bytes: int) -> None:
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: list[Any] = []
        self._containers_left = _FREE_CONTAINERS + size_bytes // _BYTES_OF_A_CONTAINER
        self._results_left = size_bytes
        self._pairs_left = _SAME_HASH_PAIRS
        self.pop = self._stack.pop
        push = self._stack.append
        self.steps: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"), push),
            "PROTO": lambda _: None,
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "EMPTY_TUPLE": lambda _: push(()),
            "EMPTY_LIST": lambda _: self._push_container([]),
            "EMPTY_DICT": lambda _: self._push_container({}),
            "TUPLE1": lambda _: self._push_container(tuple(self._popped(1))),
            "TUPLE2": lambda _: self._push_container(tuple(self._popped(2))),
            "TUPLE3": lambda _: self._push_container(tuple(self._popped(3))),
            "TUPLE": lambda _: self._push_container(tuple(self._marked())),
            "MARK": self._mark,
            "APPEND": lambda _: self._extend(self._popped(1)),
            "APPENDS": lambda _: self._extend(self._marked()),
            "SETITEM": lambda _: self._update(self._popped(2)),
            "SETITEMS": lambda _: self._update(self._marked()),
            "BINPUT": self._put,
            "LONG_BINPUT": self._put,
            "BINGET": lambda at: push(self._memo[at]),
            "LONG_BINGET": lambda at: push(self._memo[at]),
            "GLOBAL": self._global,
            "REDUCE": self._reduce,
        }

    def _take(self, containers: int = 0, results: int = 0, pairs: int = 0) -> None:
        """Of what the whole pickle may cost."""
        self._containers_left -= containers
        self._results_left -= results
        self._pairs_left -= pairs
        if min(self._containers_left, self._results_left, self._pairs_left) < 0:
            raise UnsafeCheckpointError(
                "the state file's pickle would take memory or time out of all proportion to its size"
            )

    def _push_container(self, made: Any) -> None:
        self._take(containers=1)
        self._stack.append(made)

    def _popped(self, count: int) -> list[Any]:
        if len(self._stack) < count:
            raise IndexError("it takes more than there is")
        found = self._stack[-count:]
        del self._stack[-count:]
        return found

    def _mark(self, _: Any) -> None:
        self._take(containers=1)
        self._marks.append(len(self._stack))

    def _marked(self) -> list[Any]:
        start = self._marks.pop()
        found = self._stack[start:]
        del self._stack[start:]
        return found

    def _extend(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise TypeError("it appends to what is no list")
        target += items

    def _update(self, items: list[Any]) -> None:
        target, names = self._stack[-1], items[::2]
        if type(target) is not dict or not all(type(name) is str for name in names):
            raise TypeError("it has a key that is no text, or sets one in what is no dict")
        target.update(zip(names, items[1::2], strict=True))

    def _put(self, at: int) -> None:
        if at != len(self._memo):
            raise ValueError("it does not number what it remembers in order")
        self._memo.append(self._stack[-1])

    def _global(self, name: str) -> None:
        if name not in _GLOBALS:
            if _DTYPE.fullmatch(name):
                raise newer(
                    f"its values name {name.replace(' ', '.')}, which torch {torch.__version__} lacks; or upgrade torch"
                )
            raise UnsafeCheckpointError(f"the state file's pickle names {name[:200]!r}, which is no plain value")
        self._stack.append(_GLOBALS[name])

    def _reduce(self, _: Any) -> None:
        function, arguments = self._popped(2)
        if type(function) is not _Call or type(arguments) is not tuple:
            raise UnsafeCheckpointError("the state file's pickle calls what is no constructor of a plain value")
        self._stack.append(getattr(self, f"_{function.name}")(*arguments))

    def _encode(self, text: Any, codec: Any) -> bytes:
        if (
            type(text) is not str or type(codec) is not str or codec != "latin1"
        ):  # others amplify, or take quadratic time
            raise UnsafeCheckpointError("the state file's pickle encodes text by another codec than latin1")
        self._take(results=len(text))
        return text.encode("latin-1")

    def _set(self, items: Any) -> set[Any]:
        if type(items) is not list or not SCALARS.issuperset(map(type, items)):
            raise TypeError("it makes a set of what is no list of plain values")
        self._take(containers=_SET, results=max(0, 2 * len(items) - 3))  # no more than three values take one byte
        hashes = Counter(map(hash, items))
        if len(hashes) < len(items):
            self._take(pairs=sum(count * (count - 1) for count in hashes.values()))
        return set(items)

    def _complex(self, real: Any, imaginary: Any) -> complex:
        if type(real) is not float or type(imaginary) is not float:
            raise TypeError("it makes a complex number of others than two floats")
        return complex(real, imaginary)

    def _Size(self, items: Any) -> torch.Size:  # noqa: N802 - named as torch names it
        if type(items) is not tuple or not all(type(item) is int for item in items):
            raise TypeError("it makes a torch.Size of others than integers")
        self._take(results=len(items))
        return torch.Size(items)

    def _device(self, kind: Any, *index: Any) -> torch.device:
        if type(kind) is not str or not all(type(number) is int for number in index):
            raise TypeError("it makes a torch.device of others than a name and a number")
        return torch.device(kind, *index)
