"""Load a trained model."""

from __future__ import annotations

from pathlib import Path

import torch

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.data import Tokenizer
from mmkernels.pretrain.model import DualEncoder
from mmkernels.pretrain.run_folder import RunFolderError, stored_config
from mmkernels.pretrain.trainer import tokenizer_for

__all__ = ["load_model"]


def load_model(run: Path | str, device: torch.device | str = "cpu") -> tuple[DualEncoder, Tokenizer]:
    """The towers of a run's newest checkpoint, in evaluation mode, and the tokenizer they were trained with.

    Args:
        run: the run folder.
        device: where the model goes.

    Raises:
        RunFolderError: no run there, or no checkpoint yet.
        DamagedError: its checkpoint cannot be read.

    Example:
        >>> model, tokenizer = load_model("runs/clip")
        >>> texts = model.text(tokenizer(["a red heart", "a grey cat"]))  # [2, E]
        >>> similarity = model.image(images) @ texts.T  # images [B, 3, 32, 32] in [-1, 1]
    """
    folder = Path(run)
    config = stored_config(folder)
    newest = checkpoint.latest(folder / "checkpoints")
    if newest is None:
        raise RunFolderError(f"{folder} holds a run, but no checkpoint yet")
    weights = checkpoint.load_weights(newest)
    model = DualEncoder(config.model, config.backend).to(device)
    model.load_state_dict({n.removeprefix("model."): w for n, w in weights.items() if n.startswith("model.")})
    return model.eval(), tokenizer_for(config)
