from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from pretrain.small_model import Samples, built, collated, gradients, held_out, recipe

from mmkernels import Media
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.encoders import Patches, Spectrogram, Tubelets
from mmkernels.pretrain.metrics import Reconstruction
from mmkernels.pretrain.objectives import MaskedPatches
from mmkernels.pretrain.recipe import Recipe, Stream
from mmkernels.pretrain.views import MaskPatches

ENCODERS = {
    "image": Patches(layers=2, size=16, patch=4, stem="linear"),
    "video": Tubelets(layers=2, size=8, patch=4, frames=4, tubelet=2),
    "audio": Spectrogram(layers=2, mels=3, frames=2, max_frames=16),
}


def masked(field: str, normalize: bool = True) -> Recipe:
    return recipe(
        streams={field: Stream(ENCODERS[field], views=(MaskPatches(share=0.6),), project="none")},
        objectives={"patches": MaskedPatches(field, layers=1, normalize=normalize)},
    )


def samples(field: str, n: int = 4, missing: tuple[int, ...] = ()) -> Samples:
    random = np.random.default_rng(2)
    made = {
        "image": lambda i: random.integers(0, 256, (16, 16, 3), np.uint8),
        "video": lambda i: random.integers(0, 256, (3 + i % 2, 8, 8, 3), np.uint8),
        "audio": lambda i: random.standard_normal((3 + 3 * i, 3)).astype(np.float32),
    }[field]
    return Samples([{} if i in missing else {field: made(i)} for i in range(n)])


def pieces(of: Recipe, field: str, source: Samples) -> list[Any]:
    """Prepared and masked as in the collator, sample by sample."""
    stream = of.streams[field]
    values = [values.get(field) for values in source.values]
    draws = Draws(0, 0, f"{field}/MaskPatches/0", np.arange(len(values)))
    return stream.views[0](stream.encoder.prepare(values, None), draws, {})  # type: ignore[arg-type]


def by_hand(of: Recipe, field: str, source: Samples, model: Any) -> tuple[torch.Tensor, int]:
    """(sum, count) sample by sample: the visible patches through the encoder's blocks, then the decoder over all."""
    encoder, decoder = model.encoder(field).encoder, model.objectives["patches"]
    position = getattr(encoder, "position", None)
    if position is None:
        position = (encoder.time[:, None] + encoder.space).flatten(0, 1)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for piece in pieces(of, field, source):
        if not len(piece.tokens):
            continue
        patches = (piece.tokens[0].values if isinstance(piece.tokens[0], Media) else piece.tokens).double()
        shown, hidden = torch.nonzero(piece.labels < 0).flatten(), torch.nonzero(piece.labels >= 0).flatten()
        x = encoder.stem(patches[shown]) + position[shown]
        for block in encoder.blocks:
            x = dense(block, x)
        full = decoder.hidden.repeat(len(patches), 1)
        full[shown] = decoder.enter(decoder.norm(x))
        full = full + decoder.position[: len(patches)]
        for block in decoder.blocks:
            full = dense(block, full)
        painted = decoder.project(decoder.norm_out(full))[hidden]
        targets = patches[hidden]
        if decoder.part.normalize:
            targets = (targets - targets.mean(1, keepdim=True)) / (targets.var(1, keepdim=True) + 1e-6).sqrt()
        total, count = total + (painted - targets).square().mean(1).sum(), count + len(hidden)
    return total, count


def dense(block: Any, x: torch.Tensor) -> torch.Tensor:
    """A block over one sequence [L, C] with PyTorch's own attention."""
    attention, length = block.attention, len(x)
    q, k, v = attention.qkv_proj(block.norm(x)).view(length, 3, attention.num_heads, -1).permute(1, 2, 0, 3)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v).permute(1, 0, 2).reshape(length, -1)
    x = x + attention.out_proj(out)
    return x + block.feed_forward(x)


