"""Patches of images of different sizes, there and back, and M-RoPE positions against transformers' rule."""

import pytest
import torch

from mmkernels.ops.packing import mrope_position_ids, patchify, unpatchify
from mmkernels.runtime.backends import BackendError, candidates
from mmkernels.testing.packing import cu_seqlens_of

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
every_backend = pytest.mark.parametrize("backend", ["native", "triton", "reference"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
every_device = pytest.mark.parametrize("device", DEVICES)


def needs(backend: str, device: str, dtype: torch.dtype) -> None:
    reason = candidates("packing", torch.device(device), dtype)[backend]
    if reason is not None:
        pytest.skip(reason)


# Patches

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


@every_device
@every_backend
@every_dtype
@pytest.mark.parametrize("cut", CUTS)
def test_patchify(cut, dtype, backend, device):
    needs(backend, device, dtype)
    patch, temporal, merge, channels, grids = CUTS[cut]
    sizes = [(t * temporal, channels, h * patch, w * patch) for t, h, w in grids]
    images = [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]
    options = {"temporal_patch_size": temporal, "merge_size": merge, "backend": backend}
    tokens, grid_thw = patchify(images, patch, **options)
    assert torch.equal(tokens, by_unfold(images, patch, temporal, merge))
    with torch.no_grad():  # read where they lie
        assert torch.equal(tokens, patchify(images, patch, **options)[0])
    assert grid_thw.tolist() == [list(grid) for grid in grids]
    grad = torch.randn_like(tokens)
    gradients = torch.autograd.grad(tokens, images, grad)
    back = unpatchify(grad, grid_thw.cpu(), patch, **options)
    assert all(torch.equal(a, b) for a, b in zip(gradients, back, strict=True))
    again = unpatchify(tokens, grids, patch, **options)
    assert all(torch.equal(a, b) for a, b in zip(images, again, strict=True))
    (gradient,) = torch.autograd.grad(
        torch.cat([image.flatten() for image in again]).dot(tokens.detach().flatten()), tokens
    )
    flat = torch.cat([image.flatten() for image in unpatchify(gradient, grids, patch, **options)])
    assert torch.equal(flat, tokens.detach().flatten())


@every_backend
def test_patches_are_a_convolution(backend):
    needs(backend, "cpu", torch.float32)
    image, conv = torch.randn(3, 12, 20), torch.nn.Conv2d(3, 7, 4, stride=4)
    tokens, _ = patchify([image], 4, backend=backend)
    projected = torch.nn.functional.linear(tokens, conv.weight.flatten(1), conv.bias)
    torch.testing.assert_close(projected, conv(image[None])[0].flatten(1).T, atol=1e-5, rtol=1e-5)


@every_backend
def test_patchify_layouts_and_threads(backend):
    needs(backend, "cpu", torch.float32)
    image = torch.randn(20, 12, 3).permute(2, 0, 1)  # as PIL gives it
    tokens, _ = patchify([image, image[:, ::2, ::3]], 2, backend=backend)
    assert torch.equal(tokens, by_unfold([image, image[:, ::2, ::3]], 2, 1, 1))
    wide = torch.randn(3, 256, 512)
    assert torch.equal(patchify([wide], 16, backend="native")[0], patchify([wide], 16, backend="reference")[0])
    # More than the caches hold, lines that fill no cache line, images that end inside a group of tokens.
    many = [torch.randn(3, 14 * (40 + i), 14 * 50).bfloat16() for i in range(5)]
    assert torch.equal(patchify(many, 14, backend="native")[0], patchify(many, 14, backend="reference")[0])
    none = unpatchify(torch.zeros(0, 12), [], 2, backend=backend)
    assert none == []


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
        "grid_thw: expected grids of 144 elements in all, got 72",
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
        "grid_thw: expected one for each of 2 images, of its size",
    )
)


@pytest.mark.parametrize(("call", "error", "message"), BAD_CUTS, ids=[message[:45] for *_, message in BAD_CUTS])
def test_bad_images(call, error, message):
    needs("native", "cpu", torch.float32)
    with pytest.raises(error, match=message):
        call()


# Positions

TEXT, START, IMAGE_PAD, VIDEO_PAD = 7, 1, 2, 3


