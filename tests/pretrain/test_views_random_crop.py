from __future__ import annotations

import numpy as np
import pytest
import torch
from pretrain.small_model import TOKENIZER

from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.encoders import Patches
from mmkernels.pretrain.pixels import plain_images
from mmkernels.pretrain.views import RandomCrop

STILL = {"mirror": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0, "grey": 0.0}


def images(n: int, channels: int = 4, side: int = 16) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (side, side, channels), np.uint8) for _ in range(n)]


def draws(n: int, salt: int = 0) -> Draws:
    return Draws(3, 5, f"image/RandomCrop/{salt}", np.arange(n))


def test_a_view_that_changes_nothing_is_the_image_over_white() -> None:
    view = RandomCrop(size=16, area=(1.0, 1.0), aspect=(1.0, 1.0), background=0.0, **STILL)
    found = torch.stack(view(images(3), draws(3), {}))
    torch.testing.assert_close(found, plain_images(images(3), 16), atol=1e-5, rtol=0)


def test_a_crop_is_a_box_of_the_image() -> None:
    """Every pixel of an image that tells its place: the crop's are evenly spaced, and span what `area` says."""
    side, size = 64, 8
    ramp = np.zeros((side, side, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(side)[None, :] * 4, np.arange(side)[:, None] * 4
    view = RandomCrop(size=size, area=(0.25, 0.25), aspect=(1.0, 1.0), **STILL)
    for crop in view([ramp] * 8, draws(8), {}):
        x, y = ((crop[:2] + 1) / 2 * 255 / 4).double()
        assert torch.allclose(x, x[:1].expand_as(x), atol=0.1) and torch.allclose(y, y[:, :1].expand_as(y), atol=0.1)
        torch.testing.assert_close(x[0].diff(), torch.full((size - 1,), side / 2 / size).double(), atol=0.1, rtol=0)
        assert x.min() >= -0.5 and x.max() <= side - 0.5


def test_mirror_turns_left_to_right() -> None:
    plain = RandomCrop(size=16, area=(1.0, 1.0), aspect=(1.0, 1.0), background=0.0, **STILL)
    mirrored = RandomCrop(size=16, area=(1.0, 1.0), aspect=(1.0, 1.0), background=0.0, **{**STILL, "mirror": 1.0})
    for a, b in zip(plain(images(2), draws(2), {}), mirrored(images(2), draws(2), {}), strict=True):
        torch.testing.assert_close(a, b.flip(2), atol=1e-5, rtol=0)


def test_colours() -> None:
    """Grey has equal channels of the image's luma; a hue keeps it on grey pixels and moves others."""
    whole = {"size": 16, "area": (1.0, 1.0), "aspect": (1.0, 1.0), "background": 0.0}
    plain = (torch.stack(RandomCrop(**whole, **STILL)(images(2, 3), draws(2), {})) + 1) / 2
    grey = (torch.stack(RandomCrop(**whole, **{**STILL, "grey": 1.0})(images(2, 3), draws(2), {})) + 1) / 2
    luma = (plain * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    torch.testing.assert_close(grey, luma.expand_as(grey), atol=1e-5, rtol=0)
    turned = RandomCrop(**whole, **{**STILL, "hue": 0.5})
    steel = np.full((16, 16, 3), 100, np.uint8)
    (of_grey,) = turned([steel], draws(1), {})
    torch.testing.assert_close(of_grey, torch.full_like(of_grey, 200 / 255 - 1), atol=1e-5, rtol=0)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 255
    assert not torch.allclose(turned([red], draws(1), {})[0], plain_images([red], 16)[0], atol=0.05)


def test_draws_depend_on_the_sample_and_the_salt_alone() -> None:
    view, shown = RandomCrop(size=8), images(4)
    together = view(shown, draws(4), {})
    alone = view(shown[2:3], Draws(3, 5, "image/RandomCrop/0", np.array([2])), {})
    torch.testing.assert_close(together[2], alone[0], atol=1e-6, rtol=0)
    assert not torch.equal(together[2], view(shown, draws(4, salt=1), {})[2])


def test_absent_images_and_several_sizes() -> None:
    view = RandomCrop().fitted(Patches(size=8), TOKENIZER)
    found = view([None, images(1)[0], images(1, 3, 20)[0]], draws(3), {})
    assert found[0] is None and [list(x.shape) for x in found[1:]] == [[3, 8, 8]] * 2
    assert all(float(x.min()) >= -1 and float(x.max()) <= 1 for x in found[1:])


@pytest.mark.parametrize(
    ("name", "value"), [("size", 0), ("area", (0.0, 1.0)), ("area", (0.5, 1.1)), ("aspect", (2.0, 1.0)), ("hue", 1.5)]
)
def test_wrong_settings_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=name):
        RandomCrop(**{name: value})  # type: ignore[arg-type]
