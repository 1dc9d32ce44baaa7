"""Triton's interpreter without most of its overhead.

To interpret a launch it replaces some three hundred functions of `triton.language`, and does so again at every call
from one jit function to another, where they are replaced already.
"""

import importlib.util
from types import SimpleNamespace
from typing import Any

__all__ = ["replace_the_language_once_a_launch"]


def replace_the_language_once_a_launch() -> None:
    """Leave the language alone where it is replaced. Where Triton does this in another way, leave Triton alone."""
    if importlib.util.find_spec("triton") is None:
        return
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
