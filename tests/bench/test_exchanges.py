"""What exchanges are predicted to take: the grid's algebra and bytes, and the planning command."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from mmkernels import Machine, infonce
from mmkernels.bench.exchanges import call_of, exchanges, grid_cost, grids
from mmkernels.ops.contrastive.types import COEFFICIENTS, STATISTICS
from mmkernels.runtime.collectives import Link, Network

FLAT = Network.flat(Link(1e-5, 1e9))


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (3, 2), (1, 4), (4, 1)])
def test_a_grid_needs_no_more_than_it_exchanges(rows: int, columns: int) -> None:
    """InfoNCE from blocks: what rows and columns of ranks gather and sum is enough for the loss and its gradients."""
    n, world = 5, rows * columns
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n * world, 8, generator=generator, dtype=torch.float64).requires_grad_() for _ in "xy")
    loss = infonce(x, y, torch.tensor(2.0, dtype=torch.float64))
    expected = torch.autograd.grad(loss, [x, y])

    def of(owners: list[int]) -> Tensor:
        return torch.cat([torch.arange(n) + n * owner for owner in owners])

    ranks = [(r, c) for r in range(rows) for c in range(columns)]
    in_row = {rank: of([rank[0] * columns + c for c in range(columns)]) for rank in ranks}
    in_column = {rank: of([r * columns + rank[1] for r in range(rows)]) for rank in ranks}
    exps = {rank: (2.0 * x[in_row[rank]] @ y[in_column[rank]].T).exp() for rank in ranks}
    row_sums, column_sums = torch.zeros(2, n * world, dtype=torch.float64).unbind()
    for rank in ranks:  # summed along rows and along columns
        row_sums = row_sums.index_add(0, in_row[rank], exps[rank].sum(1))
        column_sums = column_sums.index_add(0, in_column[rank], exps[rank].sum(0))
    positive = 2.0 * (x * y).sum(1)
    found = (row_sums.log() + column_sums.log()).mean() / 2 - positive.mean()
    torch.testing.assert_close(found.float(), loss.float())
    grad_x, grad_y = -2.0 * y / (n * world), -2.0 * x / (n * world)
    for rank in ranks:
        i, j = in_row[rank], in_column[rank]
        weights = exps[rank] * (1 / row_sums[i][:, None] + 1 / column_sums[j]) / (n * world)  # (p + q) / (2 N), times 2
        grad_x = grad_x.index_add(0, i, weights @ y[j])
        grad_y = grad_y.index_add(0, j, weights.T @ x[i])
    torch.testing.assert_close((grad_x, grad_y), expected)


@pytest.mark.parametrize(("rows", "columns"), [(2, 3), (4, 4), (1, 8)])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_bytes_of_a_grid(rows: int, columns: int, sigmoid: bool) -> None:
    """Counted row by row: what every rank lacks of what it needs, and what returns to it."""
    n, width = 7, 16
    statistics = 0 if sigmoid else 8 * STATISTICS
    coefficients = 0 if sigmoid else 8 * (COEFFICIENTS + 1)
    received = 0
    for others in (columns - 1, rows - 1):
        for _ in range(others * n):
            received += width * 2  # a feature in bfloat16
            received += statistics  # of one's own rows, from each other rank
            received += coefficients  # of a row of another
            received += width * 4  # a gradient of one's own rows, from each other rank
    call = call_of(n, width, rows * columns, torch.bfloat16, sigmoid=sigmoid)
    assert grid_cost(call, rows, columns, FLAT).received == received


def test_grids_of_a_world() -> None:
    assert list(grids(6)) == [(1, 6), (2, 3), (3, 2), (6, 1)]
    assert list(grids(7)) == [(1, 7), (7, 1)]


def test_exchanges_are_compared() -> None:
    machine = Machine.named("H100")
    names = [each.name for each in exchanges(call_of(1024, 1024, 1024, torch.bfloat16), machine)]
    assert names[:2] == ["all_gather", "ring"]
    assert names[2].startswith("grid ")
    assert [each.name for each in exchanges(call_of(8, 8, 7, torch.bfloat16), machine)] == ["all_gather", "ring"]
    for each in exchanges(call_of(256, 512, 64, torch.bfloat16), machine):
        assert each.seconds >= each.products > 0
        assert 0 <= each.lost < 1
    (alone, *_) = exchanges(call_of(256, 512, 1, torch.bfloat16), machine)
    assert (alone.received, alone.exchange) == (0, 0)


# The command

pytest.importorskip("tyro", reason="mmkernels[bench] is not installed")
model_cli = pytest.importorskip("mmkernels.bench.model_cli")


def test_command_answers(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--n", "1000000", "--e", "1024", "--world", "1024", "--link", "50e9"]
    assert model_cli.main(given) == 0
    out = capsys.readouterr().out
    for shown in ("on 1,024 ranks of 977", "all_gather", "ring", "grid ", "Take ", "  2,048", "GB held"):
        assert shown in out, shown
    assert model_cli.main([*given, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["exchanges"]) == {"256", "512", "1024", "2048", "4096"}
    assert found["machine"]["between"]["bandwidth"] == 50e9


def test_a_faster_link_takes_less_time(capsys: pytest.CaptureFixture[str]) -> None:
    def seconds(*options: str) -> float:
        assert model_cli.main(["--n", "65536", "--world", "64", "--json", *options]) == 0
        return json.loads(capsys.readouterr().out)["exchanges"]["64"][0]["seconds"]

    assert seconds("--link", "1e9") > seconds("--link", "50e9") > 0
    assert seconds("--latency", "1e-3") > seconds("--latency", "1e-6")
    assert seconds("--loss", "siglip") != seconds("--loss", "infonce")
    assert seconds("--ranks-per-node", "1") > seconds("--ranks-per-node", "8")


def test_it_advises_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert model_cli.main(["--n", "16000000", "--e", "2048", "--world", "512"]) == 0
    out = capsys.readouterr().out
    assert "Take ring" in out
    assert "all_gather would hold" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--n 0", "--n: expected at least 1, got 0"),
        ("--world -2", "--world: expected at least 1, got -2"),
        ("--n 4 --world 8", "--world: expected at most --n, 4, so that every rank has a pair, got 8"),
        ("--link 0", "--link: expected a number > 0, got 0.0"),
        ("--link inf", "--link: expected a number > 0, got inf"),
        ("--machine V100", "--machine: name: expected one of A100-80GB, H100, H200, CPU, got 'V100'"),
        ("--machine none.json", "--machine: "),
    ],
)
def test_command_says_what_is_wrong(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_cli.main(options.split()) == 2
    assert message in capsys.readouterr().err


def test_predictions_for_the_page() -> None:
    found = model_cli.predictions()
    assert {each["series"] for each in found} == {"all_gather", "ring", "grid"}
    for each in found:
        assert each["points"][-1][0] == 4096
        assert all(seconds > 0 for _, seconds in each["points"])
