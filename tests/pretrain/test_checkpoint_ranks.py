"""Checkpoints of several ranks: any number writes, any other reads, however the module is wrapped or sharded."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mmkernels.pretrain import checkpoint
from mmkernels.pretrain.checkpoint import DamagedError, SaveError, manifest, reading, saver, writing
from mmkernels.pretrain.warm_start import warm_start


class Net(nn.Module):
    """Rows that no number of ranks divides, fewer rows than ranks, parameters without dimensions, a queue."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.second = nn.Linear(7, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("queue", torch.randn(6, 3))
        self.register_buffer("place", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(self.first(x))


def built(kind: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A network and its twin, and an optimizer for the network, whose order of parameters depends on the seed."""
    torch.manual_seed(seed)
    net = Net()
    twin = copy.deepcopy(net).requires_grad_(False)
    if kind in ("fully_shard", "hsdp"):
        world = dist.get_world_size()
        shape = (1, world) if kind == "fully_shard" else (2, world // 2)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
        mesh = mesh["shards"] if kind == "fully_shard" else mesh
        for part in (net.first, net.second, twin.first, twin.second):
            fully_shard(part, mesh=mesh)
    parameters = sorted(net.parameters(), key=lambda p: (p.ndim, p.numel()), reverse=bool(seed % 2))
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    model = DistributedDataParallel(net) if kind == "ddp" else net
    return nn.ModuleDict({"model": model, "twin": nn.ModuleDict({"module": twin})}), optimizer


@torch.no_grad()
def step(module: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """The same for every kind: gradients, parameters that follow, a queue that moves on."""
    state = checkpoint.weights_of(module)
    torch.manual_seed(number)
    names = sorted(name for name in state if name.startswith("model."))
    gradients = {name: torch.randn(state[name].shape) for name in names}
    by_memory = {id(p): name for name, p in checkpoint.naming.named(module).items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
            checkpoint.fill(parameter.grad, gradients[by_memory[id(parameter)]])
    optimizer.step()
    for name in names:
        twin = state[name.replace("model.", "twin.module.")]
        twin.lerp_(state[name], 0.5) if twin.is_floating_point() else twin.copy_(state[name])
    state["model.queue"][number % 6] = number
    state["model.place"] += 1


def whole_state(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found = checkpoint.weights_of(module)
    found |= {f"optimizer.{name}": value for name, value in checkpoint.naming.moments_of(module, optimizer)[0].items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in found.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def go_on(rank: int, world: int, kind: str, folder: str, number: int, group: Any = "all") -> None:
    """Load what the ranks before left, which must be what they had; a step; save it."""
    group = dist.group.WORLD if group == "all" else None
    home = Path(folder)
    module, optimizer = built(kind, number)
    if number:
        values, warnings = checkpoint.newest_whole(
            home / "checkpoints", lambda path: checkpoint.load_into(path, module, optimizer, group=group), group=group
        )
        assert values == {"step": number} and not warnings
        assert_equal(whole_state(module, optimizer), torch.load(home / f"{number}.pt"))
        assert optimizer.param_groups[0]["lr"] == 0.1 * number
    step(module, optimizer, number)
    optimizer.param_groups[0]["lr"] = 0.1 * (number + 1)
    with checkpoint.Saver(keep=2, group=group) as writer:
        writer.save(home / "checkpoints", number + 1, module, optimizer, {"step": number + 1})
        expected = whole_state(module, optimizer)
        if rank == 0:
            torch.save(expected, home / f"{number + 1}.pt")
        step(module, optimizer, 99)


HOPS = [("fully_shard", 2), ("plain", 1), ("hsdp", 4), ("ddp", 2), ("fully_shard", 4), ("plain", 2)]


def test_any_number_of_ranks_reads_what_another_wrote(tmp_path: Path) -> None:
    for number, (kind, world) in enumerate(HOPS):
        if kind == "plain" and world == 1:  # without a group
            go_on(0, 1, kind, str(tmp_path), number, None)
        else:
            ranks.run(world, go_on, kind, str(tmp_path), number)
        newest = checkpoint.latest(tmp_path / "checkpoints")
        assert newest is not None
        expected = torch.load(tmp_path / f"{number + 1}.pt")
        weights, values = checkpoint.load(newest)
        moments = {f"optimizer.{name}": tensor for name, tensor in values["optimizer"]["tensors"].items()}
        assert_equal({**weights, **moments}, expected)
        assert_equal(checkpoint.load_weights(newest, prefix="model."), checkpoint_part(expected, "model."))
        writers = {file.name.split("_")[2] for file in newest.glob("weights*.distcp")}
        assert len(writers) == world, "the writing is shared, of copies too"
        for name, entry in manifest.read_index(newest).items():
            assert sum(torch.Size(part.size).numel() for part in entry.parts) == entry.size.numel(), name
            assert len({part.offset for part in entry.parts}) == len(entry.parts), "of copies one is written"
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def checkpoint_part(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in sorted(state.items()) if name.startswith(prefix)}


def read_by_dcp(rank: int, world: int, path: str, expected: str) -> None:
    module, optimizer = built("fully_shard", 3)
    dcp.load({"weights": checkpoint.weights_of(module)}, checkpoint_id=path)
    found = torch.load(expected)
    assert_equal(
        {name: tensor for name, tensor in whole_state(module, optimizer).items()},
        {name: tensor for name, tensor in found.items() if not name.startswith("optimizer.")},
    )


def test_other_tools_read_what_ranks_wrote(tmp_path: Path) -> None:
    ranks.run(2, go_on, "fully_shard", str(tmp_path), 0)
    ranks.run(4, read_by_dcp, str(tmp_path / "checkpoints/step-00000001"), str(tmp_path / "1.pt"))


def goes_back(rank: int, world: int, folder: str) -> None:
    module, optimizer = built("fully_shard", 5)
    before = whole_state(module, optimizer)
    group = dist.group.WORLD
    newest = checkpoint.latest(Path(folder))
    assert newest is not None
    with pytest.raises(DamagedError, match=r"weights__1_0\.distcp is damaged"):
        checkpoint.load_into(newest, module, optimizer, group=group)
    assert_equal(whole_state(module, optimizer), before)
    values, (warning,) = checkpoint.newest_whole(
        Path(folder), lambda path: checkpoint.load_into(path, module, optimizer, group=group), group=group
    )
    assert values == {"step": 1} and "step-00000002/weights__1_0.distcp is damaged" in warning
    assert_equal(whole_state(module, optimizer), torch.load(Path(folder).parent / "1.pt"))


def test_damage_that_one_rank_sees_is_known_to_all(tmp_path: Path) -> None:
    for number in (0, 1):
        ranks.run(2, go_on, "fully_shard", str(tmp_path), number)
    shard = tmp_path / "checkpoints/step-00000002/weights__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[1000] ^= 64
    shard.write_bytes(content)
    for world in (2, 4):
        ranks.run(world, goes_back, str(tmp_path / "checkpoints"))


def cannot_read(rank: int, world: int, folder: str) -> None:
    def broken(*args: Any) -> None:
        raise DamagedError("the disk", "Replace it")

    kept = reading._read
    reading._read = broken if rank == 1 else kept
    try:
        with pytest.raises(DamagedError, match="the disk"):
            checkpoint.load_into(Path(folder), *built("fully_shard", 0), group=dist.group.WORLD)
    finally:
        reading._read = kept


def test_what_one_rank_cannot_read_none_has_loaded(tmp_path: Path) -> None:
    ranks.run(2, go_on, "fully_shard", str(tmp_path), 0)
    ranks.run(2, cannot_read, str(tmp_path / "checkpoints/step-00000001"))


def fails(rank: int, world: int, folder: str, where: str, on: int) -> str:
    def full(*args: Any, **more: Any) -> Any:
        raise OSError(28, "No space left on device")

    module, optimizer = built("fully_shard", 0)
    writer = checkpoint.Saver(keep=1, group=dist.group.WORLD)
    writer.save(Path(folder), 1, module, optimizer)
    writer.wait()
    owner, name = {"shards": (writing, "_bytes_in"), "sums": (saver, "sums_of"), "last": (saver, "write_manifest")}[
        where
    ]
    kept = getattr(owner, name)
    if rank == on:
        setattr(owner, name, full)
    try:
        writer.save(Path(folder), 2, module, optimizer)
        with pytest.raises(SaveError) as error:
            writer.wait()
    finally:
        setattr(owner, name, kept)
    assert list(checkpoint.steps_in(Path(folder))) == [1]
    writer.save(Path(folder), 3, module, optimizer)
    writer.wait()
    assert checkpoint.step_of(checkpoint.latest(Path(folder))) == 3
    return str(error.value)


@pytest.mark.parametrize(("where", "on"), [("shards", 1), ("sums", 1), ("last", 0)])
def test_an_error_on_one_rank_is_told_on_all(where: str, on: int, tmp_path: Path) -> None:
    """None of them waits for one that has failed; the next checkpoint may succeed."""
    for said in ranks.run(2, fails, str(tmp_path), where, on):
        assert "the checkpoint of step 2 could not be written to" in said
        assert "OSError: [Errno 28] No space left on device" in said
        assert where != "shards" or "rank 1: " in said


def of_unequal_groups(rank: int, world: int, folder: str) -> None:
    """Rank 0 belongs to a group more, as it does of a model of which a part is on one rank."""
    dist.new_group([0])
    go_on(rank, world, "plain", folder, 0)
    first_two = dist.new_group([0, 1])
    if rank < 2:
        with pytest.raises(ValueError, match=r"group: expected ranks that belong to equally many .* got \[4, 3\]"):
            checkpoint.Saver(1, first_two)


def test_ranks_of_unequal_groups(tmp_path: Path) -> None:
    ranks.run(3, of_unequal_groups, str(tmp_path), timeout=60)


def reads_old(rank: int, world: int, kind: str, path: str) -> None:
    module, optimizer = built(kind, 0)
    values = checkpoint.load_into(Path(path), module, optimizer, group=dist.group.WORLD)
    assert values == {"step": 2}
    assert_equal(whole_state(module, optimizer), torch.load(Path(path).parent / "expected.pt"))


def test_ranks_go_on_from_an_earlier_version(tmp_path: Path) -> None:
    module, optimizer = built("plain", 0)
    for number in range(2):
        step(module, optimizer, number)
    path = tmp_path / "step-00000002"
    path.mkdir()
    save_file(module.state_dict(), path / "model.safetensors")
    torch.save({"step": 2, "optimizer": optimizer.state_dict()}, path / "training.pt")
    torch.save(whole_state(module, optimizer), tmp_path / "expected.pt")
    for kind in ("fully_shard", "ddp"):
        ranks.run(2, reads_old, kind, str(path))


def begins(rank: int, world: int, kind: str, run: str, expected: str) -> None:
    module, _ = built(kind, 7)
    found = warm_start(module["model"], Path(run), ["place"])
    assert found.step == 3 and found.fresh == ["place"] and found.unused == ["place"]
    state = {
        name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in checkpoint.weights_of(module).items()
    }
    for name, tensor in torch.load(expected).items():
        assert name == "place" or torch.equal(state[f"model.{name}"], tensor), name


def test_ranks_begin_with_an_exported_model(tmp_path: Path) -> None:
    module, _ = built("plain", 0)
    state = {name.removeprefix("model."): t for name, t in module.state_dict().items() if name.startswith("model.")}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "export.json").write_text(json.dumps({"step": 3}), encoding="utf-8")
    torch.save(state, tmp_path / "expected.pt")
    for kind in ("fully_shard", "ddp"):
        ranks.run(2, begins, kind, str(tmp_path), str(tmp_path / "expected.pt"))
