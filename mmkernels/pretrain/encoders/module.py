"""Any nn.Module as an encoder: one of your own, of torchvision, timm or transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.batch import Piece
from mmkernels.pretrain.encoders.base import EncoderModule
from mmkernels.pretrain.pixels import plain_images
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.tokens import Layout

__all__ = ["Module"]


@dataclass(frozen=True)
class Module:
    """A module over a batch of a field's values [B, ...], which have one shape: it returns features [B, out], or
    [B, tokens, out], which a linear layer brings to the model's width. One that mixes the samples of a batch, as batch
    normalisation does in training, makes gradients depend on the chunk size."""

    factory: str | Callable[[], nn.Module] = ""
    """What makes the module: a callable without arguments, or its import path, "package.module:callable"."""
    out: int = 128
    """Channels of what it returns."""
    tokens: int = 1
    """Tokens that it makes of a value."""
    size: int | None = None
    """Side of images in pixels, which it gets as float32 [3, size, size] in [-1, 1]; None: values are arrays of numbers
    and stay as they are."""

    def __post_init__(self) -> None:
        for name in ("out", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.size is not None and self.size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {self.size}")
        if callable(self.factory) and not isinstance(self.factory, _Named):
            object.__setattr__(self, "factory", _Named(self.factory))

    @property
    def reads_text(self) -> bool:
        return False

    def prepare(self, values: Sequence[Any], tokenizer: TextTokenizer) -> list[Piece]:
        """Arrays and tensors [...] -> [1, ...]; with `size`, images uint8 [H, W, 3 or 4] or tensors of a view."""
        tensors = [None if value is None else self._tensor(value) for value in values]
        present = [tensor for tensor in tensors if tensor is not None]
        for tensor in present:
            if tensor.shape != present[0].shape or tensor.dtype != present[0].dtype:
                like = f"[{', '.join(map(str, present[0].shape))}] {present[0].dtype}"
                raise ValueError(f"values: expected {like} like the first, got {list(tensor.shape)} {tensor.dtype}")
        nothing = present[0][None][:0] if present else torch.zeros(0)
        return [Piece(nothing if tensor is None else tensor[None]) for tensor in tensors]

    def _tensor(self, value: Any) -> Tensor:
        if self.size is not None and not isinstance(value, Tensor):
            return plain_images([value], self.size)[0]
        try:
            return torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"values: expected arrays of numbers, got {type(value).__name__} ({error})") from error

    def length(self, value: Any, tokenizer: TextTokenizer) -> int:
        return 0 if value is None else self.tokens

    def build(self, facts: Facts) -> EncoderModule:
        return ModuleEncoder(self, facts)


class _Named:
    """A callable that a run folder can store by name."""

    def __init__(self, function: Callable[[], nn.Module]) -> None:
        self.function = function

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Named) and self.function == other.function

    def __hash__(self) -> int:
        return hash(self.function)

    def __call__(self) -> nn.Module:
        return self.function()

    def __repr__(self) -> str:
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        return f"{self.function.__module__}:{name}"


class ModuleEncoder(EncoderModule):
    def __init__(self, part: Module, facts: Facts) -> None:
        super().__init__()
        self.part = part
        self.module = made_by(part.factory)
        self.project = nn.Linear(part.out, facts.shape.width)

    def forward(self, batch: PackedBatch) -> Tensor:
        out = self.module(batch.tokens) if batch.num_tokens else self.project.weight.new_zeros((0, self.part.out))
        expected = [batch.num_tokens, self.part.tokens, self.part.out]
        if not isinstance(out, Tensor) or (list(out.shape) != expected and list(out.shape) != expected[::2]):
            alone = f" or {expected[::2]}" if self.part.tokens == 1 else ""
            raise ValueError(f"{self.part.factory}: expected it to return {expected}{alone}, got {_shown(out)}")
        return self.project(out.reshape(-1, self.part.out))

    def layout(self, batch: PackedBatch) -> Layout:
        each = self.part.tokens
        return Layout(batch.cu_seqlens * each, tuple(end * each for end in batch.cu_seqlens_host))


def made_by(factory: str | Callable[[], nn.Module]) -> nn.Module:
    """The module of a factory. Raise ValueError if there is none."""
    expected = 'factory: expected a callable that returns an nn.Module, or its import path "package.module:callable"'
    make: Any = factory
    if isinstance(factory, str):
        package, _, name = factory.partition(":")
        try:
            make = import_module(package)
            for part in name.split("."):
                make = getattr(make, part)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"{expected}, got {factory!r} ({error})") from error
    module = make() if callable(make) else make
    if not isinstance(module, nn.Module):
        raise ValueError(f"{expected}, got {factory!r}, which makes {_shown(module)}")
    return module


def _shown(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else type(value).__name__
