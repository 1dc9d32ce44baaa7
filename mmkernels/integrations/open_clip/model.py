"""A trained two-tower model as a model of open_clip: for its zero-shot classifier, and for whatever else asks a model
for `encode_image`, `encode_text` and `logit_scale`.

The towers are those of mmkernels with their weights, not open_clip's own: these have no rotary positions, no norms of
queries and keys, no hashed words and no convolutional stem, so that the weights would not fit them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from mmkernels import PackedBatch
from mmkernels.pretrain.data import decode_image
from mmkernels.pretrain.encoders import HashedWords, Module, Patches, Words, WordVectors
from mmkernels.pretrain.load import Pretrained, load_model
from mmkernels.pretrain.pixels import plain_images
from mmkernels.pretrain.run_folder import stored_config
from mmkernels.pretrain.tokens import Tokens

__all__ = ["OpenClip", "Preprocess", "Tokenize", "to_open_clip"]

_NOTHING = -1  # after the end of a text


class OpenClip(NamedTuple):
    """What `open_clip.create_model_from_pretrained` and `open_clip.get_tokenizer` return."""

    model: Any
    preprocess: Preprocess
    tokenizer: Tokenize


def to_open_clip(run: Path | str, objective: str = "", device: torch.device | str = "cpu") -> OpenClip:
    """The two towers of a trained model as an `open_clip.CustomTextCLIP`, in evaluation mode. Their embeddings equal
    those of `load_model(run).embed`.

    Args:
        run: folder of a run, or of a model that `mmkernels export` wrote.
        objective: the objective that compares images and texts; empty: the only one.
        device: where the model goes.

    Raises:
        RunFolderError: no run there, or no checkpoint yet.
        ValueError: no such objective, or several.

    Example:
        >>> model, preprocess, tokenizer = to_open_clip("runs/clip")
        >>> weights = open_clip.build_zero_shot_classifier(model, tokenizer, ["cat", "dog"], ["a {}"])
        >>> scores = model.encode_image(preprocess(Image.open("cat.png"))[None], normalize=True) @ weights
    """
    trained = load_model(run, device)
    name, image, text = _pair(trained, objective)
    loss = trained.model.objectives[name].loss
    model: Any = open_clip.CustomTextCLIP.__new__(open_clip.CustomTextCLIP)  # without towers of its own
    nn.Module.__init__(model)
    model.output_dict = False
    model.visual, model.text = ImageTower(trained, image), TextTower(trained, text)
    model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
    model.logit_scale = nn.Parameter(loss.scale.detach().log())
    bias = getattr(loss, "logit_bias", None)
    model.logit_bias = None if bias is None else nn.Parameter(bias.detach().clone())
    preprocess = Preprocess(model.visual.image_size, stored_config(Path(run)).resolution)
    return OpenClip(model.to(device).eval(), preprocess, Tokenize(trained, text))


class Tower(nn.Module):
    """What open_clip asks of a tower besides its features."""

    def locked(self, name: str, unlocked: int) -> None:
        """Let nothing of it learn."""
        if unlocked:
            raise ValueError(f"{name}: expected 0, since a tower is locked as a whole, got {unlocked}")
        self.requires_grad_(False)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations of blocks again in the backward instead of keeping them."""
        module: Any
        for module in self.modules():
            if hasattr(module, "recompute"):
                module.recompute = enable


