"""Checkpoints of one process: killed while it writes, damaged, of earlier versions, of strangers."""

from __future__ import annotations

import copy
import json
import os
import pickle
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from pretrain.damaged import damage
from pretrain.test_resume import Make, assert_same_end, one, resumed
from safetensors.torch import save_file
from torch import Tensor, nn

from mmkernels.pretrain import checkpoint, train
from mmkernels.pretrain.checkpoint import DamagedError, Saver
from mmkernels.pretrain.export import export
from mmkernels.pretrain.run_folder import RunFolder
from mmkernels.pretrain.trainer import Trainer

FILES = (".metadata", "index.json", "manifest.json", "optimizer__0_0.distcp", "training.pt", "weights__0_0.distcp")


class Toy(nn.Module):
    """All that a run may carry: parameters that are shared, without dimensions or frozen, buffers of other dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.tied = self.second.weight
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("place", torch.tensor(7))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("halves", torch.randn(5, dtype=torch.bfloat16))
        self.register_buffer("nothing", torch.empty(0, 3))
        self.register_buffer("turned", torch.randn(3, 5).t())

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.second(self.first(x).relu())


def learned(steps: int = 3, turned: bool = False) -> tuple[Toy, torch.optim.AdamW]:
    """A module and its optimizer after some steps; `turned`: the optimizer has its parameters in another order."""
    module = Toy()
    groups = [
        {"params": [p for p in module.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in module.parameters() if p.ndim <= 1]},
    ]
    if turned:
        groups = [{**group, "params": group["params"][::-1]} for group in reversed(groups)]
    optimizer = torch.optim.AdamW(groups, lr=0.01, weight_decay=0.0, fused=True)
    for _ in range(steps):
        module(torch.randn(4, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def assert_same(mine: tuple[nn.Module, torch.optim.Optimizer], other: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    """Also after the next step."""
    for _ in range(2):
        for name, tensor in mine[0].state_dict().items():
            assert torch.equal(tensor, other[0].state_dict()[name]), name
        x = torch.randn(4, 6)
        for module, optimizer in (mine, other):
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_everything_comes_back(tmp_path: Path) -> None:
    """Into an optimizer that has its groups and parameters in another order, which is nothing to a name."""
    kept = learned()
    path = checkpoint.save(tmp_path, 3, *kept, {"step": 3, "at": [1, {"x": torch.ones(2)}]}, keep=1)
    assert sorted(file.name for file in path.iterdir()) == sorted(FILES)
    for turned in (False, True):
        other = learned(1, turned)
        values = checkpoint.load_into(path, *other)
        assert values["step"] == 3 and torch.equal(values["at"][1]["x"], torch.ones(2))
        decays = {len(group["params"]): group["weight_decay"] for group in other[1].param_groups}
        assert decays == {len(group["params"]): group["weight_decay"] for group in kept[1].param_groups}
        for name, tensor in kept[0].state_dict().items():
            assert torch.equal(tensor, other[0].state_dict()[name]), name
        moments = [checkpoint.naming.moments_of(*each)[0] for each in (kept, other)]
        assert moments[0].keys() == moments[1].keys()
        assert all(torch.equal(tensor, moments[1][name]) for name, tensor in moments[0].items())
    weights = checkpoint.load_weights(path)
    assert list(weights) == sorted(kept[0].state_dict())
    assert all(torch.equal(weights[name], tensor) for name, tensor in kept[0].state_dict().items())
    assert list(checkpoint.load_weights(path, prefix="first.")) == ["bias", "weight"]
    for group in other[1].param_groups:
        group.update(fused=False, foreach=True)
    checkpoint.load_into(path, *other)
    assert all(group["foreach"] and not group["fused"] for group in other[1].param_groups), "a matter of the device"
    checkpoint.load_into(path, *(other := learned(1)))
    assert_same(kept, other)


def test_other_tools_read_it(tmp_path: Path) -> None:
    """`torch.distributed.checkpoint` itself."""
    module, optimizer = learned()
    path = checkpoint.save(tmp_path, 3, module, optimizer, keep=1)
    state = {"weights": {name: torch.zeros_like(tensor) for name, tensor in module.state_dict().items()}}
    dcp.load(state, checkpoint_id=str(path))
    assert all(torch.equal(state["weights"][name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["gone", "cut", "empty", "altered", "longer"])
def test_damage_is_named_before_anything_is_changed(name: str, how: str, tmp_path: Path) -> None:
    older, newer, here = learned(1), learned(2), learned(3)
    checkpoint.save(tmp_path, 1, *older, {"step": 1}, keep=2)
    path = checkpoint.save(tmp_path, 2, *newer, {"step": 2}, keep=2)
    damage(path / name, how)
    before = copy.deepcopy(here[0].state_dict())
    with pytest.raises(DamagedError, match=r"step-00000002/\S+ is damaged \(.*\)\. Delete .*step-00000002") as error:
        checkpoint.load_into(path, *here)
    if (name, how) != ("manifest.json", "altered"):  # which makes another file seem damaged
        assert f"step-00000002/{name} is damaged" in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in here[0].state_dict().items())
    with pytest.raises(DamagedError):
        checkpoint.load(path)

    values, warnings = checkpoint.newest_whole(tmp_path, lambda path: checkpoint.load_into(path, *here))
    assert values == {"step": 1}
    (warning,) = warnings
    assert "step-00000002/" in warning and warning.endswith("Left out; the run goes on from step-00000001")
    assert_same(older, here)


def test_all_are_damaged_or_none_is_there(tmp_path: Path) -> None:
    assert checkpoint.newest_whole(tmp_path / "none", checkpoint.load) == (None, [])
    for step in (1, 2):
        damage(checkpoint.save(tmp_path, step, one(1.0), keep=2) / "manifest.json", "gone")
    with pytest.raises(DamagedError, match=r"step-00000002/manifest.* Delete .*-00000002, .*-00000001 to begin"):
        checkpoint.newest_whole(tmp_path, checkpoint.load)


def test_weights_need_their_own_files_alone(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, *learned(), keep=1)
    (path / "optimizer__0_0.distcp").unlink()
    assert checkpoint.load_weights(path)
    damage(path / "weights__0_0.distcp", "altered")
    with pytest.raises(
        DamagedError, match=r"weights__0_0\.distcp is damaged .*the checksum differs\)\. Ask for another"
    ):
        checkpoint.load_weights(path, "Ask for another")


def test_another_module_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 3, *learned(), keep=1)
    with pytest.raises(ValueError, match=r"got others: it has w, which the checkpoint lacks; it lacks first\.bias, "):
        checkpoint.load_into(path, one(1.0))
    other = Toy()
    other.halves = torch.zeros(6)
    with pytest.raises(ValueError, match=r"got others: halves is \[6\], there \[5\]"):
        checkpoint.load_into(path, other)
    module, optimizer = learned()
    with pytest.raises(ValueError, match="optimizer: expected the parameters of the checkpoint, got none for first"):
        checkpoint.load_into(path, module, torch.optim.AdamW([module.scale]))
    joined = torch.optim.AdamW([p for group in optimizer.param_groups for p in group["params"]])
    with pytest.raises(ValueError, match="which had different settings"):
        checkpoint.load_into(path, module, joined)
    with pytest.raises(ValueError, match=r"optimizer: expected parameters of the module, got 1 others, of shape \[2\]"):
        checkpoint.save(tmp_path, 4, module, torch.optim.SGD([nn.Parameter(torch.zeros(2))]), keep=1)
    with pytest.raises(ValueError, match="values: expected any name but 'optimizer'"):
        checkpoint.save(tmp_path, 4, module, None, {"optimizer": 1}, keep=1)
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        Saver(0)


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_stranger_runs(tmp_path: Path) -> None:
    """Their checksums are those of the manifest, so that nothing seems damaged."""
    path = checkpoint.save(tmp_path, 3, *learned(), {"step": 3}, keep=1)
    manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    for name in (".metadata", "training.pt"):
        content = pickle.dumps(Evil(tmp_path / "evil"))
        (path / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
    index = json.loads((path / "index.json").read_text(encoding="utf-8"))
    (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert len(checkpoint.load_weights(path)) == len(Toy().state_dict())
    with pytest.raises(DamagedError, match=r"training\.pt is damaged"):
        checkpoint.load_into(path, *learned())
    assert not (tmp_path / "evil").exists()

    def with_index(change: Callable[[dict[str, Any]], Any]) -> None:
        changed = copy.deepcopy(index)
        change(changed["weights.halves"])
        content = json.dumps(changed).encode()
        (path / "index.json").write_bytes(content)
        manifest["files"]["index.json"] = {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        (path / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")

    secret = tmp_path / "secret"
    secret.write_bytes(bytes(100))
    for change in (
        lambda entry: entry["parts"][0].update(file="../secret", at=0),
        lambda entry: entry["parts"][0].update(file=str(secret), at=0),
        lambda entry: entry["parts"][0].update(file="training.pt"),
        lambda entry: entry["parts"][0].update(at=10**9),
        lambda entry: entry["parts"][0].update(at=-3),
        lambda entry: entry["parts"][0].update(bytes=11),
        lambda entry: entry["parts"][0].update(size=[2], bytes=4),
        lambda entry: entry.update(parts=[]),
        lambda entry: entry.update(dtype="load"),
        lambda entry: entry.update(size=[-5]),
        lambda entry: entry.update(parts=[*entry["parts"], *entry["parts"]]),
    ):
        with_index(change)
        with pytest.raises(DamagedError):
            checkpoint.load_weights(path)


def as_before(trainer: Trainer, folder: Path) -> None:
    """Write a checkpoint as versions without shards did."""
    folder.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in trainer.carried.state_dict().items()},
        folder / "model.safetensors",
    )
    values = {"step": trainer.step, "optimizer": trainer.optimizer.state_dict(), "loader": trainer.loader.state_dict()}
    guard = {"skipped": 0, "seen": 3, "mean": 1.0}
    torch.save({**values, "guard": guard}, folder / "training.pt")


def test_checkpoints_of_earlier_versions(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run goes on from one, its model is exported, and another run begins with it."""
    config = tiny(ema=0.5, eval_every=0)
    train(tiny(ema=0.5, eval_every=0, run=tmp_path / "whole"))
    monkeypatch.setattr(Trainer, "save", lambda self, folder, **more: as_before(self, folder / f"step-{self.step:08d}"))
    train(tiny(ema=0.5, eval_every=0))
    monkeypatch.undo()
    run, folder = config.folder, RunFolder(resumed(config))
    assert list(checkpoint.steps_in(folder.checkpoints)) == [3, 6, 9, 12]
    whole, before = (
        checkpoint.load(tmp_path / "whole/checkpoints/step-00000012")[0],
        checkpoint.load_weights(run / "checkpoints/step-00000012"),
    )
    assert whole.keys() == before.keys() and all(torch.equal(whole[name], before[name]) for name in whole)
    out, other = export(run, tmp_path / "out"), export(tmp_path / "whole", tmp_path / "other")
    assert (out / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    damage(run / "checkpoints/step-00000012/model.safetensors", "cut")
    damage(run / "checkpoints/step-00000009/training.pt", "empty")
    found = train(resumed(config)).folder
    said = [record["message"] for record in found.records("warning")]
    assert [message.partition("/checkpoints/")[2].partition(" is damaged")[0] for message in said] == [
        "step-00000012/model.safetensors", "step-00000009/training.pt",
    ]  # fmt: skip
    assert_same_end(run, tmp_path / "whole")


def test_names_do_not_show_how_a_module_is_wrapped(tmp_path: Path) -> None:
    plain = nn.ModuleDict({"model": Toy(), "twin": nn.ModuleDict({"module": Toy()})})
    wrapped = nn.ModuleDict({"model": torch.compile(plain["model"]), "twin": plain["twin"]})  # type: ignore[dict-item]
    assert list(wrapped.state_dict()) != list(plain.state_dict())
    assert list(checkpoint.weights_of(wrapped)) == list(plain.state_dict())
    nested = torch.compile(nn.Sequential(torch.compile(nn.Linear(2, 2))))
    assert isinstance(nested, nn.Module)
    assert list(checkpoint.weights_of(nested)) == ["0.weight", "0.bias"]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    for p in plain.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    path = checkpoint.save(tmp_path, 1, wrapped, optimizer, keep=1)
    assert "twin.module.scale.momentum_buffer" in checkpoint.load(path)[1]["optimizer"]["tensors"]
    checkpoint.load_into(path, plain, torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9))

    class Extra(nn.Module):
        def get_extra_state(self) -> Any:
            return {"x": 1}

    with pytest.raises(TypeError, match="module: expected tensors alone in its state, got dict as _extra_state"):
        checkpoint.save(tmp_path, 2, Extra(), keep=1)
