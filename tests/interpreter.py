"""Triton's interpreter without most of its overhead.

For every launch, and at every call from one jit function to another, Triton replaces some three hundred functions of
`triton.language`, even when they are already replaced.
"""

import importlib.util
from types import SimpleNamespace
from typing import Any

__all__ = ["replace_the_language_once_a_launch"]


def replace_the_language_once_a_launch() -> None:
    """Skip the replacement when it is already in place. If Triton does this differently, leave Triton alone."""
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
