"""Patches of images of different sizes, and back."""

import backends
import named
import pytest
import torch

from mmkernels.ops.packing import patchify, unpatchify

# (patch, temporal, merge, channels, shapes of images in patches)
CUTS = {
    "raster": (2, 1, 1, 3, [(1, 1, 1), (1, 3, 5), (1, 2, 1)]),
    "one": (5, 1, 1, 1, [(1, 4, 2)]),
    "qwen2-vl": (14, 2, 2, 3, [(1, 4, 2), (3, 2, 6), (1, 2, 2)]),
    "vit-16": (16, 1, 1, 3, [(1, 2, 3), (1, 3, 1)]),
    "odd": (3, 3, 3, 2, [(2, 3, 6), (1, 9, 3)]),
}


def by_unfold(images, patch, temporal, merge):
    """What a user would write, one image at a time."""
    rows = []
    for image in images:
        image = image if image.ndim == 4 else image[None]
        frames, _, height, width = image.shape
        for t in range(0, frames, temporal):
            for block_y in range(0, height, patch * merge):
                for block_x in range(0, width, patch * merge):
                    for y in range(block_y, block_y + patch * merge, patch):
                        for x in range(block_x, block_x + patch * merge, patch):
                            tube = image[t : t + temporal, :, y : y + patch, x : x + patch]
                            rows.append(tube.transpose(0, 1).reshape(-1))
    return torch.stack(rows)


@backends.every_device
@backends.every
@backends.every_dtype
def test_patchify(dtype, backend, device):
    backends.need("packing", backend, dtype, device)
    for name, cut in CUTS.items():
        with named.case(name):
            check_cut(*cut, dtype, backend, device)


def check_cut(patch, temporal, merge, channels, grids, dtype, backend, device) -> None:
    sizes = [(t * temporal, channels, h * patch, w * patch) for t, h, w in grids]
    images = [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]
    options = {"temporal_patch_size": temporal, "merge_size": merge, "backend": backend}
    tokens, grid_thw = patchify(images, patch, **options)
    assert torch.equal(tokens, by_unfold(images, patch, temporal, merge))
    with torch.no_grad():  # read in place
        assert torch.equal(tokens, patchify(images, patch, **options)[0])
    assert grid_thw.tolist() == [list(grid) for grid in grids]
    grad = torch.randn_like(tokens)
    gradients = torch.autograd.grad(tokens, images, grad)
    back = unpatchify(grad, grid_thw.cpu(), patch, **options)
    assert all(torch.equal(a, b) for a, b in zip(gradients, back, strict=True))
    again = unpatchify(tokens, grids, patch, **options)
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    # The gradient of unpatchify: with the images as weights of its outputs, it returns the tokens.
    flat = torch.cat([image.flatten() for image in again])
    (gradient,) = torch.autograd.grad(flat.dot(flat.detach()), tokens)
    assert torch.equal(gradient, tokens)


