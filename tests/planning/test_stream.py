"""A stream gives the packs of the whole list, even when saved and loaded midway; its state stays small."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkernels import StreamPlanner, plan_packing
from mmkernels.runtime import native
from mmkernels.testing.lengths import LENGTHS, lengths_like


def packs_of(planner: StreamPlanner, lengths, images=None, *, restart_after=()) -> list[list[int]]:
    """All packs of a stream; after some of them a new planner that loads the state takes over."""
    packs: list[list[int]] = []

    def drain(planner: StreamPlanner) -> StreamPlanner:
        while (pack := planner.pop()) is not None:
            packs.append(pack.tolist())
            if len(packs) in restart_after:
                state = json.loads(json.dumps(planner.state_dict()))
                planner = StreamPlanner(**{name: state[name] for name in OPTIONS})
                planner.load_state_dict(state)
        return planner

    while planner.items < len(lengths):
        number = planner.items
        planner.push(lengths[number], images[number] if images is not None else 0)
        assert len(planner) <= planner.state_dict()["lookahead"]
        planner = drain(planner)
    planner.flush()
    planner = drain(planner)
    assert (planner.items, planner.packs, len(planner)) == (len(lengths), len(packs), 0)
    return packs


OPTIONS = ("capacity", "lookahead", "max_images", "max_samples", "oversize")


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 200),
    st.lists(st.tuples(st.integers(0, 250), st.integers(0, 4)), max_size=60),
    st.sampled_from([1, 2, 7, 128]),
    st.one_of(st.none(), st.integers(1, 3)),
    st.one_of(st.none(), st.integers(1, 5)),
    st.sampled_from(["drop", "own_pack"]),
    st.sets(st.integers(1, 20), max_size=3),
)
def test_a_stream_has_the_packs_of_the_whole(capacity, items, lookahead, max_images, max_samples, oversize, restarts):
    lengths, images = [length for length, _ in items], [count for _, count in items]
    options = {"lookahead": lookahead, "max_images": max_images, "max_samples": max_samples, "oversize": oversize}
    whole = plan_packing(lengths, capacity, strategy="subset_sum", images=images, **options)
    straight = packs_of(StreamPlanner(capacity, **options), lengths, images)
    assert sorted(straight) == sorted(pack.tolist() for pack in whole)
    assert straight == packs_of(StreamPlanner(capacity, **options), lengths, images, restart_after=restarts)


@pytest.mark.parametrize("name", LENGTHS)
def test_a_stream_packs_data_fully_within_a_small_state(name):
    lengths, capacity = lengths_like(name, 3000)
    planner = StreamPlanner(capacity)
    for length in lengths.tolist():
        planner.push(length)
        while planner.pop() is not None:
            assert len(json.dumps(planner.state_dict())) < 4096
    made = planner.packs
    planner.flush()
    rest = sum(planner.pop() is not None for _ in range(len(lengths)))
    assert made + rest == plan_packing(lengths, capacity, strategy="subset_sum").num_packs


def test_without_the_core_the_packs_are_the_same(monkeypatch):
    lengths, capacity = lengths_like("qwen2vl@16384", 400)
    here = packs_of(StreamPlanner(capacity, lookahead=32), lengths)
    monkeypatch.setattr(native, "why_absent", lambda: "taken away by a test")
    assert here == packs_of(StreamPlanner(capacity, lookahead=32), lengths)


def test_a_full_window_must_be_popped_and_flushing_starts_a_new_one():
    planner = StreamPlanner(10, lookahead=2)
    assert planner.pop() is None
    assert [planner.push(length) for length in (6, 5)] == [0, 1]
    assert planner.ready
    with pytest.raises(RuntimeError, match=r"push: a pack is ready; pop\(\) it first"):
        planner.push(4)
    assert planner.pop().tolist() == [0]
    assert planner.pop() is None
    assert planner.waiting == [1]
    planner.flush()
    assert planner.pop().tolist() == [1]
    assert not planner.ready
    planner.flush()  # nothing to flush: no stretch ends
    planner.push(4)
    assert planner.pop() is None
    assert planner.waiting == [2]


def test_oversize_items_by_policy():
    planner = StreamPlanner(8)
    planner.push(3)
    with pytest.raises(ValueError, match="length: expected at most capacity=8, got 9 of item 1"):
        planner.push(9)
    assert planner.items == 1  # the item was refused, not counted
    with pytest.raises(ValueError, match="images: expected at most max_images=2, got 3 of item 0"):
        StreamPlanner(8, max_images=2).push(1, 3)
    planner = StreamPlanner(8, oversize="drop")
    assert [planner.push(length) for length in (3, 9, 5)] == [0, 1, 2]
    planner.flush()
    assert planner.pop().tolist() == [0, 2]
    assert planner.dropped == 1
    planner = StreamPlanner(8, oversize="own_pack")
    planner.push(3)
    planner.push(9)
    assert planner.pop().tolist() == [1]
    assert planner.waiting == [0]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: StreamPlanner(0), ValueError, "capacity: expected an integer >= 1, got 0"),
        (lambda: StreamPlanner(2**25), ValueError, "capacity: expected at most 16777216, got 33554432"),
        (lambda: StreamPlanner(8, lookahead=0), ValueError, "lookahead: expected an integer >= 1"),
        (lambda: StreamPlanner(8, oversize="cut"), ValueError, "oversize: expected one of error, drop, own_pack"),
        (lambda: StreamPlanner(8).push(-1), ValueError, "length: expected an integer >= 0, got -1"),
        (lambda: StreamPlanner(8).push(1.5), TypeError, "length: expected an integer >= 0, got 1.5"),
        (
            lambda: StreamPlanner(8).load_state_dict(StreamPlanner(9).state_dict()),
            ValueError,
            "state: expected capacity 8 as in this planner, got 9",
        ),
    ],
)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_lengths_of_numpy_kind():
    planner = StreamPlanner(10)
    planner.push(np.int32(4))
    json.dumps(planner.state_dict())
