"""Matching judges each pair as if it were a sample of its own, in which one stream is another sample's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pretrain.small_report import run_of

from mmkernels.pretrain.encoders import Patches, Regions, Words
from mmkernels.pretrain.fusion import Co, Cross, Late, Merged
from mmkernels.pretrain.objectives import Matching
from mmkernels.pretrain.recipe import Stream

STREAMS = {"image": Stream(Patches(1, 16, 8)), "text": Stream(Words(layers=0)), "regions": Stream(Regions(side=4))}


@pytest.mark.parametrize("size", [6, 2])
@pytest.mark.parametrize(
    ("fusion", "read"),
    [
        (Cross(("text",), "image"), "text"),
        (Co("text", "image", layers=1), "image"),
        (Merged(("image", "text")), "merged"),
        (Merged(("image", "text", "regions")), "merged"),
        (Merged(("image", "text"), everywhere="regions"), "text"),
        (Late(("image", "text", "regions"), into="text"), "text"),
    ],
)
def test_a_sampled_pair_is_a_sample_with_one_stream_of_another(fusion: Any, read: str, size: int) -> None:
    """All else that the fusion joins is its own, or the wrong pairs could be told by what they lack."""
    run = run_of(streams=STREAMS, fusion=fusion, objectives={"matching": Matching(read=read)})
    one, model = run.held_out["held_out"], run.trained
    (batch,) = replace(one, samples=6).batches("loss")
    seen = model.seen(batch, tuple(model.encoder(name)(batch[name]) for name in model.encoded))
    objective = model.objectives["matching"]
    objective.begin(seen)
    chunks, drawn = seen.chunks(size), dict(objective._wrong)
    for chunk in chunks:
        chunk.fuse(model.fusion)
    for chunk, (logits, targets) in zip(chunks, [objective.logits(chunk) for chunk in chunks], strict=True):
        own = list(chunk.samples)
        wrong = [{name: int(each[i]) for name, each in drawn.items()} for i in own]
        pairs = [{}] * len(own) + [{name: each[name]} for name in ("image", "text") for each in wrong]
        assert targets.tolist() == [1] * size + [0] * 2 * size
        for row, i, other in zip(logits, own * 3, pairs, strict=True):
            assert not other or [*other.values()] != [i]
            values = {name: one.source.values[other.get(name, i)][name] for name in STREAMS}
            alone = one.collator([replace(one.source[0], values=values)], [0], mode="plain")
            fused = model.whole(alone, "matching").fused[read].x
            torch.testing.assert_close(row, objective.head(fused.mean(0)), atol=1e-5, rtol=1e-4)
