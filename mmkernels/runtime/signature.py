"""The arguments of an op: grouped, as its functions take them, and flat, as its torch schema lists them.

The functions take groups, NamedTuples of arguments that belong together; the schema lists their fields:

    def fake(x: Tensor, pairs: Pairs, teacher: Teacher | None, k: int) -> tuple[Tensor, Tensor]
    (Tensor x, Tensor? query_ids, Tensor? key_ids, Tensor? teacher_x, SymInt k, str backend) -> (Tensor, Tensor)
"""

from __future__ import annotations

import inspect
import types
import typing
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

__all__ = ["Signature", "with_tensors", "without_tensors"]

_SCHEMA_TYPES = {Tensor: "Tensor", list[Tensor]: "Tensor[]", int: "SymInt", float: "float", bool: "bool", str: "str"}


class _Argument(NamedTuple):
    """One argument of the functions: a leaf, or a group of `fields` fields, which may be absent as a whole."""

    name: str
    annotation: Any
    group: type | None
    fields: int
    optional: bool

    @classmethod
    def of(cls, name: str, annotation: Any) -> _Argument:
        inner, optional = _without_none(annotation)
        if isinstance(inner, type) and issubclass(inner, tuple) and hasattr(inner, "_fields"):
            return cls(name, inner, inner, len(inner._fields), optional)
        return cls(name, annotation, None, 1, False)

    def leaves(self) -> Iterator[tuple[str, str]]:
        """Name and schema type of each leaf; the fields of an optional group are optional."""
        if self.group is None:
            yield self.name, _schema_type(self.annotation)
            return
        hints = typing.get_type_hints(self.group)
        for field in self.group._fields:  # type: ignore[attr-defined]
            inner = _schema_type(hints[field])
            yield field, inner if inner.endswith("?") or not self.optional else f"{inner}?"


def _without_none(annotation: Any) -> tuple[Any, bool]:
    if typing.get_origin(annotation) not in (typing.Union, types.UnionType):
        return annotation, False
    (inner,) = (part for part in typing.get_args(annotation) if part is not type(None))
    return inner, True


def _schema_type(annotation: Any) -> str:
    inner, optional = _without_none(annotation)
    return _SCHEMA_TYPES[inner] + "?" * optional


def _converters(arguments: Sequence[_Argument]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`Signature.flatten` and `.group`, compiled from source: a loop over the arguments costs each call microseconds.

    lambda x, pairs, teacher, backend: (x, *pairs, *((None, None) if teacher is None else teacher), backend)
    lambda x, query_ids, key_ids, teacher_x, teacher_y, backend: (
        x, Pairs(query_ids, key_ids), None if teacher_x is teacher_y is None else Teacher(teacher_x, teacher_y))
    """
    groups: dict[str, Any] = {}
    flat, grouped, leaves = [], [], []
    for argument in arguments:
        fields = [name for name, _ in argument.leaves()]
        leaves += fields
        if argument.group is None:
            flat.append(argument.name)
            grouped.append(argument.name)
            continue
        kind = f"group_{len(groups)}"
        groups[kind] = argument.group
        absent = f"{(None,) * argument.fields} if {argument.name} is None else " if argument.optional else ""
        flat.append(f"*({absent}{argument.name})")
        absent = f"None if {' is '.join(fields)} is None else " if argument.optional else ""
        grouped.append(f"{absent}{kind}({', '.join(fields)})")
    names = ", ".join(argument.name for argument in arguments)
    flatten = f"lambda {names}, backend: ({', '.join(flat)}, backend)"
    group = f"lambda {', '.join(leaves)}, backend: ({', '.join(grouped)},)"
    return eval(flatten), eval(group, groups)


def _named_tuple(names: list[str]) -> Callable[..., Any]:
    return namedtuple("Inputs", names)


class Signature:
    """The signature of an op, from the annotations of its fake.

    Attributes:
        names: the leaves in the schema's order, without the backend.
        place: a leaf's name -> its position.
        outputs: how many tensors the op returns.
        schema: the signature as torch writes it.
        inputs: a NamedTuple type of the arguments, groups as its fields.
        flatten: takes the functions' arguments and the backend, returns the torch op's.
        group: the reverse, without the backend.
    """

    flatten: Callable[..., tuple[Any, ...]]
    group: Callable[..., tuple[Any, ...]]

    def __init__(self, arguments: Sequence[_Argument], outputs: int, returns_tuple: bool) -> None:
        self._arguments = tuple(arguments)
        leaves = [leaf for argument in arguments for leaf in argument.leaves()]
        self.names = tuple(name for name, _ in leaves)
        assert len(set(self.names)) == len(self.names), f"two arguments of one name: {self.names}"
        self.place = {name: i for i, name in enumerate(self.names)}
        self.outputs = outputs
        self._types = [kind for _, kind in leaves]
        self._returns = f"({', '.join(['Tensor'] * outputs)})" if returns_tuple else "Tensor"
        self.inputs = _named_tuple([argument.name for argument in arguments])
        self.flatten, self.group = _converters(self._arguments)

    @classmethod
    def of(cls, fake: Callable[..., Any]) -> Signature:
        """From the annotations of a function."""
        hints = typing.get_type_hints(fake)
        returned = hints.pop("return")
        tensors = typing.get_args(returned) or (returned,)
        assert set(tensors) == {Tensor}, f"{fake.__qualname__}: expected to return tensors, got {returned}"
        arguments = [_Argument.of(name, hints[name]) for name in inspect.signature(fake).parameters]
        return cls(arguments, len(tensors), returned is not Tensor)

    def along(self, tangents: Sequence[str], optional: Sequence[str]) -> Signature:
        """The second op's signature: a tangent for each name in `tangents`, then these arguments, some now optional.

        It returns a tensor for each name in `optional`, then for each in `tangents`.
        """
        moved = [_Argument.of(f"tangent_{name}", Tensor | None) for name in tangents]
        given = [_Argument.of(a.name, Tensor | None) if a.name in optional else a for a in self._arguments]
        return Signature([*moved, *given], len(optional) + len(tangents), True)

    @property
    def schema(self) -> str:
        leaves = [f"{kind} {name}" for name, kind in zip(self.names, self._types, strict=True)]
        return f"({', '.join([*leaves, 'str backend'])}) -> {self._returns}"


_TENSOR = object()


def without_tensors(values: tuple[Any, ...], tensors: list[Tensor]) -> tuple[Any, ...]:
    """The nested tuples with a placeholder for each tensor, which is appended to `tensors`."""
    kept: list[Any] = []
    for value in values:
        if value is None:
            pass
        elif isinstance(value, Tensor):
            tensors.append(value)
            value = _TENSOR
        elif isinstance(value, tuple):
            value = without_tensors(value, tensors)
        kept.append(value)
    return _like(values, kept)


def with_tensors(values: tuple[Any, ...], tensors: Iterator[Tensor]) -> tuple[Any, ...]:
    """The inverse of `without_tensors`."""
    filled: list[Any] = []
    for value in values:
        if value is _TENSOR:
            value = next(tensors)
        elif isinstance(value, tuple):
            value = with_tensors(value, tensors)
        filled.append(value)
    return _like(values, filled)


def _like(values: tuple[Any, ...], made: list[Any]) -> tuple[Any, ...]:
    return tuple(made) if type(values) is tuple else type(values)(*made)
