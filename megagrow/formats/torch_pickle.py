"""Interpreter of the pickles in torch.save files that produces data only.

It executes the opcodes that `torch.load` accepts with `weights_only=True`, but calls nothing: each
known constructor has a fixed result (a `Stored` for a tensor), and objects of other programs become
`Unread`. So a pickle can neither run code nor allocate memory for a size that it merely names, and
its time is proportional to its length. References that expand to many values ("billion laughs") are
counted before anything traverses them.
"""

import pickletools
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from megagrow.checkpoint.tensor_file import DTYPES, MOST_AXES, Stored
from megagrow.common.untrusted_values import as_tally

MOST_OPCODES = 1_000_000
"""Maximum length of a pickle, in opcodes. A tensor takes about 25."""

MOST_VALUES = 1_000_000
"""Maximum number of values; a reference counts as its expansion."""

MOST_DEPTH = 100
"""Maximum nesting of lists and dicts."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.storage.UntypedStorage": torch.uint8,
}
"""Names of storage classes -> dtype."""


class Unread:
    """Placeholder for an object of another program's class, which is not imported."""


@dataclass(frozen=True)
class StorageRecord:
    """Tensor data in the file."""

    begin: int
    """Offset in the file."""
    size: int
    """Bytes."""


@dataclass(frozen=True)
class _Global:
    """Class or function that a pickle refers to by its full name."""

    name: str


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    record: StorageRecord


class RefusedNames(ValueError):
    """A pickle refers to classes or functions that are not known to be data."""

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(", ".join(sorted(names)))


def read_pickle(
    raw: bytes, unread: tuple[str, ...], record_of: Callable[[str], StorageRecord]
) -> Any:
    """Return the value of a pickle: plain values, lists (also for tuples), dicts, Namespaces, and a
    `Stored` for each tensor.

    Args:
        raw: the pickle.
        unread: prefixes of the full names of classes whose objects become `Unread`.
        record_of: returns the data of a storage by its key. Raises KeyError.

    Raises:
        RefusedNames: it refers to another class or function.
        ValueError, LookupError, TypeError, AttributeError: it is damaged or beyond a limit.
    """
    opcodes = list(_opcodes(raw))
    names = {_full_name(arg) for name, arg in opcodes if name == "GLOBAL"}
    if refused := {name for name in names if name not in _RESULTS and not name.startswith(unread)}:
        raise RefusedNames(refused)
    machine = _Machine(record_of)
    for name, arg in opcodes:
        machine.execute(name, arg)
    value = machine.stack.pop()
    _check_expansion(value)
    return value


def _opcodes(raw: bytes) -> Iterator[tuple[str, Any]]:
    for number, (opcode, arg, _) in enumerate(pickletools.genops(raw)):
        if number >= MOST_OPCODES:
            raise ValueError(f"more than {MOST_OPCODES} opcodes")
        yield opcode.name, arg


def _full_name(arg: str) -> str:
    """Return `module.name` of a GLOBAL; Python 2 had another name for `builtins`."""
    module, name = arg.split(" ", 1)
    return f"{'builtins' if module == '__builtin__' else module}.{name}"


class _Machine:
    """Stack machine of the pickle format; each method executes one kind of opcode."""

    def __init__(self, record_of: Callable[[str], StorageRecord]) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._record_of = record_of

    def execute(self, name: str, arg: Any) -> None:
        """Execute one opcode. Raises ValueError for an unsupported one."""
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _ARGUMENTS:
            self.stack.append(arg)
        elif name in ("BINGET", "LONG_BINGET"):
            self.stack.append(self._memo[arg])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[arg] = self.stack[-1]
        elif name == "GLOBAL":
            self.stack.append(_Global(_full_name(arg)))
        elif name == "MARK":
            self._marks.append(len(self.stack))
        elif name in _TUPLES:
            self.stack.append(self._pop_last(_TUPLES[name]))
        elif name in ("TUPLE", "APPENDS", "SETITEMS"):
            self._collect(name, self._pop_to_mark())
        elif name in ("APPEND", "SETITEM"):
            self._collect(f"{name}S", self._pop_last(1 if name == "APPEND" else 2))
        elif name in ("NEWOBJ", "REDUCE", "BUILD", "BINPERSID"):
            self._construct(name)
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"opcode {name} is not supported")

    def _pop_last(self, count: int) -> list[Any]:
        return [self.stack.pop() for _ in range(count)][::-1]

    def _pop_to_mark(self) -> list[Any]:
        return self._pop_last(max(0, len(self.stack) - self._marks.pop()))

    def _collect(self, name: str, items: list[Any]) -> None:
        if name == "TUPLE":
            self.stack.append(items)
        elif name == "APPENDS" and isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif name == "SETITEMS" and isinstance(self.stack[-1], dict):
            self.stack[-1].update(zip(map(_key, items[::2]), items[1::2], strict=True))
        elif not isinstance(self.stack[-1], Unread):
            raise ValueError(f"{name} of {type(self.stack[-1]).__name__}")

    def _construct(self, name: str) -> None:
        if name == "BINPERSID":
            self.stack.append(self._storage(self.stack.pop()))
            return
        target, arg = self._pop_last(2)
        if name == "BUILD":
            if isinstance(target, Namespace):
                vars(target).update(_ordered(arg.items()))
            self.stack.append(target)
            return
        if not isinstance(target, _Global):
            raise ValueError(f"{type(target).__name__} is called")
        self.stack.append(_RESULTS.get(target.name, _unread)(*arg))

    def _storage(self, persistent_id: Any) -> _Storage:
        if not isinstance(persistent_id, list) or persistent_id[0] != "storage":
            raise ValueError("Only persistent_load of storage is allowed")
        _, kind, key, _, _ = persistent_id
        return _Storage(_STORAGES[kind.name], self._record_of(key))


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": list,
    "EMPTY_DICT": dict,
    "EMPTY_SET": Unread,
}

