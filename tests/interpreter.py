"""Triton's interpreter without most of its overhead.

A kernel is interpreted in steps of some microseconds of numpy, and Triton spends many times that on bookkeeping: for
every launch, and at every call from one jit function to another, it replaces some three hundred functions of
`triton.language`, even when they are already replaced; and for every operation it builds block types and shapes anew
that it has built a thousand times. Here both are done once. What a kernel computes, and what Triton refuses, is the
same: only functions whose source is known are replaced, otherwise Triton is left alone.
"""

import hashlib
import importlib.util
import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

__all__ = ["is_quick", "quicken"]

# Of the functions replaced by `_remember_types`, as in Triton 3.7.
KNOWN_SOURCE = "74999187f922ce16"


def is_quick() -> bool:
    """Is Triton's source known, so that `quicken` speeds up every operation?"""
    try:
        from triton.language import core
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter

        replaced = [
            (core.block_type, "__init__"),
            (core.tensor, "__init__"),
            (core.dtype, "__eq__"),
            (core.tuple, "__init__"),
            (core, "_unwrap_if_constexpr"),
            (core, "_unwrap_shape"),
            (core, "builtin"),
            (TritonSemantic, "computation_type_impl"),
            (TritonSemantic, "broadcast_impl_value"),
            (interpreter, "_get_np_dtype"),
            (interpreter, "_patch_attr"),
        ]
        sources = [inspect.getsource(getattr(owner, name)) for owner, name in replaced]
    except (AttributeError, ImportError, OSError):
        return False
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16] == KNOWN_SOURCE


def quicken() -> None:
    """Replace what is slow in Triton's interpreter, before the first kernel is decorated."""
    if importlib.util.find_spec("triton") is None:
        return
    known = is_quick()
    _replace_the_language_once_a_launch()
    if known:
        _remember_types()


def _replace_the_language_once_a_launch() -> None:
    """Skip the replacement when it is already in place."""
    import triton.language as tl
    from triton.runtime import interpreter

    replace = getattr(interpreter, "_patch_lang", None)
    scope = getattr(interpreter, "_LangPatchScope", None)
    if replace is None or scope is None:
        return

    # The language's own jit functions (tl.sum) see it as `core`.
    everywhere = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    def replace_once(kernel: Any) -> Any:
        return replace(everywhere) if tl.core.is_builtin(tl.load) else scope()

    interpreter._patch_lang = replace_once


def _remember_types() -> None:
    """Build each shape, block type and promotion once. They are never changed after that."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    constexpr, build_block_type = core.constexpr, core.block_type.__init__
    shapes: dict[tuple[int, ...], tuple[Any, int, Any, Any]] = {}
    scalar_shape, scalar_numel = core.tuple([]), constexpr(1)

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = tuple([size.value if type(size) is constexpr else size for size in shape])
        if key not in shapes:
            build_block_type(self, element_ty, shape)  # also refuses what is no shape
            of_tensor = core.tuple([constexpr(size) for size in self.shape])
            shapes[key] = self.shape, self.numel, of_tensor, constexpr(self.numel)
        self.element_ty = element_ty
        self.shape, self.numel, self.shape_of_tensor, self.numel_of_tensor = shapes[key]
        self.name = f"<{key}, {element_ty}>"

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if type.is_block():
            self.shape, self.numel = type.shape_of_tensor, type.numel_of_tensor
        else:
            self.shape, self.numel = scalar_shape, scalar_numel

    equal = core.dtype.__eq__
    unwrap, sequences = core._unwrap_if_constexpr, (list, tuple, core.tuple)

    def unwrap_quickly(value: Any) -> Any:
        if type(value) is constexpr:
            return value.value
        return unwrap(value) if isinstance(value, sequences) else value

    core.block_type.__init__, core.tensor.__init__ = block_type, tensor
    core.dtype.__eq__ = lambda self, other: self is other or equal(self, other)
    core._unwrap_if_constexpr = unwrap_quickly
    _remember_promotions(TritonSemantic)
    _remember_numpy_types(interpreter)
    interpreter._patch_attr = _call_directly(interpreter.interpreter_semantic)


def _remember_promotions(semantic: Any) -> None:
    promote, broadcast = semantic.computation_type_impl, semantic.broadcast_impl_value
    promotions: dict[tuple, Any] = {}

    def promote_once(self: Any, a: Any, a_is_scalar: bool, b: Any, b_is_scalar: bool, div_or_mod: bool) -> Any:
        key = a.name, a_is_scalar, b.name, b_is_scalar, div_or_mod
        if key not in promotions:
            promotions[key] = promote(self, a, a_is_scalar, b, b_is_scalar, div_or_mod)
        return promotions[key]

    def broadcast_if_needed(self: Any, lhs: Any, rhs: Any) -> Any:
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    semantic.computation_type_impl, semantic.broadcast_impl_value = promote_once, broadcast_if_needed


def _remember_numpy_types(interpreter: Any) -> None:
    numpy_type = interpreter._get_np_dtype
    found: dict[str, Any] = {}

    def numpy_type_once(of: Any) -> Any:
        name = of.scalar.name
        if name not in found:
            found[name] = numpy_type(of)
        return found[name]

    interpreter._get_np_dtype = numpy_type_once


def _call_directly(semantic: Any) -> Callable[..., None]:
    def patch(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
        function = inspect.unwrap(member)  # without the check that `_semantic` is given

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    return patch
