"""`pack_dataset`: the rows of each pack joined as a plan says, no token lost uncounted, no more packs than TRL makes,
and samples of a pack that do not see each other."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

datasets = pytest.importorskip("datasets")

from mmkernels import plan_packing  # noqa: E402  after the skip
from mmkernels.integrations.datasets import PackCounts, pack_dataset  # noqa: E402
from mmkernels.testing.lengths import lengths_like  # noqa: E402

pytestmark = pytest.mark.clients

CAPACITY = 64
OVERSIZE = ("drop", "own_pack", "truncate", "split")


@pytest.fixture(autouse=True)
def _quiet() -> None:
    datasets.disable_progress_bars()


def rows(count: int = 300, seed: int = 0) -> dict[str, list[list[int]]]:
    """Rows of which every token differs from all others, some empty, some too long."""
    lengths = lengths_like("obelics@8192", count, seed=seed)[0] // 40
    lengths[::17] = 0
    ends = np.cumsum(lengths)
    ids = [list(range(end - length, end)) for end, length in zip(ends.tolist(), lengths.tolist(), strict=True)]
    return {"input_ids": ids, "labels": [[-100 if token % 3 == 0 else token for token in row] for row in ids]}


def pieces_of(table: dict[str, list[list[int]]], oversize: str) -> list[dict[str, list[int]]]:
    """The samples that are to be packed."""
    found = []
    for row in range(len(table["input_ids"])):
        sample = {name: table[name][row] for name in table}
        length = len(sample["input_ids"])
        if length == 0 or (length > CAPACITY and oversize == "drop"):
            continue
        parts = range(0, length, CAPACITY) if oversize == "split" else (0,)
        most = None if oversize == "own_pack" else CAPACITY
        found += [{n: v[at:][:most] for n, v in sample.items()} for at in parts]
    return found


def direct(table: dict[str, list[list[int]]], oversize: str, **options: Any) -> dict[str, list[list[int]]]:
    pieces = pieces_of(table, oversize)
    lengths = [len(piece["input_ids"]) for piece in pieces]
    plan = plan_packing(lengths, CAPACITY, oversize="own_pack" if oversize == "own_pack" else "error", **options)
    joined = {name: [list(itertools.chain(*(pieces[i][name] for i in pack))) for pack in plan] for name in table}
    return joined | {"seq_lengths": [[lengths[i] for i in pack] for pack in plan]}


@pytest.mark.parametrize("options", [{}, {"keep_order": True}, {"strategy": "best_fit", "seed": 3}])
@pytest.mark.parametrize("oversize", OVERSIZE)
def test_packs_are_the_plans_and_every_token_is_counted(oversize: str, options: dict[str, Any]) -> None:
    table = rows()
    over = [len(row) for row in table["input_ids"] if len(row) > CAPACITY]
    assert len(over) > 5
    packed, counts = pack_dataset(
        datasets.Dataset.from_dict(table), CAPACITY, oversize=oversize, return_counts=True, batch_size=37, **options
    )
    assert packed[:] == direct(table, oversize, **options)
    tokens = sum(map(len, table["input_ids"]))
    lost = {"drop": sum(over), "truncate": sum(over) - CAPACITY * len(over)}.get(oversize, 0)
    asked = {"drop": "dropped", "truncate": "truncated", "split": "split", "own_pack": "own_packs"}[oversize]
    empty = sum(not row for row in table["input_ids"])
    known = {"empty": empty, "dropped": 0, "truncated": 0, "split": 0, "own_packs": 0, "tokens_cut": lost}
    known |= {"pieces": len(pieces_of(table, oversize)), asked: len(over)}
    assert counts == PackCounts(samples=300, packs=len(packed), **known)
    assert sum(map(len, packed["input_ids"])) == tokens - lost == sum(map(sum, packed["seq_lengths"]))


@pytest.mark.parametrize("source", ["disk", "shuffled", "large"])
@pytest.mark.parametrize("processes", [None, 2])
def test_from_files_and_in_several_processes(source: str, processes: int | None, tmp_path: Path) -> None:
    """Memory-mapped in several chunks, with an index over the rows, with 64-bit lists: written to files, and found
    there again."""
    table = rows()
    features = None
    if source == "large":
        kind = datasets.LargeList(datasets.Value("int32"))
        features = datasets.Features({"input_ids": kind, "labels": kind})
    first, second = ({name: values[part] for name, values in table.items()} for part in (slice(100), slice(100, None)))
    for number, part in enumerate((first, second)):
        datasets.Dataset.from_dict(part, features).save_to_disk(tmp_path / str(number))
    dataset = datasets.concatenate_datasets([datasets.load_from_disk(tmp_path / str(n)) for n in range(2)])
    if source == "shuffled":
        dataset = dataset.shuffle(seed=1)
        table = dataset[:]
    packed = pack_dataset(dataset, CAPACITY, oversize="split", num_proc=processes)
    assert packed[:] == direct(table, "split")
    assert packed.cache_files
    if features is not None:
        assert packed.features["labels"] == kind
    again = pack_dataset(dataset, CAPACITY, oversize="split", num_proc=processes)
    assert again.cache_files == packed.cache_files
    other = pack_dataset(dataset, CAPACITY, oversize="truncate", num_proc=processes)
    assert other.cache_files != packed.cache_files and other[:] == direct(table, "truncate")


def test_few_rows_make_many_packs_and_many_rows_none() -> None:
    table = {"input_ids": [list(range(1000)), [], [7]]}
    packed, counts = pack_dataset(
        datasets.Dataset.from_dict(table), 8, oversize="split", strategy="next_fit", return_counts=True, batch_size=1
    )
    assert packed["input_ids"] == [list(range(at, at + 8)) for at in range(0, 1000, 8)] + [[7]]
    assert counts == (3, 126, 1, 0, 0, 0, 1, 126, 0)
    table = {"input_ids": [[], [1] * 9, [1] * 10]}
    packed, counts = pack_dataset(datasets.Dataset.from_dict(table), 8, oversize="drop", return_counts=True)
    assert len(packed) == 0 and counts == (3, 0, 1, 2, 0, 19, 0, 0, 0)
    assert sorted(packed.column_names) == ["input_ids", "seq_lengths"]
    none = datasets.Dataset.from_dict({"input_ids": [[1]]}).select([])
    packed, counts = pack_dataset(none, 8, return_counts=True)
    assert packed.column_names == ["input_ids", "seq_lengths"] and counts == (0,) * 9


def test_splits_formats_and_chosen_columns() -> None:
    table = {"text": ["a", "b", "c"], "input_ids": [[1, 2], [3], [4, 5, 6]], "mask": [[1, 1], [0], [1, 1, 1]]}
    dataset = datasets.Dataset.from_dict(table)
    both = datasets.DatasetDict({"train": dataset, "test": dataset.select([0, 1])}).with_format("torch")
    packed, counts = pack_dataset(both, 3, columns=["input_ids", "mask"], keep_order=True, return_counts=True)
    assert {name: each.packs for name, each in counts.items()} == {"train": 2, "test": 1}
    assert packed["train"].column_names == ["input_ids", "mask", "seq_lengths"]
    assert [each.tolist() for each in packed["train"]["input_ids"]] == [[1, 2, 3], [4, 5, 6]]
    assert isinstance(packed["test"][0]["seq_lengths"], torch.Tensor)
    some = dataset.with_format("torch", columns=["input_ids"])
    assert set(pack_dataset(some, 3, columns=["input_ids", "mask"])[0]) == {"input_ids", "seq_lengths"}


@pytest.mark.parametrize(
    ("table", "options", "error", "message"),
    [
        (
            {"a": [[1]], "text": ["b"]},
            {},
            TypeError,
            "column 'text': expected lists of tokens, got string; name the col",
        ),
        (
            {"a": [[1], [2, 3]], "b": [[1], [2]]},
            {},
            ValueError,
            "column 'b': expected 2 entries in row 1, .* 'a', got 1",
        ),
        ({"a": [[1], None]}, {}, ValueError, "column 'a': expected a list in row 1, got null"),
        ({"a": [[1] * 9, [1] * 3, [1] * 8]}, {}, ValueError, "at most seq_length=4 .* got 9 in row 0 and 1 more rows"),
        ({"a": [[1]]}, {"columns": ["b"]}, ValueError, r"columns: expected among \['a'\], got 'b'"),
        ({"a": [[1]]}, {"columns": "a"}, TypeError, "columns: expected a sequence of names, got 'a'"),
        ({"a": [[1]]}, {"columns": []}, ValueError, "columns: expected at least one column"),
        ({"a": [[1]], "seq_lengths": [[1]]}, {}, ValueError, "is it packed already"),
        ({"a": [[1]]}, {"oversize": "wrapped"}, ValueError, "oversize: expected one of error, drop, .*, got 'wrapped'"),
        ({"a": [[1]]}, {"strategy": "bfd"}, ValueError, "strategy: expected one of auto"),
        (
            {"a": [[1]]},
            {"drop_last_batch": True},
            TypeError,
            "drop_last_batch: expected an option of Dataset.map among",
        ),
        ({"a": [[1]]}, {"keep_order": True, "seed": 1}, ValueError, "keep_order: expected"),
    ],
)
def test_wrong_arguments_are_named(table: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        pack_dataset(datasets.Dataset.from_dict(table), 4, **options)


def test_what_is_no_data_set_of_these() -> None:
    with pytest.raises(TypeError, match=r"dataset: expected a datasets\.Dataset or DatasetDict, got list"):
        pack_dataset([{"input_ids": [1]}], 4)
    both = datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [[1]]})})
    with pytest.raises(TypeError, match="cache_file_name: expected to be unset for a DatasetDict"):
        pack_dataset(both, 4, cache_file_name="x")
    with pytest.raises(ValueError, match="capacity: expected an integer >= 1, got 0"):
        pack_dataset(both, 0)


@pytest.mark.parametrize(("theirs", "ours"), [("bfd", "truncate"), ("bfd_split", "split")])
def test_the_same_tokens_as_trl_in_no_more_packs(theirs: str, ours: str) -> None:
    trl = pytest.importorskip("trl")
    dataset = datasets.Dataset.from_dict(rows(2500))
    expected = trl.pack_dataset(dataset, CAPACITY, strategy=theirs)
    found = pack_dataset(dataset, CAPACITY, oversize=ours)
    assert sorted(found.column_names) == sorted(expected.column_names)
    assert found.features["seq_lengths"] == expected.features["seq_lengths"]
    assert len(found) <= len(expected)

    def samples(packs: Any) -> list[tuple[list[int], list[int]]]:
        """Each sample's tokens and labels."""
        cut = []
        for pack in packs:
            ends = [0, *itertools.accumulate(pack["seq_lengths"])]
            assert ends[-1] == len(pack["input_ids"]) <= CAPACITY
            cut += [(pack["input_ids"][a:b], pack["labels"][a:b]) for a, b in itertools.pairwise(ends)]
        return sorted(cut)

    assert samples(found) == samples(expected)


@pytest.mark.filterwarnings("ignore")
def test_trls_collator_and_a_model_keep_samples_apart() -> None:
    trainer = pytest.importorskip("trl.trainer.sft_trainer")
    from integrations.tiny_models import built, text

    from mmkernels.integrations.transformers import register

    register()
    alone = [text(seed)[0].tolist() for seed in range(12)]
    packed = pack_dataset(datasets.Dataset.from_dict({"input_ids": alone}), 24)
    assert max(map(len, packed["seq_lengths"])) > 1
    collator = trainer.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    batch = collator([packed[row] for row in range(len(packed))])
    lengths = list(itertools.chain(*packed["seq_lengths"]))
    assert batch["position_ids"].tolist() == [[n for length in lengths for n in range(length)]]
    model = built("llama", "mmkernels")
    starts = np.cumsum([0, *lengths])
    assert (batch["labels"][0, starts[:-1]] == -100).all()
    with torch.no_grad():
        logits = model(**batch).logits[0]
        for start, length in zip(starts[:-1], lengths, strict=True):
            own = batch["input_ids"][:, start : start + length]
            assert own[0].tolist() in alone
            torch.testing.assert_close(logits[start : start + length], model(own).logits[0], rtol=0, atol=1e-5)
