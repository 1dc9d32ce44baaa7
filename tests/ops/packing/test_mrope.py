"""M-RoPE positions: both rules for what follows an image or clip, written out token by token, on every backend."""

import backends
import pytest
import torch

from mmkernels.ops.packing import mrope_position_ids
from mmkernels.runtime.backends import BackendError
from mmkernels.testing.packing import cu_seqlens_of

every_rule = pytest.mark.parametrize("advance", ["spatial", "largest"])

TEXT, START, IMAGE_PAD, VIDEO_PAD = 7, 1, 2, 3


def get_rope_index(sample, image_grid_thw, video_grid_thw, merge=2, time_steps=None, advance="spatial"):
    """The rules of transformers' Qwen2VLModel.get_rope_index for one sample without padding, token by token.

    A run of image or video tokens takes the next grid of its kind, whose axes count from the start of the run. What
    follows continues after its height and width ("spatial", from 5.3 on), or after the largest position ("largest",
    before).
    """
    images, videos, steps = iter(image_grid_thw), iter(video_grid_thw), iter(time_steps or [])
    columns, at, i = [], 0, 0
    while i < len(sample):
        if sample[i] in (IMAGE_PAD, VIDEO_PAD):
            t, h, w = next(images if sample[i] == IMAGE_PAD else videos)
            step = next(steps) if time_steps else 1
            h, w = h // merge, w // merge
            times = [int(frame * step) for frame in range(t)]
            columns += [(at + time, at + y, at + x) for time in times for y in range(h) for x in range(w)]
            at += max(h, w) if advance == "spatial" else max(times[-1] + 1, h, w)
            i += t * h * w
        else:
            columns.append((at,) * 3)
            at += 1
            i += 1
    return torch.tensor(columns, dtype=torch.int64).reshape(-1, 3).T


def interleaved(parts):
    """Parts (numbers of text tokens or ("image" | "video", t, h, w)) -> token ids, grids in order, starts, by kind."""
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


def random_samples() -> list:
    """Hundreds of spans and segments, some empty: several blocks in the kernels."""
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    kinds = ("image", "video")
    return [
        [
            draw(0, 9) if draw(0, 2) else (kinds[draw(0, 2)], draw(1, 4), 2 * draw(1, 4), 2 * draw(1, 4))
            for _ in range(draw(0, 7))
        ]
        for _ in range(60)
    ]


@backends.every_device
@backends.every
@every_rule
def test_positions_are_those_of_transformers(advance, backend, device):
    backends.need("packing", backend, device=device)
    for samples, padding in ((SAMPLES, 6), (random_samples(), 0)):
        ids, grids, starts, expected, cu = [], [], [], [], [0]
        for parts in samples:
            more, own, at, images, videos = interleaved(parts)
            starts += [len(ids) + start for start in at]
            ids, grids = ids + more, grids + own
            cu.append(len(ids))
            expected.append(get_rope_index(more, images, videos, advance=advance))
        got = mrope_position_ids(
            torch.tensor(cu, dtype=torch.int32, device=device),
            torch.tensor(grids, device=device),
            torch.tensor(starts, device=device),
            len(ids) + padding,
            advance=advance,
            backend=backend,
        )
        assert got.dtype == torch.int64
        assert torch.equal(got.cpu(), torch.cat([*expected, torch.arange(padding).expand(3, -1)], 1))


def test_m_rope_after_padding():
    """LlamaFactory #7754: padding, before or after a sample, does not shift its positions."""
    ids, grids, starts, images, videos = interleaved(SAMPLES[4])
    alone = get_rope_index(ids, images, videos)
    for before in (0, 5):
        cu = torch.tensor([0, before, before + len(ids), before + len(ids) + 7], dtype=torch.int32)
        at = torch.tensor(starts) + before
        got = mrope_position_ids(cu, torch.tensor(grids), at, int(cu[-1]))
        assert torch.equal(got[:, before : before + len(ids)], alone)
        assert torch.equal(got[:, before + len(ids) :], torch.arange(7).expand(3, -1))