@pytest.mark.parametrize("field", ["image", "video", "audio"])
@pytest.mark.parametrize("normalize", [True, False])
def test_against_dense_attention_sample_by_sample(field: str, normalize: bool) -> None:
    of, source = masked(field, normalize), samples(field, missing=(1,))
    model, batch = built(of, source), collated(of, source)
    expected, count = by_hand(of, field, source, model)
    loss, _ = gradients(model, batch, 2)
    torch.testing.assert_close(loss.double(), expected / count, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("field", ["image", "video", "audio"])
def test_gradients_reach_everything_and_do_not_depend_on_the_chunk(field: str) -> None:
    of, source = masked(field), samples(field, missing=(0,))
    model, batch = built(of, source), collated(of, source)
    loss, whole = gradients(model, batch, 4)
    assert set(whole) == {name for name, _ in model.named_parameters()}
    for chunk in (1, 3):
        again, parts = gradients(model, batch, chunk)
        torch.testing.assert_close(again, loss, rtol=1e-6, atol=1e-6)
        for name, gradient in whole.items():
            torch.testing.assert_close(parts[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_the_encoder_sees_visible_patches_alone() -> None:
    """A quarter of the rows, and none of them depends on what is hidden."""
    of, source = masked("image"), samples("image")
    model, batch = built(of, source), collated(of, source)
    encoder, packed = model.encoder("image").encoder, batch["image"]
    x, layout = encoder(packed), encoder.layout(packed)
    hidden = packed.labels >= 0
    assert len(x) == int((~hidden).sum()) == layout.cu_seqlens_host[-1] < len(hidden) / 2
    assert layout.cu_seqlens.tolist() == list(layout.cu_seqlens_host)
    packed.media[1].values[hidden] = 7.0
    torch.testing.assert_close(encoder(packed), x)


def test_a_batch_without_images_costs_nothing() -> None:
    of, source = masked("image"), samples("image", 3, missing=(0, 1, 2))
    model, batch = built(of, source), collated(of, source)
    loss, _ = gradients(model, batch, 2)
    assert loss == 0 and model.objectives["patches"].chance_loss(batch) is None


def test_chance_is_the_best_constant_patch() -> None:
    of, source = masked("image"), samples("image")
    model, batch = built(of, source), collated(of, source)
    objective = model.objectives["patches"]
    targets = objective.targets(batch["image"])
    assert objective.chance_loss(batch) == pytest.approx(float(targets.var(0, correction=0).mean()), rel=1e-6)


def test_reconstruction_on_held_out_data() -> None:
    """Over several batches of float32 data, the same figures as over one in float64."""
    of, source = masked("image"), samples("image", 7)
    model, batch = built(of, source), collated(of, source)
    objective = model.objectives["patches"]
    with torch.no_grad():
        painted, targets = objective.painted(model.whole(batch, "patches"))
        (figure,) = Reconstruction("patches").measure(model.float(), held_out(of, source, source))
        nothing = Reconstruction("patches").measure(model, held_out(of, source, samples("image", 2, missing=(0, 1))))
    assert figure.value == pytest.approx(float((painted - targets).square().mean()), rel=1e-4)
    assert figure.chance == pytest.approx(float(targets.var(0, correction=0).mean()), rel=1e-4)
    assert not figure.higher_is_better and not figure.percent
    assert nothing == []
    with pytest.raises(ValueError, match="objective"):
        Reconstruction("contrast").measure(model, held_out(of, source, source))


def test_wrong_wiring_is_named() -> None:
    plain = recipe(streams={"image": Stream(ENCODERS["image"])}, objectives={"patches": MaskedPatches("image")})
    with pytest.raises(ValueError, match=r"streams\.image\.views: expected one that hides patches"):
        built(plain, samples("image"))
    leaks = recipe(
        streams={"image": Stream(Patches(size=16), views=(MaskPatches(),))},
        objectives={"patches": MaskedPatches("image")},
    )
    with pytest.raises(ValueError, match=r"streams\.image\.encoder: expected one that can leave patches out"):
        built(leaks, samples("image"))
