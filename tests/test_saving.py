"""What users save: `torch.load` with its defaults restores it, in a fresh process, complete and usable; so do pickle,
copies and other processes."""

import copy
import dataclasses
import io
import multiprocessing
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from answering import answer
from torch import Tensor

import mmkernels
from mmkernels import (
    AttentionCost,
    AttentionMask,
    EncoderCost,
    FalseNegatives,
    Media,
    Modality,
    PackedBatch,
    StreamPlanner,
    attention,
    balance_ranks,
    infonce,
    plan_packing,
)
from mmkernels.integrations.torch_data import PackedDataset, PackedLoader, PackedSampler
from mmkernels.nn import CrossModalAttention, InfoNCELoss, Rotary, SigLIPLoss

CU = torch.tensor([0, 5, 5, 9], dtype=torch.int32)
KINDS = torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 1], dtype=torch.uint8)
SPANS = torch.tensor([-1, 0, 0, -1, -1, -1, 1, 1, 1], dtype=torch.int32)
LO, HI = torch.arange(9, dtype=torch.int32) // 3 * 3, torch.arange(1, 10, dtype=torch.int32)
MASKS = {
    "packed": lambda: AttentionMask.packed(CU, causal=True, window=3),
    "two sides": lambda: AttentionMask.packed(CU, window=(2, None)),
    "batched": lambda: AttentionMask.batched(3, 3, causal=True),
    "padding": lambda: AttentionMask.from_padding(torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 0]]), causal=True),
    "prefix": lambda: AttentionMask.prefix(CU, torch.tensor([2, 0, 1], dtype=torch.int32)),
    "multimodal": lambda: AttentionMask.multimodal(CU, KINDS, SPANS),
    "media": lambda: AttentionMask.media(CU, CU, SPANS, SPANS.clamp(min=0), mode="last"),
    "cross_only": lambda: AttentionMask.cross_only(CU, KINDS),
    "from_rows": lambda: AttentionMask.from_rows(LO, HI, span_q=SPANS, span_k=SPANS),
    "with_positions": lambda: AttentionMask.from_rows(LO, HI).with_positions(LO),
    "with_classes": lambda: AttentionMask.packed(CU).with_classes(KINDS),
}


def a_batch() -> PackedBatch:
    clip = Media(Modality.VIDEO, torch.ones(8, 3), (2, 2, 2), merge_size=2, time_step=0.5)
    image = Media(Modality.IMAGE, torch.ones(16, 3), (1, 4, 4), merge_size=2)
    ids = torch.arange(3)
    return PackedBatch.from_samples(
        [[ids, image], [clip, ids, image], ids],
        capacity=np.int64(24),
        mrope=True,
        labels=[torch.arange(7), torch.arange(9), ids],
        sample_weight=[1.0, 2.0, 0.5],
    )


def a_plan(**options):
    return plan_packing([3, 9, 4, 4, 1, 12, 5], 12, images=[0, 1, 1, 0, 0, 2, 1], max_images=2, **options)


def a_cost() -> AttentionCost:
    return AttentionCost(
        EncoderCost.transformer(8, 2, tokens=np.arange(7)),
        EncoderCost(np.float64(2), pairs=[np.int64(4)] * 7),
    )


def stats():
    x = torch.nn.functional.normalize(torch.randn(6, 4), dim=1)
    return infonce(x, x.flip(0), torch.tensor(10.0), return_stats=True)[1]


def planner_state() -> dict:
    planner = StreamPlanner(12, max_images=np.int64(2))
    planner.push(np.int64(5), images=np.int64(1))
    return planner.state_dict()


def loader_state() -> dict:
    samples = [{"tokens": list(range(n))} for n in (3, 5, 2, 8, 4, 4)]
    sampler = PackedSampler(np.array([3, 5, 2, 8, 4, 4]), capacity=np.int64(9))
    loader = PackedLoader(PackedDataset(samples, capacity=9), sampler)
    next(iter(loader))
    return loader.state_dict()


OBJECTS = {
    **{f"mask {name}": make for name, make in MASKS.items()},
    "batch": a_batch,
    "packed media": lambda: a_batch().media[Modality.VIDEO],
    "media": lambda: Media(Modality.VIDEO, torch.ones(8, 3), (2, 2, 2), merge_size=2, time_step=0.5),
    "media of NumPy's numbers": lambda: Media(
        np.int64(5), torch.ones(8, 3), tokens=np.int32(2), merge_size=np.int64(1)
    ),
    "modality": lambda: Modality.AUDIO,
    "plan": a_plan,
    "counted plan": lambda: plan_packing(np.full(50, 3, np.uint16), np.int64(10), strategy="histogram"),
    "schedule": lambda: balance_ranks(a_plan(), 2),
    "cost": a_cost,
    "stats": stats,
    "false negatives": lambda: FalseNegatives(torch.ones(2, 3), torch.zeros(2, 3), 0.1, "relative"),
    "rotary": lambda: Rotary(sections=[2, 1, 1]),
    "infonce loss": lambda: InfoNCELoss(label_smoothing=0.1),
    "siglip loss": lambda: SigLIPLoss(learnable=False),
    "planner state": planner_state,
    "loader state": loader_state,
}


