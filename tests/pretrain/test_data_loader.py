"""The order of the samples, and batches from any number of workers: functions of (seed, step), after any restart."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch

from mmkernels.pretrain.batch import Batch
from mmkernels.pretrain.data import (
    BatchSampler,
    BrokenImageError,
    BrokenLog,
    Collator,
    Sample,
    Source,
    Text,
    TokenSampler,
    TooManyBrokenError,
    TrainLoader,
)
from mmkernels.pretrain.data.seeds import Draws
from mmkernels.pretrain.encoders import HashedWords, Words
from mmkernels.pretrain.recipe import Stream
from mmkernels.pretrain.tokenizer import TextTokenizer
from mmkernels.pretrain.views import Captions, MaskWords

CONCEPTS = np.random.default_rng(3).integers(0, 40, 300)


def test_batches_never_repeat_a_concept_and_an_epoch_never_a_sample() -> None:
    sampler = BatchSampler(CONCEPTS, 24, seed=1)
    for _ in range(3):
        epoch = [next(sampler) for _ in range(sampler.batches_per_epoch)]
        assert all(len(set(CONCEPTS[batch])) == 24 for batch in epoch)
        dealt = np.concatenate(epoch)
        assert len(set(dealt.tolist())) == len(dealt)


def test_an_epoch_leaves_out_little_when_concepts_are_spread() -> None:
    concepts = np.random.default_rng(0).permutation(np.repeat(np.arange(100), 4))
    assert BatchSampler(concepts, 32, seed=0).batches_per_epoch >= 11  # of 12.5


@pytest.mark.parametrize("stop", [0, 1, 11, 12, 13, 40])
def test_sampler_resumes_exactly(stop: int) -> None:
    straight, killed = BatchSampler(CONCEPTS, 24, seed=5), BatchSampler(CONCEPTS, 24, seed=5)
    for _ in range(stop):
        next(straight)
        next(killed)
    state = json.loads(json.dumps(killed.state_dict()))
    resumed = BatchSampler(CONCEPTS, 24, seed=5)
    resumed.load_state_dict(state)
    for _ in range(20):
        np.testing.assert_array_equal(next(straight), next(resumed))
    assert resumed.step == stop + 20


def test_sampler_depends_on_its_seed_and_epoch() -> None:
    a, b = BatchSampler(CONCEPTS, 24, seed=0), BatchSampler(CONCEPTS, 24, seed=1)
    first = next(a)
    assert not np.array_equal(first, next(b))
    while a.epoch == 0:
        second = next(a)
    assert not np.array_equal(first, second)


def test_sampler_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"batch: expected 1 to 40 \(the distinct concepts to train on\), got 41"):
        BatchSampler(CONCEPTS, 41)
    with pytest.raises(ValueError, match="batch:"):
        BatchSampler(CONCEPTS, 0)
    with pytest.raises(ValueError, match="seed: expected 0 <= seed"):
        BatchSampler(CONCEPTS, 4, seed=-1)
    state = BatchSampler(CONCEPTS, 24, seed=5).state_dict()
    for other in (
        BatchSampler(CONCEPTS, 24, seed=6),
        BatchSampler(CONCEPTS, 23, seed=5),
        BatchSampler(CONCEPTS[1:], 24, seed=5),
    ):
        with pytest.raises(ValueError, match="as in this run"):
            other.load_state_dict(state)


# ------------------------------------------------------------------------------------------------ by tokens


LENGTHS = np.random.default_rng(5).integers(3, 40, 200)


def test_batches_stay_within_their_tokens_and_an_epoch_has_every_sample_once() -> None:
    sampler = TokenSampler(LENGTHS, 128, max_samples=9, seed=2)
    for _ in range(2):
        epoch = [next(sampler) for _ in range(sampler.batches_per_epoch)]
        assert all(LENGTHS[batch].sum() <= 128 and len(batch) <= 9 for batch in epoch)
        assert sorted(np.concatenate(epoch).tolist()) == list(range(200))
    assert LENGTHS.sum() / (128 * sampler.batches_per_epoch) > 0.9, "little is left unused"


@pytest.mark.parametrize("stop", [0, 7, 60])
def test_batches_by_tokens_resume_exactly(stop: int) -> None:
    straight, killed, resumed = (TokenSampler(LENGTHS, 128, seed=2) for _ in range(3))
    for _ in range(stop):
        next(straight)
        next(killed)
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    for _ in range(50):
        np.testing.assert_array_equal(next(straight), next(resumed))


def test_a_token_sampler_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match="tokens: expected at least the longest sample's, got 8, but sample 1 has 9"):
        TokenSampler(np.array([3, 9]), 8)
    with pytest.raises(ValueError, match="lengths: expected at least one sample, got none"):
        TokenSampler(np.array([], np.int64), 8)


# ------------------------------------------------------------------------------------------------ loader


class Words3(Source):
    """Texts of varying length; every seventh lacks the second field, some cannot be read."""

    fields = ("text", "other")

    def __init__(self, samples: int = 60, broken: tuple[int, ...] = ()) -> None:
        self.concepts = np.arange(samples)
        self.broken, self._faults = BrokenLog(samples, 0.1), broken

    def __getitem__(self, index: int) -> Sample:
        if index in self._faults:
            raise BrokenImageError("cannot be read")
        words = " ".join(f"w{index}x{i}" for i in range(1 + index % 5))
        values = {"text": Text((words, words.upper()), ("k1", "k2"))}
        return Sample(values | ({} if index % 7 == 0 else {"other": "o " * (index % 3 + 1)}), index, self.name(index))

    def name(self, index: int) -> str:
        return f"s{index}"


STREAMS = {
    "text": Stream(HashedWords(), views=(Captions(),)),
    "other": Stream(Words(), views=(MaskWords(share=0.5),)),
}


def loader(workers: int = 0, source: Source | None = None, seed: int = 4) -> TrainLoader:
    source = source or Words3()
    collator = Collator(STREAMS, TextTokenizer.train(["o o o"], 400), seed=seed)
    return TrainLoader(source, BatchSampler(source.concepts, 8, seed), collator, workers=workers)


def same(a: Batch, b: Batch) -> bool:
    pairs = [(a[name], b[name]) for name in STREAMS]
    return (a.names, a.numbers, a.step, a.state) == (b.names, b.numbers, b.step, b.state) and all(
        torch.equal(x.tokens, y.tokens)
        and torch.equal(x.cu_seqlens, y.cu_seqlens)
        and (x.labels is None) == (y.labels is None)
        and (x.labels is None or torch.equal(x.labels, y.labels))
        for x, y in pairs
    )


def test_batches_are_the_same_with_any_number_of_workers() -> None:
    expected = list(islice(loader(), 17))  # past the end of the second epoch
    assert [batch.step for batch in expected] == list(range(17))
    for workers in (1, 3):
        torch.manual_seed(workers)
        got = list(islice(loader(workers), 17))
        assert all(map(same, got, expected)), workers


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_exactly_with_other_workers(workers: int) -> None:
    straight = list(islice(loader(), 14))
    killed = loader(workers)
    for _ in range(9):
        next(killed)
    resumed = loader(2 - workers)
    resumed.load_state_dict(json.loads(json.dumps(killed.state_dict())))
    assert all(map(same, islice(resumed, 5), straight[9:]))


@pytest.mark.parametrize(("chosen", "used"), [(None, "fork"), ("spawn", "spawn")])
def test_workers_are_forked_unless_chosen_otherwise(
    chosen: str | None, used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python 3.14's own default would not know the parts that a user's recipe file defines."""
    monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none=False: chosen)
    asked: list[str | None] = []

    def loaded(builder: Any, batch_size: None, **options: Any) -> Any:
        asked.append(options.get("multiprocessing_context"))
        return (builder[turn] for turn in options["sampler"])

    monkeypatch.setattr("mmkernels.pretrain.data.loader.DataLoader", loaded)
    for workers in (2, 0):
        assert next(loader(workers)).samples == 8
    assert asked == [used, None]


