"""Trainers of others over two ranks, for test_trainers.py, which starts this file once per rank: `over_ranks.py name`.

Every rank takes half of each batch, as a loss of its own: the gradient is the mean over ranks and accumulated batches.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from integrations import test_trainers as alone
from torch import Tensor, nn

from mmkernels import GradCache

WORLD = 2


def half(rank: int, rows: Any) -> Any:
    size = len(rows) // WORLD
    return rows[rank * size : (rank + 1) * size]


def expected(plain: alone.Dual) -> list[Tensor]:
    """The parameters after a plain loop."""

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return sum(plain(half(r, x), half(r, y)) for r in range(WORLD)) / WORLD

    return alone.plain_loop(plain, [lambda x=x, y=y: loss(x, y) for x, y in alone.batches()])  # type: ignore[misc]


def train(kind: type[alone.Dual], run: Any) -> None:
    torch.manual_seed(1)
    model, plain = kind(), alone.Dual()
    plain.load_state_dict(model.state_dict())
    start = [p.detach().clone() for p in model.parameters()]
    run(model)
    alone.expect(model, start, expected(plain))


def accelerate(how: str) -> None:
    import accelerate

    accelerator = accelerate.Accelerator(gradient_accumulation_steps=alone.ACCUMULATED, cpu=True)

    def run(model: alone.Dual) -> None:
        optimizer = alone.adam(model.parameters())
        if how == "model":  # the wrapper reduces the scale of the loss, too
            prepared, optimizer = accelerator.prepare(model, optimizer)
            wrapped = [prepared]
        else:
            wrapped = list(accelerator.prepare(model.image, model.text))
            backward = {"backward": accelerator.backward} if how == "backward" else {}
            cache = GradCache(wrapped, model.contrast, chunk_size=[3, 2], **backward)
        for rows in alone.batches():
            inputs = [half(accelerator.process_index, each) for each in rows]
            with accelerator.accumulate(*wrapped):
                if how == "backward":
                    cache(*inputs)
                else:
                    accelerator.backward(prepared(*inputs)["loss"] if how == "model" else cache.as_loss()(*inputs))
                if not accelerator.sync_gradients:
                    continue
                if how != "model":
                    dist.all_reduce(model.log_scale.grad)
                    model.log_scale.grad /= WORLD
                accelerator.clip_grad_norm_(model.parameters(), alone.CLIP)
                optimizer.step()
                optimizer.zero_grad()

    train(alone.Cached, run)


def transformers() -> None:
    import transformers

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(alone.samples())

    options = {**alone.TRAINING, "per_device_train_batch_size": alone.BATCH // WORLD}
    arguments = transformers.TrainingArguments("runs", **options)

    def run(model: nn.Module) -> None:
        optimizers = alone.adam(model.parameters()), None
        InOrder(model, arguments, train_dataset=alone.samples(), optimizers=optimizers).train()

    train(alone.Cached, run)


def sentence_transformers() -> None:
    from pathlib import Path

    model, plain, trainer, texts = alone.sentences(Path(f"model{os.environ['RANK']}"), alone.BATCH // WORLD)
    trainer.train()
    loss = alone.SentenceLoss(plain, None)

    def mean(part: slice) -> Tensor:
        of_ranks = [[plain.preprocess(half(r, column[part])) for column in texts] for r in range(WORLD)]
        return sum(loss(features) for features in of_ranks) / WORLD

    cut = [slice(i, i + alone.BATCH) for i in range(0, len(texts[0]), alone.BATCH)]
    wanted = alone.plain_loop(plain, [lambda part=part: mean(part) for part in cut])  # type: ignore[misc]
    for parameter, after in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.detach(), after, rtol=1e-6, atol=1e-8)


def lightning() -> None:
    import lightning

    class Contrast(lightning.LightningModule, alone.Dual):
        def __init__(self) -> None:
            super().__init__()
            self.cache = GradCache([self.image, self.text], self.contrast, chunk_size=[3, 2])

        def training_step(self, batch: list[Tensor], index: int) -> Tensor:
            return self.cache.as_loss()(*(half(self.global_rank, rows) for rows in batch))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return alone.adam(self.parameters())

    trainer = lightning.Trainer(
        accelerator="cpu", devices=WORLD, strategy="ddp", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=alone.ACCUMULATED,
        gradient_clip_val=alone.CLIP, use_distributed_sampler=False,
    )  # fmt: skip
    train(Contrast, lambda model: trainer.fit(model, torch.utils.data.DataLoader(alone.batches(), batch_size=None)))


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    name, *arguments = sys.argv[1].split(":")
    globals()[name](*arguments)
    print("equal")
