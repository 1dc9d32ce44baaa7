"""End to end: steps of the reference loop beside the same model in plain PyTorch, on the same batch; and the largest
batch that fits into a given memory, with and without gradient caching.

A step is the loop's own: forward and backward with gradient clipping, then AdamW, whose learning rate is zero, so that
all contenders keep the same weights. Losses and gradients are compared before anything is timed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import GradCache, infonce
from mmkernels.bench.case import Case, Inputs, Outputs, Params, Sample, Settings, Work
from mmkernels.bench.memory import peak_memory
from mmkernels.testing.contrastive import plain_infonce

__all__ = ["cases", "largest"]

PADDED, PACKED = "plain PyTorch, padded", "plain PyTorch, packed"
_NEEDED = ("tyro", "tqdm", "PIL", "safetensors", "tokenizers")  # of mmkernels[pretrain]
_GRADIENTS = 8  # parameters whose gradients are compared, spread over the model


def _limits(_point: Params, _name: str) -> str | None:
    lacking = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return f"needs {lacking[0]}: pip install 'mmkernels[pretrain]'" if lacking else None


# Steps of the loop


def setup(p: Params, device: torch.device) -> Inputs:
    """A trainer of the recipe with its bundled data, and one batch of its loader."""
    from mmkernels.pretrain import Config
    from mmkernels.pretrain.run_folder import RunFolder
    from mmkernels.pretrain.setup import open_source, tokenizer_for
    from mmkernels.pretrain.trainer import Trainer

    with tempfile.TemporaryDirectory() as folder:
        settings = {"batch": p["batch"], "chunk": p["batch"], "workers": 0, "tensorboard": False}
        config = Config.of(p["recipe"], run=Path(folder) / "run", **settings)
        data = open_source(config)
        trainer = Trainer(config, data, tokenizer_for(config, data, RunFolder(config)), device)
        trainer.begin()
        batch = next(trainer.loader).to(device)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    _wake(trainer.model)
    return {"trainer": trainer, "batch": batch}


def _wake(model: nn.Module) -> None:
    """Blocks start as the identity, and then their attention has no gradient to compare."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))


