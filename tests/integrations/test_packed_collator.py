"""`PackedCollator`: a model computes for the packed outputs of its processor what it computes for each alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "AttentionMaskInterface"):
    pytest.skip("needs transformers with AttentionMaskInterface", allow_module_level=True)

from integrations.tiny_models import END, IMAGE, MODELS, START, built, pixels, text  # noqa: E402  after the skip

from mmkernels import Modality, PackedBatch  # noqa: E402
from mmkernels.integrations.torch_data import PackedDataset, PackedLoader, PackedSampler  # noqa: E402
from mmkernels.integrations.transformers import PackedCollator, register  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
NAMES = ("llama", "mistral", "gemma2", "llava", "gemma3", "idefics3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")
VIDEO = 98
Inputs = dict[str, Tensor]


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    transformers.logging.set_verbosity_error()


def padded(sample: Inputs, before: int, after: int) -> Inputs:
    """As a processor pads it, and with labels."""
    per_token = ("input_ids", "token_type_ids", "mm_token_type_ids")
    ids = sample["input_ids"]
    whole = sample | {"attention_mask": torch.ones_like(ids), "labels": torch.where(ids < 90, ids, -100)}
    pads = {
        key: torch.nn.functional.pad(whole[key], (before, after))
        for key in (*per_token, "attention_mask")
        if key in whole
    }
    pads["labels"] = torch.nn.functional.pad(whole["labels"], (before, after), value=-100)
    return whole | pads


def of_clips(name: str, seed: int) -> Inputs:
    """A clip and an image among words; Qwen3-VL has text between the frames of a clip."""
    clip, picture = torch.tensor([[2, 4, 4]]), torch.tensor([[1, 4, 2 + 2 * (seed % 2)]])
    frames = [4, 4] if name == "qwen3_vl" else [8]
    parts = [text(seed, 2)]
    for token, count in [*((VIDEO, count) for count in frames), (IMAGE, int(picture.prod()) // 4)]:
        parts += [torch.tensor([[START]]), torch.full((1, count), token), torch.tensor([[END]]), text(seed + count, 2)]
    ids = torch.cat(parts, 1)
    return {
        "input_ids": ids,
        "mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int(),
        "pixel_values": pixels(seed, int(picture.prod()), 96),
        "image_grid_thw": picture,
        "pixel_values_videos": pixels(seed + 1, 32, 96),
        "video_grid_thw": clip,
    }


def assert_as_alone(name: str, samples: list[Inputs], implementation: str = "mmkernels", **options: Any) -> None:
    """Logits and the loss."""
    model = built(name, implementation)
    collator = PackedCollator.from_config(model.config, **options)
    paddings = [(seed % 3, 2 * (seed % 2)) for seed in range(len(samples))]
    given = [padded(sample, *around) for sample, around in zip(samples, paddings, strict=True)]
    batch = collator(given).validate()
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    assert list(batch.lengths[: len(samples)]) == lengths
    with torch.no_grad():
        packed = model(**collator.inputs(given))
        begin, losses, targets = 0, [], 0
        for sample, length in zip(samples, lengths, strict=True):
            labels = padded(sample, 0, 0)["labels"]
            alone = model(**sample, labels=labels)
            found = packed.logits[0, begin : begin + length]
            torch.testing.assert_close(found, alone.logits[0], rtol=0, atol=1e-5)
            count = int((labels[0, 1:] != -100).sum())
            losses.append(alone.loss * count if count else torch.tensor(0.0))
            begin, targets = begin + length, targets + count
    torch.testing.assert_close(packed.loss, sum(losses) / targets, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_packed_as_alone(name: str) -> None:
    assert_as_alone(name, [MODELS[name].sample(seed) for seed in (1, 2, 3)])


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2_5_vl"])
def test_with_padding_to_a_capacity_in_transformers_own_attention(name: str) -> None:
    assert_as_alone(name, [MODELS[name].sample(seed) for seed in (4, 5)], implementation="sdpa", capacity=120)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_clips(name: str) -> None:
    assert_as_alone(name, [of_clips(name, seed) for seed in (1, 2)])


def test_clips_with_seconds() -> None:
    samples = [of_clips("qwen2_5_vl", seed) | {"second_per_grid_ts": torch.tensor([seed / 2])} for seed in (1, 2)]
    assert_as_alone("qwen2_5_vl", samples)


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_some_samples_without_images(name: str) -> None:
    samples = [MODELS[name].sample(1), {"input_ids": text(7)}, MODELS[name].sample(2)]
    if name == "gemma3":
        samples[1]["token_type_ids"] = torch.zeros_like(samples[1]["input_ids"])
    assert_as_alone(name, samples)


@pytest.mark.filterwarnings("error")
def test_a_model_whose_own_attention_gets_rows_wrong_is_named() -> None:
    """Gemma 3 with token_type_ids: transformers looks its images up by positions that begin again."""
    with pytest.warns(UserWarning, match="take the images of Gemma 3 at wrong places in its sliding layers"):
        PackedCollator.from_config(built("gemma3", "sdpa").config)
    for name, implementation in (("gemma3", "mmkernels"), ("gemma2", "eager"), ("llava", "sdpa")):
        PackedCollator.from_config(built(name, implementation).config)


def test_two_images_side_by_side_and_unbatched_rows() -> None:
    """As a data set stores a processor's output: without the batch dimension, in lists."""
    ids = torch.tensor([[5, *[IMAGE] * 8, 6]])
    sample = {"input_ids": ids, "pixel_values": pixels(3, 2, 3, 16, 16)}
    assert_as_alone("llava", [sample, MODELS["llava"].sample(1)])
    collator = PackedCollator(image_token=IMAGE)
    one = MODELS["llava"].sample(1)
    stored = {"input_ids": one["input_ids"][0].tolist(), "pixel_values": one["pixel_values"][0].numpy(), "labels": None}
    found, expected = collator.inputs([stored]), collator.inputs([one])
    assert found.keys() == expected.keys()
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["input_ids"], one["input_ids"])


