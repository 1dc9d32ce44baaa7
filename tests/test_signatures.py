"""Others build against the public names and their signatures: they change on purpose only.

`python tests/test_signatures.py` rewrites the golden file.
"""

import enum
import inspect
from collections.abc import Iterator
from pathlib import Path

import mmkernels
import mmkernels.nn

GOLDEN = Path(__file__).with_name("signatures.txt")


def _signature(function: object) -> str:
    """Names, kinds, defaults and annotations as written, without the path by which a module imports `Tensor`."""
    signature = inspect.signature(function)  # type: ignore[arg-type]
    plain = [
        parameter.replace(annotation=_annotation(parameter.annotation)) for parameter in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=plain, return_annotation=_annotation(signature.return_annotation)))
    return text.replace("torch.Tensor", "Tensor").replace("'", "")


def _annotation(annotation: object) -> object:
    return getattr(annotation, "__forward_arg__", annotation)


def _members(name: str, of: type) -> Iterator[str]:
    """What a class itself, or a base class of this package, defines."""
    bases = [base for base in of.__mro__ if base.__module__.startswith("mmkernels")]
    for member in sorted({member for base in bases for member in vars(base)}):
        if member.startswith("_") and member != "__call__":
            continue
        value = inspect.getattr_static(of, member)
        if isinstance(value, property):
            yield f"{name}.{member}: property"
        elif callable(getattr(of, member)):
            yield f"{name}.{member}{_signature(getattr(of, member))}"


def described(module: object) -> Iterator[str]:
    for name in sorted(module.__all__):  # type: ignore[attr-defined]
        value, full = getattr(module, name), f"{module.__name__}.{name}"  # type: ignore[attr-defined]
        if isinstance(value, type) and issubclass(value, enum.Enum):
            yield f"{full}: {', '.join(f'{item.name}={item.value}' for item in value)}"
        elif isinstance(value, type) and issubclass(value, Exception):
            yield f"{full}({', '.join(base.__name__ for base in value.__bases__)})"
        elif isinstance(value, type):
            yield f"{full}{_signature(value)}"
            yield from _members(full, value)
        elif callable(value):
            yield f"{full}{_signature(value)}"
        else:
            yield f"{full}: {type(value).__name__}"


def listing() -> str:
    return "\n".join([*described(mmkernels), *described(mmkernels.nn)]) + "\n"


def test_public_signatures_are_as_before() -> None:
    assert listing() == GOLDEN.read_text(encoding="utf-8")


if __name__ == "__main__":
    GOLDEN.write_text(listing(), encoding="utf-8")
