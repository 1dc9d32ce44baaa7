"""A packed batch in other packages' formats."""

import pytest
import torch
from batch.samples import IMAGE, VIDEO, a_batch, image, text

from mmkernels import Media, PackedBatch


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
    with pytest.raises(
        ValueError, match="media: expected images, and videos with grid_thw, for to_hf, got 'modality 2'"
    ):
        a_batch().to_hf()
    with pytest.raises(ValueError, match="sample_weight: expected None for to_hf"):
        PackedBatch.from_samples([text(1)], sample_weight=[1.0]).to_hf()


def test_to_hf_of_images_without_a_grid():
    """As a tower of fixed size takes them, and what tells a model which tokens they are."""
    pictures = [Media(IMAGE, torch.randn(1, 3, 4, 4), tokens=2) for _ in range(2)]
    batch = PackedBatch.from_samples([[text(1), pictures[0], text(2)], [pictures[1]]], capacity=7)
    hf = batch.to_hf(mrope=False, types="token_type_ids")
    assert torch.equal(hf["pixel_values"], torch.cat([each.values for each in pictures]))
    assert "image_grid_thw" not in hf
    assert hf["token_type_ids"].tolist() == [[0, 1, 1, 0, 1, 1, 0]]
    clips = PackedBatch.from_samples([[image(1, 2, 2), image(1, 2, 2, modality=VIDEO), text(3)]])
    assert clips.to_hf(mrope=False, types="mm_token_type_ids")["mm_token_type_ids"].tolist() == [[1, 2, 0]]
    with pytest.raises(ValueError, match="types: expected None for a batch with media of modality 3, got 'token_type"):
        clips.to_hf(mrope=False, types="token_type_ids")
    with pytest.raises(ValueError, match="types: expected None or one of token_type_ids, mm_token_type_ids, got 'x'"):
        clips.to_hf(mrope=False, types="x")
    with pytest.raises(ValueError, match=r"media: expected images, and videos with grid_thw, .*, got 'modality 3'"):
        PackedBatch.from_samples([[Media(VIDEO, torch.randn(1, 3, 4, 4))]]).to_hf(mrope=False)


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
