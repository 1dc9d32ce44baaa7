"""Load a trained model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data import Collator, Sample
from mmkernels.pretrain.generate import context_of, go_on, prompts_of, writer
from mmkernels.pretrain.model import Model
from mmkernels.pretrain.recipe import Facts
from mmkernels.pretrain.run_folder import EXPORTED, RunFolderError, stored_classes, stored_config
from mmkernels.pretrain.schedule import stage_at
from mmkernels.pretrain.tokenizer import EOS, TextTokenizer

__all__ = ["Pretrained", "load_model", "stored_weights"]


class Pretrained(NamedTuple):
    """A trained model, and what turns values into its inputs."""

    model: Model
    collator: Collator

    def embed(self, stream: str, values: Sequence[Any]) -> Tensor:
        """Unit vectors [n, E] of n values of a stream's field, without gradients.

        Args:
            stream: of the recipe.
            values: as in a data set: images uint8 [H, W, 3 or 4], texts, ...
        """
        if not len(values) and stream in self.collator.streams and stream not in self.collator.without:
            like = next(self.model.parameters())
            return torch.empty((0, self.model.encoder(stream).embed_dim), dtype=like.dtype, device=like.device)
        batch = self.batch({stream: values})
        if missing := [i for i, value in enumerate(values) if value is None]:
            raise ValueError(f"values: expected one of {stream} each, got None at {missing[0]}")
        with torch.no_grad():
            return self.model.encoder(stream).embeddings(batch[stream])

    def write(self, objective: str, values: Mapping[str, Sequence[Any]], most_tokens: int = 64) -> list[str]:
        """The texts that an objective of next tokens holds for the likeliest, word by word, of n samples.

        Args:
            objective: of the recipe, a `NextToken`.
            values: as in `batch`. Of the stream that is written: what a text begins with, or documents up to the image
                whose caption is asked for; it may be absent. The other streams are read.
            most_tokens: the longest that is written.

        Returns:
            what follows, without the beginnings.

        Raises:
            ValueError: no such objective, or a beginning as long as the stream allows, whose end would be cut off.

        Example:
            >>> load_model("runs/caption").write("words", {"image": images})
        """
        if values and values.keys() <= self.collator.streams.keys() and not any(map(len, values.values())):
            writer(self.model, objective)  # raises for another objective
            return []
        with torch.no_grad():
            batch = self.batch(values)
            begun = prompts_of(self.model, batch, objective)
            written = writer(self.model, objective).stream
            longest = getattr(self.collator.streams[written].encoder, "max_tokens", None)
            if longest and (cut := [i for i, ids in enumerate(begun) if len(ids) >= longest]):
                raise ValueError(
                    f"values: expected beginnings of {written} of fewer than {longest} tokens, got as many or more at "
                    f"{cut[0]}, whose end would be cut off"
                )
            prompts = [ids[:-1] if ids[-1:] == [EOS] else ids for ids in begun]
            found = go_on(self.model, objective, context_of(self.model, batch, objective), prompts, most_tokens)
        return [self.collator.tokenizer.decode(ids) for ids in found]

    def batch(self, values: Mapping[str, Sequence[Any]]) -> Batch:
        """A batch of n samples, without views: the values of their fields, by stream; other streams are absent."""
        streams = self.collator.streams
        read = [name for name in streams if name not in self.collator.without]
        if unknown := [name for name in values if name not in read]:
            without = "".join(f"; the run learned without {name}" for name in unknown if name in streams)
            raise ValueError(
                f"values: expected some of the streams {', '.join(read)}, got {', '.join(unknown)}{without}"
            )
        counts = {name: len(each) for name, each in values.items()}
        if len(set(counts.values())) != 1:
            raise ValueError(f"values: expected as many of every stream, got {counts}")
        n = next(iter(counts.values()))
        fields = {streams[name].field or name: each for name, each in values.items()}
        samples = [Sample({field: each[i] for field, each in fields.items()}, i, str(i)) for i in range(n)]
        return self.collator(samples, range(n), mode="plain").to(next(self.model.parameters()).device)


def load_model(run: Path | str, device: torch.device | str = "cpu") -> Pretrained:
    """The model of a run's newest checkpoint, in evaluation mode: its averaged weights, if the run kept them.

    Args:
        run: folder of the run, or of a model that `mmkernels export` wrote.
        device: where the model goes.

    Raises:
        RunFolderError: no run there, or no checkpoint yet.
        DamagedError: its checkpoint cannot be read.

    Example:
        >>> clip = load_model("runs/clip")
        >>> texts = clip.embed("text", ["a red heart", "a grey cat"])  # [2, E]
        >>> similarity = clip.embed("image", images) @ texts.T  # images: uint8 [H, W, 3] each
    """
    folder = Path(run)
    config = stored_config(folder)
    step, weights = stored_weights(folder)
    recipe = config.wiring()
    tokenizer, classes = TextTokenizer.load(folder / "tokenizer.json"), stored_classes(folder)
    model = Model(recipe, Facts(recipe.model, len(tokenizer), classes, recipe.streams, config.seed, config.backend)).to(
        device
    )
    model.load_state_dict(weights)
    if model.fusion is not None:
        model.fusion.depth = stage_at(recipe, max(step - 1, 0)).fusion_depth
    collator = Collator(recipe.streams, tokenizer, tuple(classes), seed=config.seed, without=config.without)
    return Pretrained(model.eval(), collator)


def stored_weights(run: Path) -> tuple[int, dict[str, Tensor]]:
    """(Steps done, the model's weights) of a run's newest checkpoint: the averaged ones, if the run kept them. Of an
    exported model: its own.

    Raises as `load_model` does.
    """
    if (exported := run / EXPORTED).exists():
        remedy = "Export the model again"
        with checkpoint.whole(exported, remedy):
            step = int(json.loads(exported.read_text(encoding="utf-8"))["step"])
        return step, checkpoint.load_weights(run, remedy)
    config, newest = stored_config(run), checkpoint.latest(run / "checkpoints")
    if newest is None:
        raise RunFolderError(f"{run} holds a run, but no checkpoint yet")
    prefix = "average.module." if config.ema else "model."
    return checkpoint.step_of(newest), checkpoint.load_weights(newest, prefix=prefix)
