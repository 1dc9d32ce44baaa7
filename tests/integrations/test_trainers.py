"""GradCache in trainers of others: the parameters after a few steps are those of a plain loop over the same batches."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import ROOT, python_blocks, run
from torch import Tensor, nn

from mmkernels import GradCache
from mmkernels.testing.contrastive import plain_infonce

pytestmark = pytest.mark.clients

PAGES = [ROOT / "docs/trainers.md", ROOT / "docs/packing-trainers.md", *sorted((ROOT / "docs/how-to").glob("*.md"))]
LIBRARIES = (
    "sentence_transformers", "transformers", "lightning", "accelerate", "datasets", "trl", "megatron", "open_clip"
)  # fmt: skip
BATCH, ACCUMULATED, STEPS, CLIP = 12, 2, 3, 0.5


@pytest.fixture(autouse=True)
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "ACCELERATE_USE_CPU"):
        monkeypatch.setenv(name, "1")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_the_docs_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "".join(block.code for block in python_blocks(page))
    for name in LIBRARIES:
        if re.search(rf"^(from|import) {name}\b", code, re.MULTILINE):
            pytest.importorskip(name)
    if "Trainer" in code:
        pytest.importorskip("accelerate")  # that of transformers needs it
    run(page, lambda: capsys.readouterr().out)


class Dual(nn.Module):
    """In float64, so that an adaptive optimizer does not amplify roundings."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4))
        self.text = nn.Linear(5, 4)
        self.log_scale = nn.Parameter(torch.tensor(1.0))
        self.double()

    def contrast(self, x: Tensor, y: Tensor) -> Tensor:
        return plain_infonce(x, y, self.log_scale.exp())

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        return self.contrast(self.image(pixels), self.text(words))