def test_types_of_tokens_under_all_keys_that_samples_have() -> None:
    samples = [IDS | PICTURE | {"token_type_ids": [0, 1, 1, 0], "mm_token_type_ids": [0, 1, 1, 0]}, {"input_ids": [1]}]
    found = PackedCollator(image_token=IMAGE).inputs(samples)
    assert found["token_type_ids"].tolist() == found["mm_token_type_ids"].tolist() == [[0, 1, 1, 0, 0]]


def test_planned_packs() -> None:
    """As `collate` of a `PackedDataset`, for a rank without packs too."""
    samples = [padded(MODELS["llava"].sample(seed), 1, 0) for seed in range(9)]
    lengths = [int(sample["attention_mask"].sum()) for sample in samples]
    collator = PackedCollator.from_config(MODELS["llava"].config(), capacity=48, labels=True)
    loader = PackedLoader(PackedDataset(samples, collate=collator), PackedSampler(lengths, 48, rank=0, world_size=1))
    seen = []
    for batch in loader:
        assert isinstance(batch.validate(), PackedBatch) and batch.num_tokens == 48
        ids = batch.sample_ids[torch.tensor(batch.cu_seqlens_host[: batch.num_samples])].tolist()
        assert batch.media[Modality.IMAGE].num_items == len(ids)
        assert torch.equal(batch.media[Modality.IMAGE].values, torch.cat([samples[i]["pixel_values"] for i in ids]))
        seen += ids
    assert sorted(seen) == list(range(9))
    nothing = collator([], ())
    assert nothing.padding == 48 and nothing.labels.tolist() == [-100] * 48


def test_in_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model = built("llava", "mmkernels").train()
    samples = [padded(MODELS["llava"].sample(seed), seed % 2, 0) for seed in range(8)]
    collator = PackedCollator.from_config(model.config)
    with torch.no_grad():
        sums, counts = 0.0, 0
        for sample in samples:
            alone = collator.inputs([sample])
            count = int((alone["labels"][:, 1:] != -100).sum())
            sums, counts = sums + float(model(**alone).loss) * count, counts + count
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1, learning_rate=0.0,
        report_to=[], use_cpu=True, remove_unused_columns=False, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=samples, data_collator=collator.inputs)
    assert trainer.train().training_loss == pytest.approx(sums / counts, rel=1e-5)


