"""The losses of sentence-transformers and ours: the same values and gradients, the same weights after training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor

sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")

from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # noqa: E402  after the skip
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments  # noqa: E402
from sentence_transformers.sentence_transformer import losses as theirs  # noqa: E402
from sentence_transformers.util import cos_sim, dot_score  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast  # noqa: E402

from mmkernels.integrations import sentence_transformers as ours  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
WORDS = [f"w{i}" for i in range(60)]
GTE = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
DIRECTIONS = [
    {"directions": ("query_to_doc",)},
    {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"},
    {"directions": ("doc_to_query", "query_to_doc")},
    {"directions": GTE},
]
HARDNESS = [{}] + [
    {"hardness_mode": mode, "hardness_strength": 4.0}
    for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
]


def embeddings(columns: int, rows: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Two of whose documents are the same."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, 6, generator=generator, dtype=torch.float64) for _ in range(columns)]
    if rows > 3:
        made[1][3] = made[1][0]
    return [each.to(dtype).requires_grad_() for each in made]


def outcome(loss: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-12) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("rows", [1, 7])
def test_multiple_negatives(columns: int, rows: int) -> None:
    """Every direction with every kind of hardness; cosines and inner products; the cached loss and the plain one."""
    for directions, hardness in itertools.product(DIRECTIONS, HARDNESS):
        for similarity in (cos_sim, dot_score):
            options = {"scale": 5.0, "similarity_fct": similarity, **directions, **hardness}
            both = []
            for module in (theirs, ours):
                leaves = embeddings(columns, rows)
                plain = module.MultipleNegativesRankingLoss(None, **options)
                both.append(outcome(plain.compute_loss_from_embeddings(leaves, None), leaves))
            assert_same(both[1], both[0])
            cached = ours.CachedMultipleNegativesRankingLoss.__new__(ours.CachedMultipleNegativesRankingLoss)
            torch.nn.Module.__init__(cached)
            cached.loss = ours.MultipleNegativesRankingLoss(None, **options)
            leaves = embeddings(columns, rows)
            chunks = [list(each.split(3)) for each in leaves]
            assert_same(outcome(cached.calculate_loss(chunks), leaves), both[0])


def guided(module: Any, **options: Any) -> Any:
    """The cached loss with a guide, without models."""
    loss = module.CachedGISTEmbedLoss.__new__(module.CachedGISTEmbedLoss)
    torch.nn.Module.__init__(loss)
    settings = {"temperature": 0.1, "mini_batch_size": 3, "margin_strategy": "absolute", "margin": 0.0}
    settings |= {"contrast_anchors": True, "contrast_positives": True, "gather_across_devices": False}
    for name, value in {**settings, **options}.items():
        setattr(loss, name, value)
    loss.show_progress_bar = False
    loss.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    loss.cross_entropy_loss = torch.nn.CrossEntropyLoss()
    return loss


@pytest.mark.parametrize("columns", [2, 3, 4])
@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("kind", ["absolute", "relative"])
@pytest.mark.parametrize("margin", [0.0, 0.2, -0.3])
def test_guided(columns: int, rows: int, kind: str, margin: float) -> None:
    for anchors, positives in itertools.product([True, False], repeat=2):
        both = []
        for module in (theirs, ours):
            leaves = embeddings(columns, rows)
            guide = [x.detach() for x in embeddings(columns, rows, seed=1)]
            options = {"margin_strategy": kind, "margin": margin}
            loss = guided(module, contrast_anchors=anchors, contrast_positives=positives, **options)
            chunks = [[list(each.split(3)) for each in given] for given in (leaves, guide)]
            both.append(outcome(loss.calculate_loss(*chunks), leaves))
        assert_same(both[1], both[0])


def test_a_tie_under_the_guide_is_kept() -> None:
    """Documents that are the same to the guide as the positive, in every precision: of random features, so that
    rounding could tell them apart."""
    for dtype, seed in itertools.product((torch.float64, torch.float32, torch.bfloat16), range(5)):
        leaves = [torch.randn(40, 96, generator=torch.Generator().manual_seed(seed + i)).to(dtype) for i in range(2)]
        guide = [torch.randn(40, 96, generator=torch.Generator().manual_seed(seed + 9)).to(dtype)] * 2
        guide = [guide[0], guide[0][:1].repeat(40, 1)]  # all documents are alike
        loss = guided(ours, contrast_anchors=False, contrast_positives=False)
        found = loss.calculate_loss(*[[[each] for each in given] for given in (leaves, guide)])
        plain = ours.MultipleNegativesRankingLoss(None, scale=10.0).compute_loss_from_embeddings(leaves, None)
        torch.testing.assert_close(found, plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=0)


def over_ranks(rank: int, world: int, whose: str, name: str, options: dict[str, Any]) -> list[Tensor]:
    module = theirs if whose == "theirs" else ours
    leaves = embeddings(3, 5, seed=rank)
    if name == "gist":
        guide = [x.detach() for x in embeddings(3, 5, seed=10 + rank)]
        loss = guided(module, gather_across_devices=True, **options)
        return outcome(loss.calculate_loss(*[[[each] for each in given] for given in (leaves, guide)]), leaves)
    loss = module.MultipleNegativesRankingLoss(None, gather_across_devices=True, **options)
    return outcome(loss.compute_loss_from_embeddings(leaves, None), leaves)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mnrl", {}),
        ("mnrl", {"directions": GTE}),
        ("mnrl", {"directions": GTE, "hardness_mode": "all_negatives", "hardness_strength": 3.0}),
        ("gist", {"margin": 0.1}),
    ],
    ids=["plain", "gte", "hard", "gist"],
)
def test_gathered_across_devices(name: str, options: dict[str, Any]) -> None:
    expected, found = (ranks.run(2, over_ranks, whose, name, options) for whose in ("theirs", "ours"))
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a guide, stored."""
    folder = tmp_path_factory.mktemp("models")
    words = ["[PAD]", "[UNK]", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, width in (("model", 32), ("guide", 16)):
        torch.manual_seed(width)
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
        fast.save_pretrained(folder / name)
        shape = {"hidden_size": width, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
        BertModel(BertConfig(vocab_size=len(words), **shape)).save_pretrained(folder / name)
    return folder


def trained(folder: Path, module: Any, name: str, dtype: torch.dtype, out: Path, **options: Any) -> dict[str, Tensor]:
    """The weights after 20 steps of the trainer."""
    model = SentenceTransformer(str(folder / "model"), device="cpu").to(dtype)
    if "GIST" in name:
        options["guide"] = SentenceTransformer(str(folder / "guide"), device="cpu").to(dtype)
    loss = getattr(module, name)(model, **options)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(len(WORDS), (64, 3, 5), generator=generator)
    columns = {
        key: [" ".join(WORDS[i] for i in row[j, : 2 + row[j, 0] % 4]) for row in rows]
        for j, key in enumerate(("anchor", "positive", "negative"))
    }
    arguments = Arguments(
        str(out),
        per_device_train_batch_size=16,
        max_steps=20,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # some gradients (of key biases) are only rounding
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=3,
        disable_tqdm=True,
    )
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=datasets.Dataset.from_dict(columns), loss=loss)
    trainer.train()
    return {key: value.detach().clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultipleNegativesRankingLoss", DIRECTIONS[0]),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5, **DIRECTIONS[0]}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5, **DIRECTIONS[1]}),
        ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 5, **DIRECTIONS[3]}),
        ("CachedGISTEmbedLoss", {"mini_batch_size": 5, "margin": 0.05, "margin_strategy": "relative"}),
    ],
    ids=["plain", "cached", "symmetric", "gte", "gist"],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