def step(inputs: Inputs) -> Outputs:
    """The loss, and some gradients."""
    trainer = inputs["trainer"]
    trainer.optimizer.zero_grad()
    loss = trainer.backward(inputs["batch"]).loss
    trainer.optimizer.step()
    found = [x.grad for x in trainer.parameters if x.grad is not None and x.numel() > 1]
    spread = found[:: -(-len(found) // _GRADIENTS)]
    return torch.tensor(loss), *(x.detach().clone() for x in spread)


def plain_step(padded: bool, inputs: Inputs) -> Outputs:
    from mmkernels.bench.plain_ops import plain_ops
    from mmkernels.pretrain.layers import Blocks

    with plain_ops(Blocks if padded else None):
        return step(inputs)


def _distance(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).double().norm() / expected.double().norm().clamp_min(1e-30)).item()


def check(name: str, outputs: Outputs, inputs: Inputs) -> None:
    """Each contender against the first, by the loss and by gradients."""
    expected = inputs.setdefault("expected", outputs)
    assert len(outputs) == len(expected), f"{name}: {len(outputs)} outputs, expected {len(expected)}"
    for i, (result, of) in enumerate(zip(outputs, expected, strict=True)):
        what = f"gradient {i}" if i else "the loss"
        assert _distance(result, of) <= 1e-3, f"{what} is {_distance(result, of):.1e} from the padded model's"


def figures(_: Outputs, inputs: Inputs) -> Mapping[str, float]:
    streams = [inputs["batch"][name] for name in inputs["trainer"].recipe.streams]
    lengths = [stream.cu_seqlens.diff().double() for stream in streams if hasattr(stream, "cu_seqlens")]
    used = sum(float(each.sum()) for each in lengths)
    padded = sum(float(len(each) * each.max()) for each in lengths)
    return {"tokens % of padded": 100 * used / padded} if padded else {}


def _steps() -> Case:
    def points(*sizes: tuple[str, int]) -> list[Params]:
        return [{"recipe": recipe, "batch": batch, "dtype": "float32"} for recipe, batch in sizes]

    return Case(
        name="step",
        quick=points(("clip", 64), ("vlbert", 32)),
        full=points(("clip", 256), ("vlbert", 64), ("siglip", 256), ("caption", 64)),
        setup=setup,
        ours=lambda inputs, _backend: step(inputs),
        others={PADDED: partial(plain_step, True), PACKED: partial(plain_step, False)},
        baseline=(PADDED, PACKED),
        check=check,
        work=lambda p: Work(items=p["batch"]),
        figures=figures,
        limits=_limits,
        backends=False,
    )


# The largest batch


class Tower(nn.Module):
    """A small transformer over 16 tokens a sample, in plain PyTorch: [B, 16, C] -> [B, E], normalised."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "dim_feedforward": 4 * width,
            "dropout": 0.0,
            "batch_first": True,
            "norm_first": True,
        }
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, **options) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return F.normalize(x.mean(1), dim=1)


SCALE = 14.3


def _plain(first: nn.Module, second: nn.Module, x: Tensor, y: Tensor) -> None:
    plain_infonce(first(x), second(y), SCALE).backward()


def _ours(first: nn.Module, second: nn.Module, x: Tensor, y: Tensor) -> None:
    loss: Any = infonce(first(x), second(y), torch.tensor(SCALE))
    loss.backward()


def _cached(first: nn.Module, second: nn.Module, x: Tensor, y: Tensor) -> None:
    GradCache([first, second], lambda a, b: infonce(a, b, torch.tensor(SCALE)), chunk_size=64)(x, y)


WAYS = {"plain PyTorch": _plain, "mmkernels": _ours, "mmkernels with GradCache": _cached}


def _called(way: str, batch: int) -> Callable[[], None]:
    torch.manual_seed(0)
    x, y = torch.randn(2, batch, 16, 128).unbind()
    return partial(WAYS[way], Tower(128, 2), Tower(128, 2), x, y)


def _measure(way: str, batch: int, threads: int, answers: Any) -> None:
    torch.set_num_threads(threads)
    _called(way, 64)()
    call = _called(way, batch)
    begin = time.perf_counter()
    peak = peak_memory(call, torch.device("cpu"))
    answers.send((peak, time.perf_counter() - begin))


def measured_in_child(way: str, batch: int) -> tuple[int, float]:
    """Peak bytes and seconds of a step in a fresh process.

    Raises:
        RuntimeError: the process ended without an answer.
    """
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(way, batch, torch.get_num_threads(), theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        found: tuple[int, float] = ours.recv()
    except EOFError:
        child.join()
        raise RuntimeError(f"{way}, a batch of {batch}: its process ended with {child.exitcode}") from None
    child.join()
    return found


def largest(needs: Callable[[int], int], memory: int, most: int, first: int = 128) -> int:
    """The largest batch, to an eighth, that `needs` no more than `memory` bytes, at most `most`; 0 if `first` does.

    Doubles until one is too large, which overshoots the memory by little more than its double.
    """
    fits, size = 0, first
    while size <= most and needs(size) <= memory:
        fits, size = size, 2 * size
    if fits == 0 or size > most:
        return fits
    low, high = fits, size
    while high - low > low // 8:
        middle = (low + high) // 2
        low, high = (middle, high) if needs(middle) <= memory else (low, middle)
    return low


def sample(p: Params, names: Sequence[str], settings: Settings) -> Mapping[str, Sample | str]:
    """The largest batch of each, and the seconds of its step."""
    found: dict[str, Sample | str] = {}
    for name in names:
        taken: dict[int, tuple[int, float]] = {}

        def needs(batch: int, name: str = name, taken: dict[int, tuple[int, float]] = taken) -> int:
            taken[batch] = measured_in_child(name, batch)
            return taken[batch][0]

        batch = largest(needs, p["MiB"] * 2**20, p["most"])
        if batch:
            seconds = taken[batch][1]
            found[name] = Sample([seconds], {"largest batch": batch, "samples/s": batch / seconds})
        else:
            found[name] = f"no batch of 128 fits into {p['MiB']} MiB"
    return found


def _largest() -> Case:
    return Case(
        name="largest batch",
        quick=[{"MiB": 128, "most": 1024}],
        full=[{"MiB": 512, "most": 4096}],
        setup=lambda _point, _device: {},
        ours=lambda _inputs, _backend: (),
        others={name: lambda _inputs: () for name in WAYS},
        baseline=(),
        limits=_limits,
        sample=sample,
        memory=False,
    )


def cases(settings: Settings) -> list[Case]:
    if settings.device != "cpu":
        return [_steps()]
    return [_steps(), _largest()]