class Cached(Dual):
    """Returns the loss, as trainers expect."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = GradCache([self.image, self.text], self.contrast, chunk_size=[5, 3])

    def forward(self, pixels: Tensor, words: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        return {"loss": self.cache.as_loss()(pixels, words)}


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    options: dict[str, Any] = {"generator": generator, "dtype": torch.float64}
    count = BATCH * ACCUMULATED * STEPS
    return [{"pixels": torch.randn(6, **options), "words": torch.randn(5, **options)} for _ in range(count)]


def batches() -> list[list[Tensor]]:
    every = samples()
    cut = [every[i : i + BATCH] for i in range(0, len(every), BATCH)]
    return [[torch.stack([sample[name] for sample in part]) for name in ("pixels", "words")] for part in cut]


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.02)


def plain_loop(
    model: nn.Module, losses: Sequence[Callable[[], Tensor]], accumulated: int = ACCUMULATED
) -> list[Tensor]:
    """The parameters after training on these losses."""
    optimizer = adam(model.parameters())
    for i, loss in enumerate(losses, 1):
        (loss() / accumulated).backward()
        if i % accumulated == 0:
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


def models(kind: type[Dual] = Cached) -> tuple[Dual, list[Tensor], list[Tensor]]:
    """One to train, its parameters, and those that it should have afterwards."""
    torch.manual_seed(1)
    model, plain = kind(), Dual()
    plain.load_state_dict(model.state_dict())
    start = [p.detach().clone() for p in model.parameters()]
    return model, start, plain_loop(plain, [lambda x=x, y=y: plain(x, y) for x, y in batches()])  # type: ignore[misc]


def expect(model: nn.Module, start: list[Tensor], wanted: list[Tensor]) -> None:
    for parameter, before, after in zip(model.parameters(), start, wanted, strict=True):
        assert not torch.equal(before, after)
        torch.testing.assert_close(parameter.detach(), after, rtol=1e-8, atol=1e-10)


TRAINING: dict[str, Any] = {
    "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True, "lr_scheduler_type": "constant",
    "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": ACCUMULATED, "max_grad_norm": CLIP,
    "num_train_epochs": 1,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_transformers() -> None:
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")

    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *_: Any) -> torch.utils.data.Sampler[int]:
            return torch.utils.data.SequentialSampler(samples())

    model, start, wanted = models()
    optimizers = adam(model.parameters()), None
    arguments = transformers.TrainingArguments("runs", **TRAINING)
    InOrder(model, arguments, train_dataset=samples(), optimizers=optimizers).train()
    expect(model, start, wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["automatic", "manual", "manual, one loss"])
def test_lightning(how: str) -> None:
    lightning = pytest.importorskip("lightning")

    class Contrast(lightning.LightningModule, Dual):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = how == "automatic"
            backward = {"backward": self.manual_backward} if how == "manual" else {}
            self.cache = GradCache([self.image, self.text], self.contrast, chunk_size=[5, 3], **backward)

        def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
            if how == "automatic":
                return self.cache.as_loss()(*batch)
            if how == "manual":
                self.cache(*batch, scale_loss=lambda loss: loss / ACCUMULATED)
            else:
                self.manual_backward(self.cache.as_loss()(*batch) / ACCUMULATED)
            if (index + 1) % ACCUMULATED == 0:
                self.clip_gradients(self.optimizers(), CLIP, "norm")
                self.optimizers().step()
                self.optimizers().zero_grad()
            return None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return adam(self.parameters())

    model, start, wanted = models(Contrast)
    automatic = {"accumulate_grad_batches": ACCUMULATED, "gradient_clip_val": CLIP} if how == "automatic" else {}
    lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, **automatic,
    ).fit(model, torch.utils.data.DataLoader(batches(), batch_size=None))  # fmt: skip
    expect(model, start, wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ["the model's loss", "a loss of prepared encoders", "backward"])
def test_accelerate(how: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=ACCUMULATED, cpu=True)
    model, start, wanted = models()
    prepared, image, text, optimizer = accelerator.prepare(model, model.image, model.text, adam(model.parameters()))
    backward = {"backward": accelerator.backward} if how == "backward" else {}
    cache = GradCache([image, text], model.contrast, chunk_size=[5, 3], **backward)
    for pixels, words in batches():
        with accelerator.accumulate(prepared):
            if how == "backward":
                cache(pixels, words)
            else:
                loss = prepared(pixels, words)["loss"] if how == "the model's loss" else cache.as_loss()(pixels, words)
                accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
    expect(model, start, wanted)


def _sentence_model(folder: Path) -> Any:
    """A tiny one with random weights, in float64, without dropout."""
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", *(f"w{i}" for i in range(30))]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    quiet = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    torch.manual_seed(1)
    BertModel(BertConfig(vocab_size=len(words), **shape, **quiet), add_pooling_layer=False).save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu").double()


class SentenceLoss(nn.Module):
    """Both of a plain and of a cached step."""

    def __init__(self, model: nn.Module, chunk: int | None) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk

    def forward(self, features: Any, labels: Any = None) -> Tensor:
        features = list(features)
        if self.chunk is None:
            return self.contrast(*(self.model(dict(each))["sentence_embedding"] for each in features))
        rep = lambda output: output["sentence_embedding"]  # noqa: E731
        cache = GradCache([self.model] * len(features), self.contrast, chunk_size=self.chunk, get_rep=rep)
        return cache.as_loss()(*features)

    def contrast(self, x: Tensor, y: Tensor) -> Tensor:
        return plain_infonce(*(nn.functional.normalize(rows, dim=-1) for rows in (x, y)))


def sentences(folder: Path, rows: int) -> tuple[nn.Module, nn.Module, Any, list[list[str]]]:
    """A model, a copy, the trainer of the model in batches of so many rows, and the columns of texts."""
    import datasets
    import sentence_transformers as library

    model = _sentence_model(folder)
    plain = copy.deepcopy(model).train()
    count = BATCH * ACCUMULATED * STEPS
    anchors = [" ".join(f"w{(i * j) % 30}" for j in range(1, 2 + i % 4)) for i in range(count)]
    positives = [f"w{(7 * i) % 30} w{i % 5}" for i in range(count)]

    class InOrder(library.SentenceTransformerTrainer):  # type: ignore[misc, name-defined]
        def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> Any:
            return torch.utils.data.BatchSampler(torch.utils.data.SequentialSampler(dataset), batch_size, drop_last)

    trainer = InOrder(
        model,
        library.SentenceTransformerTrainingArguments("runs", **{**TRAINING, "per_device_train_batch_size": rows}),
        train_dataset=datasets.Dataset.from_dict({"anchor": anchors, "positive": positives}),
        loss=SentenceLoss(model, 5),
        optimizers=(adam(model.parameters()), None),
    )
    return model, plain, trainer, [anchors, positives]


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(tmp_path: Path) -> None:
    for name in ("datasets", "sentence_transformers"):
        pytest.importorskip(name)
    model, plain, trainer, texts = sentences(tmp_path / "model", BATCH)
    start, loss = [p.detach().clone() for p in model.parameters()], SentenceLoss(plain, None)
    trainer.train()
    cut = [slice(i, i + BATCH) for i in range(0, len(texts[0]), BATCH)]
    steps = [lambda part=part: loss([plain.preprocess(column[part]) for column in texts]) for part in cut]  # type: ignore[misc]
    moved = 0
    for parameter, before, after in zip(model.parameters(), start, plain_loop(plain, steps), strict=True):
        torch.testing.assert_close(parameter.detach(), after, rtol=1e-6, atol=1e-8)
        moved += not torch.equal(before, after)
    assert moved > 10


OVER_RANKS = {
    "accelerate:model": ("accelerate",),
    "accelerate:encoders": ("accelerate",),
    "accelerate:backward": ("accelerate",),
    "transformers": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "sentence_transformers": ("sentence_transformers", "datasets"),
}


@pytest.mark.parametrize("name", OVER_RANKS)
def test_over_ranks(name: str) -> None:
    for library in OVER_RANKS[name]:
        pytest.importorskip(library)
    tests = Path(__file__).resolve().parents[1]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if name != "lightning" else []
    done = subprocess.run(
        [sys.executable, *launch, str(tests / "integrations/over_ranks.py"), name],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("equal") == 2