def test_the_runs_random_state_is_not_touched() -> None:
    before = torch.get_rng_state()
    next(loader())
    next(loader(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_samples_are_left_out_and_recorded_here(workers: int) -> None:
    source = Words3(64, broken=(3, 5))
    batches = list(islice(loader(workers, source), 8))
    assert sum(batch.samples for batch in batches) == 64 - 2
    assert source.broken.reasons == {"s3": "cannot be read", "s5": "cannot be read"}
    with pytest.raises(TooManyBrokenError):
        list(islice(loader(workers, Words3(broken=tuple(range(20)))), 7))


def test_an_absent_field_is_an_empty_segment() -> None:
    source = Words3()
    collator = Collator(STREAMS, TextTokenizer.train([], 400))
    batch = collator([source[0], source[1], source[7]], [0, 1, 7])
    assert [n > 0 for n in batch["other"].lengths] == [False, True, False]
    nothing = collator([source[0]], [0])
    assert nothing["other"].num_tokens == 0 and nothing["text"].num_tokens > 0
    assert [part.samples for part in batch.split(2)] == [2, 1]
    assert batch.split(2)[1].names == ["s7"]


def test_a_sample_is_changed_in_the_same_way_in_any_company() -> None:
    source, collator = Words3(), Collator(STREAMS, TextTokenizer.train(["o o"], 400), seed=1)
    alone = collator([source[5]], [5], step=3)
    beside = collator([source[2], source[5], source[9]], [2, 5, 9], step=3).split(1)[1]
    assert torch.equal(alone["text"].tokens, beside["text"].tokens)
    assert torch.equal(alone["other"].tokens, beside["other"].tokens)
    later = [collator([source[5]], [5], step=step)["text"].tokens.shape[0] for step in range(40)]
    assert len(set(later)) > 1, "another step draws other captions"


def test_views_of_some_objectives_rest_while_others_are_in_use() -> None:
    streams = {"other": Stream(Words(), views=(MaskWords(share=0.9, when=("words",)),))}
    source, tokenizer = Words3(), TextTokenizer.train(["o o"], 400)
    collator = Collator(streams, tokenizer)
    plain = Collator(streams, tokenizer)([source[5]], [5], mode="plain")["other"]
    assert torch.equal(collator([source[5]], [5], used=frozenset({"matching"}))["other"].tokens, plain.tokens)
    assert not torch.equal(collator([source[5]], [5], used=frozenset({"words"}))["other"].tokens, plain.tokens)


def test_lengths_bound_what_is_prepared() -> None:
    source, collator = Words3(), Collator(STREAMS, TextTokenizer.train(["o o"], 400))
    lengths = collator.lengths(source)
    for i in range(len(source)):
        assert collator([source[i]], [i], mode="plain").tokens <= lengths[i]


# ------------------------------------------------------------------------------------------------ draws


def test_draws_are_uniform_independent_and_the_samples_own() -> None:
    draws = Draws(1, 2, "x", np.arange(4000))
    u = draws.uniform(3)
    assert u.shape == (4000, 3) and u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.01
    assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.06
    np.testing.assert_array_equal(Draws(1, 2, "x", np.array([7, 3])).uniform(3), u[[7, 3]])
    for other in (
        Draws(2, 2, "x", np.arange(4000)),
        Draws(1, 3, "x", np.arange(4000)),
        Draws(1, 2, "y", np.arange(4000)),
    ):
        assert abs(np.corrcoef(other.uniform(1)[:, 0], u[:, 0])[0, 1]) < 0.06
    assert draws.generator(5).random() == Draws(1, 2, "x", np.array([5])).generator(0).random()
    assert draws.generator(5).random() != draws.generator(6).random()


def test_draws_are_the_same_for_ever() -> None:
    assert Draws(3, 5, "text/Captions/0", np.array([11])).uniform(2)[0].tolist() == GOLDEN


GOLDEN = [0.049467871207381386, 0.5223521182673404]