IDS = {"input_ids": [5, IMAGE, IMAGE, 6]}
PICTURE = {"pixel_values": torch.zeros(1, 3, 4, 4)}
GRID = {"pixel_values": torch.zeros(8, 6), "image_grid_thw": torch.tensor([[1, 2, 4]])}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (
            IDS | PICTURE | {"image_sizes": [[4, 4]]},
            r"samples\[0\]: image_sizes: expected one of input_ids, .* ignore=",
        ),
        (PICTURE, "input_ids: expected them in every sample"),
        ({"input_ids": [[1], [2]]}, r"input_ids: expected \[L\] or \[1, L\] integers of one sample, got \[2, 1\]"),
        ({"input_ids": [1.5]}, r"input_ids: expected \[L\] or \[1, L\] integers"),
        (
            IDS | {"attention_mask": [1, 1, 2, 2]},
            r"attention_mask: expected 0 for padding and 1 elsewhere, got \[1, 2\]",
        ),
        ({"input_ids": [1, 2], "labels": [1]}, "labels: expected 2 entries like input_ids, got 1"),
        ({"input_ids": [IMAGE]}, "input_ids: expected as many placeholders as there are images, got 1 in a row with 1"),
        ({"input_ids": [1]} | PICTURE, "input_ids: expected placeholders for 1 images of one size, got 0: truncated"),
        (IDS | {"pixel_values": torch.zeros(3, 3, 4, 4)}, "expected placeholders for 3 images of one size, got 2"),
        (
            IDS | {"pixel_values": torch.zeros(8, 6)},
            r"pixel_values: expected \[images, C, H, W\] without image_grid_thw",
        ),
        (IDS | PICTURE | {"pixel_attention_mask": torch.zeros(1, 4, 4)}, "pixel_attention_mask: expected all ones"),
        (
            IDS | {"image_grid_thw": torch.tensor([[1, 2, 4]])},
            "image_grid_thw: expected pixel_values with it, got none",
        ),
        (
            IDS | GRID | {"pixel_values": torch.zeros(9, 6)},
            r"image_grid_thw: expected grids of 9 patches .*, got \[8\]",
        ),
        ({"input_ids": [1]} | GRID, "input_ids: expected placeholders for all images, got none for 1: truncated"),
        ({"input_ids": [IMAGE]} | GRID, "got 1 in a row with 1 left over, 2 for the next: truncated"),
        (
            IDS | {"pixel_values_videos": torch.zeros(8, 6)},
            "pixel_values_videos: expected a collator that knows video_to",
        ),
        (
            IDS | GRID | {"token_type_ids": [0, 1, 1, 1]},
            "token_type_ids: expected 1 for placeholders .* got 1 for token 3",
        ),
    ],
)
def test_what_does_not_fit_is_named(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PackedCollator(image_token=IMAGE, merge_size=2).inputs([sample])


def test_samples_that_do_not_fit_each_other() -> None:
    collator = PackedCollator(image_token=IMAGE)
    with pytest.raises(ValueError, match="samples: expected labels in all or none, got 1 of 2"):
        collator([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}])
    with pytest.raises(ValueError, match=r"samples\[0\]: labels: expected some, got none"):
        PackedCollator(labels=True)([{"input_ids": [1]}])
    with pytest.raises(
        ValueError, match="pixel_values: expected a batch dimension in all samples or in none, got both"
    ):
        collator.inputs([IDS | PICTURE, IDS | {"pixel_values": PICTURE["pixel_values"][None]}])
    with pytest.raises(ValueError, match="pixel_values: expected a collator that knows image_token"):
        PackedCollator()([IDS | PICTURE])
    with pytest.raises(TypeError, match=r"samples\[1\]: expected a mapping with input_ids, got list"):
        collator([{"input_ids": [1]}, [1]])
    assert PackedCollator(ignore=["url"])([{"input_ids": [1], "url": "x"}]).num_tokens == 1
    with pytest.raises(ValueError, match="token_type_ids: expected 1 for placeholders of images"):
        collator.inputs([MODELS["paligemma"].sample(1)])
