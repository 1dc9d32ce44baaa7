"""`PackedCollator` for torchtune: what its own packed data set and collator give, and samples that stay apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmkernels import plan_packing
from mmkernels.integrations.torch_data import PackedDataset, PackedLoader, PackedSampler
from mmkernels.integrations.torchtune import PackedCollator

CAPACITY = 16


def samples(count: int = 9) -> list[dict[str, list[int]]]:
    """Sample i: of 1 to 9 tokens, that differ from those of all others."""
    lengths = [1 + (5 * i) % 9 for i in range(count)]
    return [{"tokens": list(range(20 * i + 1, 20 * i + 1 + n)), "labels": [7] * n} for i, n in enumerate(lengths)]


def test_rows_hold_every_sample_and_see_only_it() -> None:
    given = samples()
    batch = PackedCollator(CAPACITY, padding_idx=999)(given)
    lengths = PackedCollator(CAPACITY, mask=False)(given)["seq_lens"]
    assert set(batch) == {"tokens", "labels", "input_pos", "mask"}
    assert len(batch["tokens"]) == len(plan_packing([len(each["tokens"]) for each in given], CAPACITY))
    seen = []
    for row, sizes in enumerate(lengths):
        assert int(sizes.sum()) == CAPACITY
        parts = [batch[key][row].split(sizes.tolist()) for key in ("tokens", "labels", "input_pos")]
        for tokens, labels, positions in zip(*parts, strict=True):
            assert positions.tolist() == list(range(len(tokens)))
            padding = bool((tokens == 999).all())
            assert labels.tolist() == [-100] * len(tokens) if padding else [-100] + [7] * (len(tokens) - 1)
            seen += [] if padding else [tokens.tolist()]
        blocks = [torch.ones(size, size, dtype=torch.bool).tril() for size in sizes.tolist()]
        assert torch.equal(batch["mask"][row], torch.block_diag(*blocks))
    assert sorted(seen) == sorted(each["tokens"] for each in given)


def test_planned_packs_and_samples_too_long() -> None:
    given = samples()
    sampler = PackedSampler([len(each["tokens"]) for each in given], CAPACITY, rank=0, world_size=1)
    rows = list(PackedLoader(PackedDataset(given, collate=PackedCollator(CAPACITY)), sampler))
    assert all(row["tokens"].shape == (1, CAPACITY) for row in rows) and len(rows) == len(sampler)
    long = [*given, {"tokens": [1] * 17, "labels": [1] * 17}]
    with pytest.raises(ValueError, match=r"lengths: expected each in \[0, capacity=16\], got 17"):
        PackedCollator(CAPACITY)(long)
    dropping = PackedCollator(CAPACITY, oversize="drop")
    assert torch.equal(dropping(long)["tokens"], PackedCollator(CAPACITY)(given)["tokens"])
    assert dropping.dropped == 1
    with pytest.raises(ValueError, match="samples: expected at least one to pack, got 1, 1 too long"):
        dropping(long[-1:])
    with pytest.raises(ValueError, match="oversize: expected 'error' or 'drop', got 'own_pack'"):
        PackedCollator(CAPACITY, oversize="own_pack")
    with pytest.raises(ValueError, match=r"labels\[0\]: expected \[2\] integer"):
        PackedCollator(CAPACITY)([{"tokens": [1, 2], "labels": [1]}])
    with pytest.raises(KeyError, match="labels"):
        PackedCollator(CAPACITY)([{"tokens": [1, 2]}])


def theirs(given: list[dict[str, list[int]]]) -> dict[str, Any]:
    torchtune = pytest.importorskip("torchtune", exc_type=ImportError)
    packed = torchtune.datasets.PackedDataset(given, max_seq_len=CAPACITY)
    return torchtune.data.padded_collate_packed(list(packed))


def test_as_torchtune_packs_in_order() -> None:
    """Their data set packs in order, as strategy "next_fit" does."""
    given = samples()
    expected = theirs(given)
    found = PackedCollator(CAPACITY, strategy="next_fit")(given)
    assert set(found) == set(expected)
    assert torch.equal(found["tokens"], expected["tokens"])
    real = torch.ones_like(found["tokens"], dtype=torch.bool)
    for row, sizes in enumerate(PackedCollator(CAPACITY, strategy="next_fit", mask=False)(given)["seq_lens"]):
        used = int((expected["labels"][row] != -100).sum())
        real[row, used:] = False
        starts = torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)[:-1]])
        expected["labels"][row, starts] = -100
    assert torch.equal(found["labels"], expected["labels"])
    assert torch.equal(found["input_pos"][real], expected["input_pos"][real])
    if isinstance(expected["mask"], torch.Tensor):
        assert torch.equal(found["mask"], expected["mask"])


def test_in_a_model_of_torchtune() -> None:
    models = pytest.importorskip("torchtune.models.llama3", exc_type=ImportError)
    torch.manual_seed(0)
    model = models.llama3(
        vocab_size=200, num_layers=2, num_heads=4, num_kv_heads=2, embed_dim=32, max_seq_len=64, intermediate_dim=48
    ).eval()
    given = samples()
    batch = PackedCollator(CAPACITY)(given)
    with torch.no_grad():
        logits = model(tokens=batch["tokens"], mask=batch["mask"], input_pos=batch["input_pos"])
        for sample in given:
            length = len(sample["tokens"])
            alone = model(torch.tensor([sample["tokens"]]))[0]
            row, at = (int(part[0]) for part in torch.where(batch["tokens"] == sample["tokens"][0]))
            torch.testing.assert_close(logits[row, at : at + length], alone, rtol=0, atol=1e-5)