def get_rope_index(sample, image_grid_thw, video_grid_thw, merge=2, time_steps=None):
    """The rule of transformers' Qwen2VLModel.get_rope_index for one sample without padding, token by token.

    Text goes on from the largest position so far; a run of image or video tokens takes the next grid of its kind, whose
    axes count from there.
    """
    images, videos, steps = iter(image_grid_thw), iter(video_grid_thw), iter(time_steps or [])
    columns, i = [], 0
    while i < len(sample):
        largest = max((max(column) for column in columns), default=-1)
        if sample[i] in (IMAGE_PAD, VIDEO_PAD):
            t, h, w = next(images if sample[i] == IMAGE_PAD else videos)
            step = next(steps) if time_steps else 1
            h, w = h // merge, w // merge
            for frame in range(t):
                for y in range(h):
                    columns += [(largest + 1 + int(frame * step), largest + 1 + y, largest + 1 + x) for x in range(w)]
            i += t * h * w
        else:
            columns.append((largest + 1,) * 3)
            i += 1
    return torch.tensor(columns, dtype=torch.int64).reshape(-1, 3).T


def interleaved(parts):
    """Parts, numbers of text tokens or ("image" | "video", t, h, w) -> token ids, grids in order, starts, by kind."""
    ids, grids, starts, images, videos = [], [], [], [], []
    for part in parts:
        if isinstance(part, int):
            ids += [TEXT] * part
            continue
        kind, t, h, w = part
        ids.append(START)
        starts.append(len(ids))
        grids.append((t, h, w))
        (images if kind == "image" else videos).append((t, h, w))
        ids += [IMAGE_PAD if kind == "image" else VIDEO_PAD] * (t * h * w // 4)
    return ids, grids, starts, images, videos


SAMPLES = [
    [5],
    [3, ("image", 1, 4, 6), 4],
    [("image", 1, 2, 2), 2],
    [2, ("video", 4, 4, 2)],
    [1, ("image", 1, 8, 4), ("image", 1, 2, 6), 3, ("video", 3, 2, 2), 1, ("image", 1, 4, 4)],
    [("video", 20, 2, 2), 6],  # longer in time than in space
    [],
    [2, ("video", 2, 6, 4), ("video", 9, 2, 4), 1],
]


@every_device
@every_backend
def test_positions_are_those_of_transformers(backend, device):
    needs(backend, device, torch.float32)
    ids, grids, starts, expected, cu = [], [], [], [], [0]
    for parts in SAMPLES:
        more, own, at, images, videos = interleaved(parts)
        starts += [len(ids) + start for start in at]
        ids, grids = ids + more, grids + own
        cu.append(len(ids))
        expected.append(get_rope_index(more, images, videos))
    padding = 6
    got = mrope_position_ids(
        torch.tensor(cu, dtype=torch.int32, device=device),
        torch.tensor(grids, device=device),
        torch.tensor(starts, device=device),
        len(ids) + padding,
        backend=backend,
    )
    assert got.dtype == torch.int64
    assert torch.equal(got.cpu(), torch.cat([*expected, torch.arange(padding).expand(3, -1)], 1))


def test_m_rope_after_padding():
    """LlamaFactory #7754: padding, before or behind, shifts nobody's positions."""
    ids, grids, starts, images, videos = interleaved(SAMPLES[4])
    alone = get_rope_index(ids, images, videos)
    for before in (0, 5):
        cu = torch.tensor([0, before, before + len(ids), before + len(ids) + 7], dtype=torch.int32)
        at = torch.tensor(starts) + before
        got = mrope_position_ids(cu, torch.tensor(grids), at, int(cu[-1]))
        assert torch.equal(got[:, before : before + len(ids)], alone)
        assert torch.equal(got[:, before + len(ids) :], torch.arange(7).expand(3, -1))


def test_time_steps_of_qwen2_5():
    ids, grids, starts, images, videos = interleaved([2, ("video", 5, 2, 4), 3, ("video", 3, 4, 2), 1])
    steps = [2 * 0.75, 2 * 0.3]  # tokens_per_second x second_per_grid_t
    expected = get_rope_index(ids, images, videos, time_steps=steps)
    cu = cu_seqlens_of([len(ids)])
    args, step = (cu, torch.tensor(grids), torch.tensor(starts), len(ids)), torch.tensor(steps)
    assert torch.equal(mrope_position_ids(*args, time_step=step), expected)
    with pytest.raises(BackendError, match="the kernels count time in whole steps: time_step is for the reference"):
        mrope_position_ids(*args, time_step=step, backend="native")


@every_backend
def test_without_media_and_without_tokens(backend):
    needs(backend, "cpu", torch.float32)
    none = torch.zeros(0, 3, dtype=torch.int64)
    got = mrope_position_ids(cu_seqlens_of([3, 0, 2]), none, none[:, 0], 6, backend=backend)
    assert torch.equal(got, torch.tensor([0, 1, 2, 0, 1, 0]).expand(3, -1))
    assert mrope_position_ids(cu_seqlens_of([]), none, none[:, 0], 0, backend=backend).shape == (3, 0)


@every_backend
def test_positions_of_a_random_batch(backend):
    """Hundreds of spans and segments, some empty: several blocks of the kernels."""
    needs(backend, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    ids, grids, starts, expected, cu = [], [], [], [], [0]
    for _ in range(60):
        kinds = ("image", "video")
        parts = [
            draw(0, 9) if draw(0, 2) else (kinds[draw(0, 2)], draw(1, 4), 2 * draw(1, 4), 2 * draw(1, 4))
            for _ in range(draw(0, 7))
        ]
        more, own, at, images, videos = interleaved(parts)
        starts += [len(ids) + start for start in at]
        ids, grids = ids + more, grids + own
        cu.append(len(ids))
        expected.append(get_rope_index(more, images, videos))
    args = torch.tensor(cu), torch.tensor(grids), torch.tensor(starts), len(ids)
    assert torch.equal(mrope_position_ids(*args, backend=backend), torch.cat(expected, 1))


def test_positions_compile_into_one_graph():
    ids, grids, starts, *_ = interleaved(SAMPLES[4])
    args = (cu_seqlens_of([len(ids)]), torch.tensor(grids), torch.tensor(starts), len(ids))
    torch.compiler.reset()
    compiled = torch.compile(mrope_position_ids, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), mrope_position_ids(*args))


CU, GRID, STARTS = cu_seqlens_of([9, 5]), torch.tensor([[1, 2, 4], [1, 4, 4]]), torch.tensor([1, 4])
BAD_SPANS = [
    ((CU.float(), GRID, STARTS, 14), {}, TypeError, r"cu_seqlens: expected \[S\+1\] int32"),
    ((CU + 1, GRID, STARTS, 14), {}, ValueError, r"cu_seqlens: .* from 0, not decreasing, within total 14"),
    ((CU, GRID[:, :2], STARTS, 14), {}, ValueError, r"grid_thw: expected \[N, 3\] int64, got \[2, 2\]"),
    ((CU, GRID, STARTS[:1], 14), {}, ValueError, "starts: expected one entry for each of the 2 grids"),
    ((CU, GRID - 1, STARTS, 14), {}, ValueError, r"grid_thw\[0\]: expected t, h and w >= 1.*got \[0, 1, 3\]"),
    ((CU, GRID, STARTS, 14), {"merge_size": 3}, ValueError, r"grid_thw\[0\]: .* multiples of merge_size 3"),
    (
        (CU, GRID, STARTS.flip(0), 14),
        {},
        ValueError,
        r"starts\[1\]: expected at least 6, the end of the one before, got 1",
    ),
    ((CU, GRID, STARTS + 2, 14), {}, ValueError, r"starts\[1\]: expected 4 tokens within one segment, got them from 6"),
    (
        (CU, GRID, STARTS, 14),
        {"time_step": torch.ones(3)},
        ValueError,
        "time_step: expected one entry for each of the 2",
    ),
    ((CU, GRID, STARTS, 14), {"merge_size": 0}, ValueError, "merge_size: expected an integer >= 1"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_SPANS, ids=[m[:45] for *_, m in BAD_SPANS])
def test_bad_spans(args, options, error, message):
    with pytest.raises(error, match=message):
        mrope_position_ids(*args, **options)