def test_patches_are_a_convolution():
    image, conv = torch.randn(3, 12, 20), torch.nn.Conv2d(3, 7, 4, stride=4)
    tokens, _ = patchify([image], 4)
    projected = torch.nn.functional.linear(tokens, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(projected, conv(image[None])[0].flatten(1).T, atol=1e-5, rtol=1e-5)


@backends.every
def test_layouts_and_nothing(backend):
    backends.need("packing", backend)
    image = torch.randn(20, 12, 3).permute(2, 0, 1)  # as PIL gives it
    tokens, _ = patchify([image, image[:, ::2, ::3]], 2, backend=backend)
    assert torch.equal(tokens, by_unfold([image, image[:, ::2, ::3]], 2, 1, 1))
    assert unpatchify(torch.zeros(0, 12), [], 2, backend=backend) == []


def test_more_pixels_than_the_caches_hold():
    """Rows of whole cache lines and others; images that end inside a group of tokens."""
    backends.need("packing", "native")
    wide = torch.randn(3, 256, 512)
    assert torch.equal(patchify([wide], 16, backend="native")[0], patchify([wide], 16, backend="reference")[0])
    many = [torch.randn(3, 14 * (40 + i), 14 * 50).bfloat16() for i in range(5)]
    assert torch.equal(patchify(many, 14, backend="native")[0], patchify(many, 14, backend="reference")[0])


IMAGE = torch.zeros(3, 8, 6)
BAD_CUTS = [
    (lambda: patchify(IMAGE, 2), TypeError, r"images: expected a sequence of at least one tensor \[C, H, W\]"),
    (lambda: patchify([], 2), TypeError, "images: expected a sequence of at least one tensor"),
    (lambda: patchify([IMAGE[0]], 2), ValueError, r"images\[0\]: expected \[C, H, W\] or \[F, C, H, W\]"),
    (lambda: patchify([IMAGE.byte()], 2), TypeError, r"images\[0\]: .* floating point, got \[3, 8, 6\] uint8"),
    (lambda: patchify([IMAGE, IMAGE[:1]], 2), ValueError, r"images\[1\]: expected 3 channels, torch.float32 on cpu"),
    (lambda: patchify([IMAGE], 4), ValueError, r"images\[0\]: expected H and W that are multiples of 4"),
    (
        lambda: patchify([IMAGE], 2, merge_size=2),
        ValueError,
        r"multiples of 4 \(patch_size x merge_size\).*\[3, 8, 6\]",
    ),
    (lambda: patchify([IMAGE], 2, temporal_patch_size=2), ValueError, "a multiple of 2 frames"),
    (lambda: patchify([IMAGE[:, :0]], 2), ValueError, r"images\[0\]: expected H and W"),
    (lambda: patchify([IMAGE], 0), ValueError, "patch_size: expected an integer >= 1, got 0"),
    (lambda: unpatchify(torch.zeros(4, 13), [(1, 2, 2)], 2), ValueError, "tokens: expected rows of C x 4 elements"),
    (lambda: unpatchify(torch.zeros(5, 12), [(1, 2, 2)], 2), ValueError, "tokens: expected the 4 rows of grid_thw"),
    (
        lambda: unpatchify(torch.zeros(2, 12), [(1, 1, 2)], 2, merge_size=2),
        ValueError,
        r"grid_thw\[0\]: expected \(t, h",
    ),
    (lambda: unpatchify(torch.zeros(4, 12), torch.ones(4, 2).long(), 2), ValueError, r"grid_thw: expected \[N, 3\]"),
    (
        lambda: torch.ops.mmkernels.packing_patchify_fwd(
            IMAGE.flatten(), torch.tensor([[1, 2, 3]]), 3, 2, 1, 1, False, "native"
        ),
        ValueError,
        "grid_thw: expected grids with 144 elements in total, got 72",
    ),
    (
        lambda: torch.ops.mmkernels.packing_patchify_fwd(
            IMAGE.flatten(), torch.tensor([[1, 4, 3]]), 3, 2, 1, 2, False, "native"
        ),
        ValueError,
        r"grid_thw\[0\]: expected t, h and w >= 1, h and w multiples of merge_size 2, got \[1, 4, 3\]",
    ),
]
BAD_CUTS.append(
    (
        lambda: torch.ops.mmkernels.packing_patchify_images_fwd(
            [IMAGE, IMAGE[:, :4]], torch.tensor([[1, 2, 3], [1, 4, 3]]), 3, 2, 1, 1, "native"
        ),
        ValueError,
        "grid_thw: expected 2 grids, one matching each image",
    )
)


@pytest.mark.parametrize(("call", "error", "message"), BAD_CUTS, ids=[message[:45] for *_, message in BAD_CUTS])
def test_bad_images(call, error, message):
    backends.need("packing", "native")
    with pytest.raises(error, match=message):
        call()