class ImageTower(Tower):
    """Images [B, 3, size, size] in [-1, 1] -> vectors [B, E], as long as they come."""

    def __init__(self, trained: Pretrained, stream: str) -> None:
        super().__init__()
        self.stream, self.collator = stream, trained.collator
        self.encoder = trained.model.encoder(stream)
        self.image_size = trained.collator.streams[stream].encoder.size
        self.image_mean = self.image_std = (0.5, 0.5, 0.5)

    def lock(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Let nothing of it learn; towers of mmkernels have no statistics to freeze."""
        norms = torch.nn.modules.batchnorm._BatchNorm
        if freeze_bn_stats and any(isinstance(module, norms) for module in self.modules()):
            raise ValueError("freeze_bn_stats: expected False for a module of your own with batch norms, got True")
        self.locked("unlocked_groups", unlocked_groups)

    def forward(self, images: Tensor) -> Tensor:
        size = self.image_size
        if images.ndim != 4 or list(images.shape[1:]) != [3, size, size]:
            raise ValueError(f"images: expected [B, 3, {size}, {size}], got {list(images.shape)}")
        pieces = _prepared(self.collator, self.stream, images.float().cpu().unbind())
        return _projected(self.encoder, pieces, images.device)


class TextTower(Tower):
    """What `Tokenize` returns -> vectors [B, E], as long as they come."""

    def __init__(self, trained: Pretrained, stream: str) -> None:
        super().__init__()
        self.encoder = trained.model.encoder(stream)
        self.context_length = _longest(trained, stream)
        self.vocab_size = len(trained.collator.tokenizer)

    def lock(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Let nothing of it learn, layer norms included."""
        if not freeze_layer_norm:
            raise ValueError("freeze_layer_norm: expected True, since a tower is locked as a whole, got False")
        self.locked("unlocked_layers", unlocked_layers)

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = (tokens.flatten(2)[..., 0] if tokens.ndim > 2 else tokens).ne(_NOTHING).sum(1).tolist()
        pieces = [row[:length] for row, length in zip(tokens.cpu(), lengths, strict=True)]
        return _projected(self.encoder, pieces, tokens.device)


class Preprocess:
    """An image -> float32 [3, size, size] in [-1, 1], as `mmkernels evaluate` reads files: upright, over white, fitted
    into the square, neither stretched nor cropped.

    Args:
        size: side in pixels that the model sees.
        resolution: side in pixels at which the run kept images.
    """

    def __init__(self, size: int, resolution: int) -> None:
        self.size, self.resolution = size, resolution

    def __call__(self, image: Any) -> Tensor:
        """image: of Pillow, or uint8 [H, W, 3 or 4]."""
        kept = image if isinstance(image, np.ndarray) else decode_image(image, self.resolution)
        return plain_images([kept], self.size)[0]


class Tokenize:
    """Texts -> int64 [B, context length, ...], -1 after the end of a text.

    Args:
        trained: whose tokenizer it is.
        stream: of the texts.
    """

    def __init__(self, trained: Pretrained, stream: str) -> None:
        self.collator, self.stream, self.context_length = trained.collator, stream, _longest(trained, stream)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        length = self.context_length if context_length is None else context_length
        if not 1 <= length <= self.context_length:
            raise ValueError(f"context_length: expected 1 to {self.context_length}, got {length}")
        pieces = _prepared(self.collator, self.stream, [texts] if isinstance(texts, str) else texts)
        trailing = pieces[0].shape[1:] if pieces else ()
        out = torch.full((len(pieces), length, *trailing), _NOTHING, dtype=torch.int64)
        for row, piece in zip(out, pieces, strict=True):
            row[: len(piece)] = piece[:length]
        return out


def _pair(trained: Pretrained, objective: str) -> tuple[str, str, str]:
    """(objective, its stream of images, its stream of texts)."""
    found: dict[str, tuple[str, str]] = {}
    kinds = {name: _kind(stream.encoder) for name, stream in trained.collator.streams.items()}
    for name, module in trained.model.objectives.items():
        part = getattr(module, "part", None)
        a, b = getattr(part, "a", ""), getattr(part, "b", "")
        if getattr(part, "weight", 0) == 0 or not {a, b}.isdisjoint(trained.collator.without):
            continue  # it has not learned
        if hasattr(getattr(module, "loss", None), "scale") and {kinds.get(a), kinds.get(b)} == {"image", "text"}:
            found[name] = (a, b) if kinds[a] == "image" else (b, a)
    if not found:
        raise ValueError(
            "run: expected one with an objective that compares images and texts by a learned scale, and that both have "
            "taught, got one without"
        )
    if (objective or len(found) > 1) and objective not in found:
        raise ValueError(f"objective: expected one of {', '.join(found)}, got {objective!r}")
    name = objective or next(iter(found))
    return name, *found[name]


def _kind(encoder: Any) -> str:
    inner = getattr(encoder, "encoder", encoder)  # of one with adapters
    if isinstance(inner, Patches) or (isinstance(inner, Module) and inner.size is not None):
        return "image"
    return "text" if isinstance(inner, Words | HashedWords | WordVectors) else ""


def _longest(trained: Pretrained, stream: str) -> int:
    encoder = trained.collator.streams[stream].encoder
    return int(encoder.max_words if hasattr(encoder, "max_words") else encoder.max_tokens)


def _prepared(collator: Any, stream: str, values: Sequence[Any]) -> list[Any]:
    return [piece.tokens for piece in collator.streams[stream].encoder.prepare(values, collator.tokenizer)]


def _projected(encoder: Any, pieces: Sequence[Any], device: torch.device) -> Tensor:
    mixed = any(isinstance(piece, list) for piece in pieces)
    batch = PackedBatch.from_samples(pieces, mrope=mixed).to(device)
    vectors: Tensor = encoder.projected(Tokens(encoder.encoder(batch), encoder.encoder.layout(batch)))
    return vectors