# Where the text after a clip continues: (rule, options, parts, positions of each part's first and last token). A part
# is a number of text tokens, or the grid (t, h, w) of a clip, h and w before merging 2 x 2.
TABLE = {
    # Qwen2-VL: nine steps of 4 x 4 tokens from position 4 on.
    "qwen2-vl": (
        "spatial",
        {},
        [4, (9, 8, 8), 3],
        [((0, 0, 0), (3, 3, 3)), ((4, 4, 4), (12, 7, 7)), ((8,) * 3, (10,) * 3)],
    ),
    "qwen2-vl, transformers 5.2": (
        "largest",
        {},
        [4, (9, 8, 8), 3],
        [((0, 0, 0), (3, 3, 3)), ((4, 4, 4), (12, 7, 7)), ((13,) * 3, (15,) * 3)],
    ),
    # Qwen2.5-VL: two positions per second, .75 seconds per step: 0, 1, 3, 4, 6.
    "qwen2.5-vl": (
        "spatial",
        {"time_step": [0.75], "tokens_per_second": 2},
        [2, (5, 4, 8), 2],
        [((0, 0, 0), (1, 1, 1)), ((2, 2, 2), (8, 3, 5)), ((6,) * 3, (7,) * 3)],
    ),
    "qwen2.5-vl, transformers 5.2": (
        "largest",
        {"time_step": [0.75], "tokens_per_second": 2},
        [2, (5, 4, 8), 2],
        [((0, 0, 0), (1, 1, 1)), ((2, 2, 2), (8, 3, 5)), ((9,) * 3, (10,) * 3)],
    ),
    # Qwen2.5-Omni's own example: two seconds per step, 25 positions per second: 0, 50, 100, and text from 101 on.
    "qwen2.5-omni": (
        "largest",
        {"time_step": [2.0], "tokens_per_second": 25},
        [(3, 4, 4), 5],
        [((0, 0, 0), (100, 1, 1)), ((101,) * 3, (105,) * 3)],
    ),
    # Qwen3-VL: each step is its own grid, behind its timestamp.
    "qwen3-vl": (
        "spatial",
        {},
        [2, (1, 4, 6), 3, (1, 4, 6), 1],
        [
            ((0,) * 3, (1,) * 3),
            ((2, 2, 2), (2, 3, 4)),
            ((5,) * 3, (7,) * 3),
            ((8, 8, 8), (8, 9, 10)),
            ((11,) * 3, (11,) * 3),
        ],
    ),
    # A wide image: its width counts, not its height.
    "image": ("largest", {}, [1, (1, 4, 12), 1], [((0,) * 3, (0,) * 3), ((1, 1, 1), (1, 2, 6)), ((7,) * 3, (7,) * 3)]),
    # Fractional steps: .4 x 25 = 10 exactly as float32 rounds it.
    "omni at 5 frames a second": (
        "largest",
        {"time_step": [0.4], "tokens_per_second": 25},
        [(4, 2, 2), 1],
        [((0, 0, 0), (30, 0, 0)), ((31,) * 3, (31,) * 3)],
    ),
}