_ARGUMENTS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
}
"""Opcodes that push their argument."""

_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _key(value: Any) -> Any:
    """Return a key of a dict: a plain value, or a tuple of plain values, whose hash is cheap."""
    if isinstance(value, list) and not any(isinstance(item, list) for item in value):
        value = tuple(map(_key, value))
    if not isinstance(value, str | int | float | tuple | None):
        raise TypeError(f"a key is of type {type(value).__name__}")
    return value


def _unread(*_: Any) -> Unread:
    return Unread()


def _ordered(items: Iterable[Any] = ()) -> dict[Any, Any]:
    return {_key(key): value for key, value in items}


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> Stored:
    """Return the place of a tensor; `rest` may end with a dtype."""
    if not isinstance(storage, _Storage) or len(shape) > MOST_AXES or len(shape) != len(strides):
        raise ValueError(f"a tensor of shape {shape!r:.60}, strides {strides!r:.60}")
    start, *sizes = map(as_tally, (offset, *shape))
    # Dtypes without a storage class are saved as bytes, with the dtype as a further argument.
    dtype = _DTYPES[rest[2].name] if len(rest) > 2 else storage.dtype
    label = _NAMES.get(dtype, str(dtype))
    steps = [prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    count = prod(sizes)
    if count and any(n > 1 and a != b for n, a, b in zip(sizes, strides, steps, strict=True)):
        return Stored(f"{label}, not contiguous", tuple(sizes))
    if count and (start + count) * dtype.itemsize > storage.record.size:
        raise ValueError(f"a tensor of shape {sizes} in {storage.record.size} bytes")
    begin = storage.record.begin + start * dtype.itemsize if count else 0
    return Stored(label, tuple(sizes), begin)


def _tensor_of_type(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """Return a tensor with attributes or of a subclass, without them."""
    return _RESULTS[function.name](*args)


_DTYPES = {f"torch.{key}": kind for key, kind in vars(torch).items() if type(kind) is torch.dtype}

_RESULTS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": lambda *_: Namespace(),
    "collections.OrderedDict": _ordered,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": lambda *args: _tensor(*args[:6]),
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": lambda value, *_: value,
    "torch._utils._rebuild_parameter_with_state": lambda value, *_: value,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_type,
    "torch.Size": list,
    **dict.fromkeys((*_STORAGES, *_DTYPES, "torch.Tensor", "torch.device"), _unread),
    **dict.fromkeys(("builtins.bytearray", "builtins.complex", "builtins.set"), _unread),
    **dict.fromkeys(("_codecs.encode", "collections.Counter"), _unread),
}
"""Results of the classes and functions that torch.save files refer to."""


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, Namespace):
        return vars(value).values()
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _check_expansion(root: Any) -> None:
    """Raise ValueError if a value contains itself or expands to too many values or levels."""
    known: dict[int, tuple[int, int]] = {}  # id -> values, levels
    entered: set[int] = set()
    pending: list[tuple[Any, bool]] = [(root, False)]
    while pending:
        value, are_children_known = pending.pop()
        children = list(_children(value))
        if are_children_known:
            counts = [known.get(id(child), (1, 0)) for child in children]
            size, depth = 1 + sum(n for n, _ in counts), 1 + max(level for _, level in counts)
            known[id(value)] = size, depth
            entered.remove(id(value))
            if size > MOST_VALUES or depth > MOST_DEPTH:
                raise ValueError(f"more than {MOST_VALUES} values or {MOST_DEPTH} levels")
        elif id(value) in entered:
            raise ValueError("a value contains itself")
        elif children and id(value) not in known:
            entered.add(id(value))
            pending += [(value, True), *((child, False) for child in children)]
