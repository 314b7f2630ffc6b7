"""Pickles of state dicts, step by step: dicts, tensors, and what describes them. Nothing that they name is called.

Python's own unpickler calls what a pickle names, takes memory for lengths that it claims, and hashes what is nested
deep. Here a step is one of the 30 that a state dict needs, a name is one of four kinds, a key is text, and whatever is
made takes a few dozen bytes for each step.
"""

import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

STORAGES: Mapping[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16), "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
LARGEST = 2**23  # bytes of a pickle
MOST_STEPS = 2**18  # 8 thousand tensors


class Storage(NamedTuple):
    """Numbers in a file of their own, named by `key`."""

    dtype: np.dtype
    key: str
    length: int


class View(NamedTuple):
    """A tensor: elements of a storage, `strides` counted in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Kind(NamedTuple):
    """One of the functions that a pickle may name; it is never called."""

    name: str


_ORDERED, _TENSOR, _PARAMETER = _Kind("OrderedDict"), _Kind("tensor"), _Kind("parameter")
_NAMED: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): _ORDERED,
    ("torch._utils", "_rebuild_tensor_v2"): _TENSOR,
    ("torch._utils", "_rebuild_parameter"): _PARAMETER,
    **{("torch", name): dtype for name, dtype in STORAGES.items()},
}


def load(content: bytes) -> Any:
    """The dict that a pickle describes, its tensors as `View`s.

    Raises:
      ValueError: for what is no pickle or a damaged one, has more than `MOST_STEPS` steps, or a step or a name that no
        state dict needs.
    """
    if len(content) > LARGEST:
        raise ValueError(f"its pickle has {len(content)} bytes, more than the {LARGEST} that are read")
    machine = _Machine()
    for number, (step, argument, place) in enumerate(pickletools.genops(content)):
        if number >= MOST_STEPS:
            raise ValueError(f"its pickle has more than {MOST_STEPS} steps")
        if step.name == "STOP":
            if place != len(content) - 1:
                raise ValueError("its pickle ends before its bytes do")
            return machine.result()
        if step.name not in _STEPS:
            raise ValueError(f"its pickle has the step {step.name}, which no tensor needs")
        _STEPS[step.name](machine, argument)
    raise ValueError("its pickle has no end")


class _Machine:
    """The stack of a pickle: what lies above the last mark, and below it, mark by mark; and what it remembers."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memory: list[Any] = []

    def result(self) -> Any:
        if self.below or len(self.stack) != 1:
            raise ValueError("its pickle ends in the middle")
        return self.stack[0]

    def protocol(self, number: int) -> None:
        if number > pickle.HIGHEST_PROTOCOL:
            raise ValueError(f"its pickle is of protocol {number}, and {pickle.HIGHEST_PROTOCOL} is the highest")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes what it has not made")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise ValueError("its pickle takes what it has not made")
        return self.stack[-1]

    def mark(self, _: Any) -> None:
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """Takes the last mark, and the values above it."""
        if not self.below:
            raise ValueError("its pickle takes what it has not made")
        values, self.stack = self.stack, self.below.pop()
        return values

    def tuple_of(self, count: int) -> None:
        self.push(tuple(reversed([self.pop() for _ in range(count)])))

    def remember(self, index: int | None) -> None:
        if index not in (None, len(self.memory)):  # a pickler counts; an index of its own choice would take memory
            raise ValueError(f"its pickle remembers number {index} after {len(self.memory)}")
        self.memory.append(self.top())

    def recall(self, index: int) -> None:
        if index >= len(self.memory):
            raise ValueError(f"its pickle recalls number {index} of {len(self.memory)}")
        self.push(self.memory[index])

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or (module, name) not in _NAMED:
            raise ValueError(f"it names {module!s:.80}.{name!s:.80}, which no tensor needs")
        self.push(_NAMED[module, name])

    def set_items(self, pairs: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict or len(pairs) % 2:
            raise ValueError("its pickle sets items of what is no dict")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if type(key) is not str:
                raise ValueError(f"it has a {type(key).__name__} for a key, expected a tensor's name")
            if key in target:
                raise ValueError(f"it has the key {key[:80]!r} twice")
            target[key] = value

    def build(self, _: Any) -> None:
        """The state of an OrderedDict, versions of modules, is dropped."""
        if type(self.pop()) is not dict or type(self.top()) is not dict:
            raise ValueError("its pickle gives a state to what is no dict")

    def storage(self, _: Any) -> None:
        pid = self.pop()
        match pid:
            case ("storage", np.dtype() as dtype, str(key), str(), int(count)) if type(pid) is tuple and count >= 0:
                self.push(Storage(dtype, key, count))
            case _:
                raise ValueError("its pickle refers to something else than a storage")

    def call(self, _: Any) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case (_Kind("OrderedDict"), ()):
                self.push({})
            case (_Kind("tensor"), (Storage() as storage, int(offset), shape, strides, *_)) if _whole(shape) and _whole(
                strides
            ):
                self.push(View(storage, offset, shape, strides))
            case (_Kind("parameter"), (View() as view, *_)):
                self.push(view)
            case _:
                raise ValueError("its pickle calls something with arguments that make no tensor")


def _whole(numbers: Any) -> bool:
    return type(numbers) is tuple and all(type(n) is int for n in numbers)


Step = Callable[[_Machine, Any], None]
_push: Step = _Machine.push
_STEPS: Mapping[str, Step] = {
    "PROTO": _Machine.protocol,
    "FRAME": lambda machine, _: None,
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE"), _push),
    "NONE": lambda machine, _: machine.push(None),
    "NEWTRUE": lambda machine, _: machine.push(True),
    "NEWFALSE": lambda machine, _: machine.push(False),
    "EMPTY_DICT": lambda machine, _: machine.push({}),
    "EMPTY_TUPLE": lambda machine, _: machine.push(()),
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.marked())),
    "SETITEMS": lambda machine, _: machine.set_items(machine.marked()),
    "SETITEM": lambda machine, _: machine.set_items([machine.pop(), machine.pop()][::-1]),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine.remember),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.recall),
    "GLOBAL": lambda machine, argument: machine.name(*argument.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(*[machine.pop(), machine.pop()][::-1]),
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
}