@pytest.mark.parametrize("row", TABLE)
def test_table_of_rules(row):
    advance, options, parts, expected = TABLE[row]
    if "time_step" in options:
        options = options | {"time_step": torch.tensor(options["time_step"])}
    lengths = [part if isinstance(part, int) else part[0] * part[1] * part[2] // 4 for part in parts]
    begins = [sum(lengths[:n]) for n in range(len(parts))]
    grids = [part for part in parts if not isinstance(part, int)]
    starts = [begin for begin, part in zip(begins, parts, strict=True) if not isinstance(part, int)]
    total = sum(lengths)
    args = (cu_seqlens_of([total]), torch.tensor(grids), torch.tensor(starts), total)
    got = mrope_position_ids(*args, advance=advance, **options)
    ends = [
        (tuple(got[:, b].tolist()), tuple(got[:, b + n - 1].tolist())) for b, n in zip(begins, lengths, strict=True)
    ]
    assert ends == expected
    if advance == "spatial":
        assert torch.equal(mrope_position_ids(*args, **options), got)  # the default


@every_rule
def test_time_steps_of_qwen2_5(advance):
    ids, grids, starts, images, videos = interleaved([2, ("video", 5, 2, 4), 3, ("video", 3, 4, 2), 1])
    seconds = [0.75, 0.3]
    expected = get_rope_index(ids, images, videos, time_steps=[2 * s for s in seconds], advance=advance)
    cu = cu_seqlens_of([len(ids)])
    args, step = (cu, torch.tensor(grids), torch.tensor(starts), len(ids)), torch.tensor(seconds)
    got = mrope_position_ids(*args, time_step=step, tokens_per_second=2, advance=advance)
    assert torch.equal(got, expected)
    assert torch.equal(mrope_position_ids(*args, time_step=2 * step, advance=advance), expected)
    with pytest.raises(BackendError, match="time_step is supported only by the reference"):
        mrope_position_ids(*args, time_step=step, backend="native")


@backends.every
def test_without_media_and_without_tokens(backend):
    backends.need("packing", backend)
    none = torch.zeros(0, 3, dtype=torch.int64)
    got = mrope_position_ids(cu_seqlens_of([3, 0, 2]), none, none[:, 0], 6, backend=backend)
    assert torch.equal(got, torch.tensor([0, 1, 2, 0, 1, 0]).expand(3, -1))
    assert mrope_position_ids(cu_seqlens_of([]), none, none[:, 0], 0, backend=backend).shape == (3, 0)


def test_positions_compile_into_one_graph():
    ids, grids, starts, *_ = interleaved(SAMPLES[4])
    args = (cu_seqlens_of([len(ids)]), torch.tensor(grids), torch.tensor(starts), len(ids))
    torch.compiler.reset()
    compiled = torch.compile(mrope_position_ids, fullgraph=True, backend="aot_eager")
    for advance in ("spatial", "largest"):
        for options in ({}, {"time_step": torch.rand(len(grids)), "tokens_per_second": 7.0}):
            expected = mrope_position_ids(*args, advance=advance, **options)
            assert torch.equal(compiled(*args, advance=advance, **options), expected)


def test_opcheck_with_time():
    """`time_step` of the op: two factors per span; test_contract.py has the cases without it."""
    spans = (torch.tensor([0, 9, 14]), torch.tensor([1, 4]), torch.tensor([[1, 1, 2], [2, 2, 1]]))
    factors = torch.tensor([[0.5, 1.5], [25.0, 25.0]])
    args = (*spans, torch.tensor([0, 0, -2]), factors, 15, "reference")
    torch.library.opcheck(torch.ops.mmkernels.packing_mrope_fwd.default, args)


CU, GRID, STARTS = cu_seqlens_of([9, 5]), torch.tensor([[1, 2, 4], [1, 4, 4]]), torch.tensor([1, 4])
BAD_SPANS = [
    ((CU.float(), GRID, STARTS, 14), {}, TypeError, r"cu_seqlens: expected \[S\+1\] int32"),
    ((CU + 1, GRID, STARTS, 14), {}, ValueError, r"cu_seqlens: .* at 0, non-decreasing, within total 14"),
    ((CU, GRID[:, :2], STARTS, 14), {}, ValueError, r"grid_thw: expected \[N, 3\] int64, got \[2, 2\]"),
    ((CU, GRID, STARTS[:1], 14), {}, ValueError, "starts: expected one entry for each of the 2 grids"),
    ((CU, GRID - 1, STARTS, 14), {}, ValueError, r"grid_thw\[0\]: expected t, h and w >= 1.*got \[0, 1, 3\]"),
    ((CU, GRID, STARTS, 14), {"merge_size": 3}, ValueError, r"grid_thw\[0\]: .* multiples of merge_size 3"),
    (
        (CU, GRID, STARTS.flip(0), 14),
        {},
        ValueError,
        r"starts\[1\]: expected at least 6, the end of the previous span, got 1",
    ),
    ((CU, GRID, STARTS + 2, 14), {}, ValueError, r"starts\[1\]: expected its 4 tokens within one segment, got start 6"),
    (
        (CU, GRID, STARTS, 14),
        {"time_step": torch.ones(3)},
        ValueError,
        "time_step: expected one entry for each of the 2",
    ),
    (
        (CU, GRID, STARTS, 14),
        {"time_step": torch.tensor([1, -0.5])},
        ValueError,
        r"time_step\[1\]: expected a finite number of seconds >= 0, got -0.5",
    ),
    ((CU, GRID, STARTS, 14), {"tokens_per_second": 2}, ValueError, "tokens_per_second: expected 1 without time_step"),
    (
        (CU, GRID, STARTS, 14),
        {"time_step": torch.ones(2), "tokens_per_second": 0},
        ValueError,
        "tokens_per_second: expected a finite number > 0",
    ),
    ((CU, GRID, STARTS, 14), {"advance": "max"}, ValueError, 'advance: expected "spatial" or "largest"'),
    ((CU, GRID, STARTS, 14), {"merge_size": 0}, ValueError, "merge_size: expected an integer >= 1"),
]


@pytest.mark.parametrize(("args", "options", "error", "message"), BAD_SPANS, ids=[m[:45] for *_, m in BAD_SPANS])
def test_bad_spans(args, options, error, message):
    with pytest.raises(error, match=message):
        mrope_position_ids(*args, **options)