def parts(value) -> dict:
    """An object's contents by name, down to tensors, arrays and plain values."""
    if dataclasses.is_dataclass(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, AttentionMask):
        return {"rows": value.to_dense(9, 9), "classes": value.classes}
    if isinstance(value, torch.nn.Module):
        return {"state": dict(value.state_dict()), "repr": repr(value)}
    if isinstance(value, AttentionCost):
        return {"costs": value.of_packs(a_plan())}
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    return value if isinstance(value, dict) else {}


def assert_same(got, expected) -> None:
    assert type(got) is type(expected)
    if isinstance(expected, Tensor):
        assert torch.equal(got, expected) and got.dtype == expected.dtype
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(got, expected) and got.dtype == expected.dtype
    elif isinstance(expected, EncoderCost):
        assert np.array_equal(got.of_items(a_plan().lengths), expected.of_items(a_plan().lengths))
    elif names := parts(expected):
        assert parts(got).keys() == names.keys()
        for name, value in names.items():
            assert_same(parts(got)[name], value)
    else:
        assert got == expected


def saved(value) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return file


@pytest.mark.parametrize("name", OBJECTS)
def test_torch_load_with_its_defaults(name):
    torch.manual_seed(0)
    expected = OBJECTS[name]()
    assert_same(torch.load(saved(expected)), expected)
    for twin in (pickle.loads(pickle.dumps(expected)), copy.deepcopy(expected), copy.copy(expected)):
        assert_same(twin, expected)


IN_A_FRESH_PROCESS = """
import sys
from pathlib import Path
import torch
import mmkernels.nn
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.pt")):
    value = torch.load(path)  # refuses what is not registered
    if isinstance(value, mmkernels.AttentionMask):
        q = torch.load(folder / "q.tensor")
        value = mmkernels.attention(q, q, q, value)
    torch.save(value, path.with_suffix(".back"))
    print(path.stem, type(value).__name__)
"""


def test_in_a_fresh_process(tmp_path: Path):
    torch.manual_seed(0)
    q = torch.randn(9, 2, 16)
    torch.save(q, tmp_path / "q.tensor")
    objects = {name: make() for name, make in OBJECTS.items()}
    for name, value in objects.items():
        if isinstance(value, AttentionMask):
            attention(q, q, q, value)  # laid out: what was used is saved too
        torch.save(value, tmp_path / f"{name}.pt")
    run = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(OBJECTS)
    for name, value in objects.items():
        back = torch.load(tmp_path / f"{name}.back")
        assert_same(back, attention(q, q, q, value) if isinstance(value, AttentionMask) else value)


def test_through_a_queue():
    context = multiprocessing.get_context("spawn")
    there, back = context.Queue(), context.Queue()
    mask, plan, batch = MASKS["multimodal"](), a_plan(), a_batch()
    worker = context.Process(target=answer, args=(there, back, 3))
    worker.start()
    for value in (mask, plan, batch):
        there.put(value)
    assert np.array_equal(back.get(timeout=120), mask.to_dense(9, 9).numpy())
    assert np.array_equal(back.get(timeout=120), plan.items)
    assert back.get(timeout=120) == batch.num_tokens
    worker.join(timeout=120)
    assert worker.exitcode == 0


def test_a_loaded_mask_is_checked_again():
    """A file is untrusted input: no layout is taken from it, and its metadata is checked."""
    mask = MASKS["from_rows"]()
    mask.rows(9, 9)
    loaded = torch.load(saved(mask))
    assert loaded._rows is None
    loaded._builder.hi[3] = -7
    with pytest.raises(ValueError, match="hi: expected at least lo, got -7 at index 3"):
        torch.load(saved(loaded))


def test_a_loaded_plan_stays_as_it_is():
    for twin in (torch.load(saved(a_plan())), pickle.loads(pickle.dumps(a_plan()))):
        with pytest.raises(ValueError, match="read-only"):
            twin.items[0] = 1


@pytest.mark.parametrize(
    "module",
    [lambda: InfoNCELoss(), lambda: SigLIPLoss(), lambda: CrossModalAttention(16, 2)],
    ids=["infonce", "siglip", "attention"],
)
def test_state_dicts(module):
    """The format for modules: a state dict, which needs nothing registered."""
    torch.manual_seed(0)
    trained, fresh = module(), module()
    for parameter in trained.parameters():
        torch.nn.init.normal_(parameter)
    fresh.load_state_dict(torch.load(saved(trained.state_dict())))
    assert_same(dict(fresh.state_dict()), dict(trained.state_dict()))


def test_every_public_type_is_there():
    """Whoever adds a public type says here how it is saved."""
    elsewhere = {"BackendError", "GradCache", "StreamPlanner"}  # an error, a function with state, a state_dict
    elsewhere |= {"Link", "Machine", "StepPlan", "TrainingStep"}  # figures of a plan; Machine.save writes JSON
    elsewhere |= {"GatheredKeys"}  # messages on their way, for one call
    types = {name for name in mmkernels.__all__ if isinstance(getattr(mmkernels, name), type)}
    made = {type(make()).__name__ for make in OBJECTS.values()} | {"EncoderCost"}
    assert types - made == elsewhere