def test_twenty_steps_of_the_trainer(
    folder: Path, tmp_path: Path, name: str, options: dict[str, Any], dtype: torch.dtype, tolerance: float
) -> None:
    expected = trained(folder, theirs, name, dtype, tmp_path, **options)
    found = trained(folder, ours, name, dtype, tmp_path, **options)
    before = SentenceTransformer(str(folder / "model"), device="cpu").state_dict()
    moved = max(
        float((expected[key] - before[key]).abs().max()) for key in expected if expected[key].is_floating_point()
    )
    assert moved > 1e-3
    assert_same(list(found.values()), list(expected.values()), tolerance)


def test_another_similarity_is_refused() -> None:
    with pytest.raises(ValueError, match="similarity_fct: expected cos_sim or dot_score of"):
        ours.MultipleNegativesRankingLoss(None, similarity_fct=lambda a, b: a @ b.T)
    loss = ours.MultipleNegativesRankingLoss(None)
    loss.similarity_fct = sentence_transformers.util.euclidean_sim
    with pytest.raises(ValueError, match="similarity_fct: expected"):
        loss.compute_loss_from_embeddings(embeddings(2, 3), None)
    assert isinstance(loss, theirs.MultipleNegativesRankingLoss) and loss.get_config_dict()["scale"] == 20.0
