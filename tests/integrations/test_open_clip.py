"""Trained two-tower models in open_clip: the same embeddings as ours, and its own zero-shot classifier on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pretrain.conftest import COLOURS, SHAPES, draw, pictures, tiny  # noqa: F401  fixtures

from mmkernels.pretrain import Config, load_model, train
from mmkernels.pretrain.data import decode_image
from mmkernels.pretrain.export import export

open_clip = pytest.importorskip("open_clip")

from mmkernels.integrations.open_clip import to_open_clip  # noqa: E402  after the skip

pytestmark = pytest.mark.clients

ROTARY = """
from mmkernels.pretrain.encoders import Adapted, Patches, Words
from mmkernels.pretrain.objectives import Contrast
from mmkernels.pretrain.recipe import Recipe, Shape, Stream

RECIPE = Recipe(
    "A test", source="", data="emoji", model=Shape(16, 2, 8),
    streams={
        "picture": Stream(Adapted(Patches(layers=1, size=16, patch=4, stem="linear"), reduction=2), field="image"),
        "words": Stream(Words(layers=1), field="text", project="mlp", pool="max"),
    },
    objectives={"contrast": Contrast("words", "picture")},
)
"""
TEXTS = ["a red circle", "a photo of a BLUE frame, and of nothing else", "", "крест 十字 ✚"]


def images() -> list[np.ndarray]:
    """Of several sizes, one with alpha."""
    random = np.random.default_rng(0)
    shapes = ((24, 24, 3), (16, 16, 3), (7, 31, 3), (40, 40, 4))
    return [random.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


@pytest.fixture(params=["clip", "siglip", "rotary"])
def run(request, tiny: Callable[..., Config], tmp_path: Path) -> tuple[Path, str, str]:  # noqa: F811
    """(Folder, stream of images, stream of texts) of a run of a few steps at a high rate, so that nothing is zero."""
    name, streams, changes = request.param, ("image", "text"), {}
    if name == "rotary":
        path = tmp_path / "rotary.py"
        path.write_text(ROTARY, encoding="utf-8")
        name, streams, changes = str(path), ("picture", "words"), {"parts": {}}
    config = tiny(recipe=name, steps=3, warmup=0, lr=0.03, eval_every=0, checkpoint_every=0, **changes)
    return train(config).folder.path, *streams


def test_embeddings_and_logits_are_those_of_load_model(run: tuple[Path, str, str], tmp_path: Path) -> None:
    folder, image, text = run
    ours, (model, preprocess, tokenizer) = load_model(folder), to_open_clip(export(folder, tmp_path / "exported"))
    assert isinstance(model, open_clip.CustomTextCLIP)
    of_images, of_texts = ours.embed(image, images()), ours.embed(text, TEXTS)
    pixels = torch.stack([preprocess(each) for each in images()])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(pixels, normalize=True), of_images, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(model.encode_text(tokenizer(TEXTS), normalize=True), of_texts, rtol=1e-5, atol=1e-6)
        logits, _ = model.get_logits(pixels, tokenizer(TEXTS))
        loss = next(iter(ours.model.objectives.values())).loss
        expected = loss.scale * of_images @ of_texts.T + getattr(loss, "logit_bias", 0.0)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-4)
        assert not torch.equal(model.encode_image(pixels), model.encode_image(pixels, normalize=True))
        assert model(pixels, tokenizer(TEXTS))[2].item() == pytest.approx(loss.scale.item(), rel=1e-6)


def test_zero_shot_classifier_of_open_clip(tiny: Callable[..., Config]) -> None:  # noqa: F811
    config = tiny(steps=3, warmup=0, lr=0.03, eval_every=0, checkpoint_every=0)
    folder = train(config).folder.path
    names, templates = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES], ["a {}", "one {}"]
    model, preprocess, tokenizer = to_open_clip(folder)
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
    ours = load_model(folder)
    mean = torch.stack([ours.embed("text", [t.format(name) for name in names]) for t in templates]).mean(0)
    torch.testing.assert_close(weights.T, mean / mean.norm(dim=1, keepdim=True), rtol=1e-5, atol=1e-6)
    drawn = [draw(colour, shape) for colour in COLOURS for shape in SHAPES]
    with torch.no_grad():
        scores = model.encode_image(torch.stack([preprocess(each) for each in drawn]), normalize=True) @ weights
    expected = ours.embed("image", [decode_image(each, config.resolution) for each in drawn]) @ weights
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_images_of_pillow_are_read_as_training_reads_files(tiny: Callable[..., Config], tmp_path: Path) -> None:  # noqa: F811
    """Of any shape, turned, with 16 bits of grey, with a palette."""
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    wide = Image.effect_mandelbrot((60, 20), (-2, -1, 1, 1), 20).convert("RGB")
    turned = wide.getexif()
    turned[0x0112] = 6  # a quarter turn
    wide.save(drawn / "0.png")
    wide.save(drawn / "1.jpg", exif=turned, quality=95)
    Image.fromarray(np.linspace(0, 65535, 300).astype(np.uint16).reshape(10, 30)).save(drawn / "2.png")
    wide.quantize(8).save(drawn / "3.gif", transparency=0)
    files = sorted(drawn.iterdir())
    config = tiny(steps=1, eval_every=0, checkpoint_every=0)
    folder = train(config).folder.path
    model, preprocess, _ = to_open_clip(folder)
    opened = [Image.open(file) for file in files]
    with torch.no_grad():
        found = model.encode_image(torch.stack([preprocess(each) for each in opened]), normalize=True)
    expected = load_model(folder).embed("image", [decode_image(file, config.resolution) for file in files])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert [each.size for each in opened] == [(60, 20), (60, 20), (30, 10), (60, 20)]


def test_errors(tiny: Callable[..., Config], tmp_path: Path) -> None:  # noqa: F811
    folder = train(tiny(steps=1, eval_every=0, checkpoint_every=0)).folder.path
    small = {"model.width": 16, "model.heads": 2}
    for name in ("gpt", "mae"):  # one of texts, one of images
        other = train(tiny(recipe=name, steps=1, eval_every=0, parts=small, run=tmp_path / name)).folder.path
        with pytest.raises(ValueError, match="run: expected one with an objective that compares images and texts by a"):
            to_open_clip(other)
    words = {"recipe": "albef", "without": ("image",), "parts": small, "run": tmp_path / "words"}
    half = train(tiny(steps=1, eval_every=0, **words)).folder.path
    with pytest.raises(ValueError, match="and that both have taught, got one without"):
        to_open_clip(half)  # a tower that has learned nothing
    with pytest.raises(ValueError, match="objective: expected one of contrast, got 'other'"):
        to_open_clip(folder, objective="other")
    model, _, tokenizer = to_open_clip(folder)
    with pytest.raises(ValueError, match=r"images: expected \[B, 3, 16, 16\], got \[2, 3, 24, 24\]"):
        model.encode_image(torch.zeros(2, 3, 24, 24))
    with pytest.raises(ValueError, match="context_length: expected 1 to 16, got 77"):
        tokenizer(["a"], context_length=77)
    assert tokenizer("a red circle").shape == (1, 16, 17)


def test_locking_and_checkpointing(run: tuple[Path, str, str]) -> None:
    """As open_clip's training asks for them: a locked tower gets no gradients, and recomputed blocks give the same."""
    model, _, tokenizer = to_open_clip(run[0])
    pixels, tokens = torch.rand(4, 3, 16, 16) * 2 - 1, tokenizer(TEXTS)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.lock_text_tower()
    grads = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        sum(each.square().sum() for each in model.get_logits(pixels, tokens)).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(name.startswith("visual.") for name in grads[0]) and not any(n.startswith("text.") for n in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="unlocked_groups: expected 0, since a tower is locked as a whole, got 1"):
        model.lock_image_tower(unlocked_groups=1)
    with pytest.raises(ValueError, match="freeze_layer_norm: expected True"):
        model.lock_text_tower(freeze_layer_norm=False)
