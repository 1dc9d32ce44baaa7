"""A packed batch in other packages' formats."""

import pytest
import torch
from batch.samples import IMAGE, VIDEO, a_batch, image, text

from mmkernels import PackedBatch


def test_to_hf():
    batch = PackedBatch.from_samples(
        [[text(1, 2), image(1, 4, 4)], [image(2, 2, 2, modality=VIDEO), text(3)]],
        capacity=12,
        mrope=True,
        placeholder=7,
    )
    hf = batch.to_hf()
    assert hf["position_ids"].shape == (4, 1, 12)
    assert hf["position_ids"][0, 0].tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 0, 1, 2]
    assert torch.equal(hf["position_ids"][1:, 0], batch.position_ids)
    assert hf["pixel_values"] is batch.media[IMAGE].values
    assert hf["image_grid_thw"].tolist() == [[1, 4, 4]]
    assert hf["pixel_values_videos"].shape == (8, 12)
    assert hf["video_grid_thw"].tolist() == [[2, 2, 2]]
    assert hf["use_cache"] is False
    plain = PackedBatch.from_samples([[text(1, 2), image(1, 4, 4)], text(3, 4)])
    assert plain.to_hf(mrope=False)["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 0, 1]]
    assert plain.to_hf(mrope=True)["position_ids"].tolist() == [[[0, 1, 2, 3, 4, 5, 0, 1]]] * 4
    with pytest.raises(ValueError, match=r"mrope: expected True or False .* with images or clips, got None"):
        plain.to_hf()
    with pytest.raises(ValueError, match=r"mrope: expected True or None for a batch of positions \[3, T\], got False"):
        batch.to_hf(mrope=False)
    with pytest.raises(ValueError, match="media: expected images and videos with grid_thw for to_hf, got 'modality 2'"):
        a_batch().to_hf()
    with pytest.raises(ValueError, match="sample_weight: expected None for to_hf"):
        PackedBatch.from_samples([text(1)], sample_weight=[1.0]).to_hf()


def test_to_megatron():
    ids = [text(1, 2, 3), text(4, 5)]
    batch = PackedBatch.from_samples(
        ids, labels=ids, capacity=7, loss_weight=[torch.tensor([1, 1, 0.5]), torch.ones(2)]
    )
    thd = batch.to_megatron()
    assert thd["tokens"].tolist() == [[1, 2, 3, 4, 5, 0, 0]]
    assert thd["labels"].tolist() == [[2, 3, 0, 5, 0, 0, 0]]
    assert thd["loss_mask"].tolist() == [[1, 0.5, 0, 1, 0, 0, 0]]
    assert thd["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1]]
    params = thd["packed_seq_params"]
    assert params["qkv_format"] == "thd"
    assert params["cu_seqlens_q"] is params["cu_seqlens_kv_padded"] is batch.cu_seqlens
    assert params["max_seqlen_q"] == params["max_seqlen_kv"] == 3
    assert "labels" not in PackedBatch.from_samples(ids).to_megatron()
    assert a_batch(mrope=True).to_megatron()["position_ids"].shape == (3, 1, 40)


def test_to_nested():
    batch = a_batch()
    nested = batch.to_nested()
    parts = nested.unbind()
    assert [len(part) for part in parts] == [9, 3, 9, 0, 10]
    assert torch.equal(torch.cat(parts), batch.tokens[:31])
    x = torch.randn(40, 3, requires_grad=True)
    hidden = batch.to_nested(x)
    assert hidden.layout == torch.jagged
    hidden.values().square().sum().backward()
    assert torch.equal(x.grad[:31], 2 * x.detach()[:31])
    assert x.grad[31:].count_nonzero() == 0
    for wrong in (torch.zeros(39, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"x: expected \[40, ...\], got"):
            batch.to_nested(wrong)
    with pytest.raises(TypeError, match=r"x: expected \[40, ...\], got"):
        batch.to_nested([1, 2])
