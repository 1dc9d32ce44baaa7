"""InfoNCELoss and SigLIPLoss equal the functions on normalised features, and their parameters behave."""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial

import named
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmkernels import FalseNegatives, infonce, siglip
from mmkernels.nn import InfoNCELoss, SigLIPLoss
from mmkernels.testing.contrastive import plain_infonce, plain_siglip

LOSSES = pytest.mark.parametrize("loss_type", [InfoNCELoss, SigLIPLoss])


def batch(dtype: torch.dtype = torch.float32, n: int = 37, e: int = 24) -> tuple[Tensor, Tensor]:
    """Rows of very different norms; a key resembles its query."""
    queries = torch.randn(n, e) * torch.logspace(-2, 2, n)[:, None]
    keys = F.normalize(queries, dim=1) + 0.2 * torch.randn(n, e)
    return queries.to(dtype), keys.to(dtype)


def run(loss_fn: nn.Module, queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    """Loss and gradients: of queries, keys, and the parameters in order."""
    leaves = [x.detach().clone().requires_grad_() for x in (queries, keys)]
    loss = loss_fn(*leaves)
    return loss.detach(), *torch.autograd.grad(loss, [*leaves, *loss_fn.parameters()])


class Spelled(nn.Module):
    """A module's computation written out, as a function of copies of its parameters."""

    def __init__(self, loss: Callable[..., Tensor], of: InfoNCELoss | SigLIPLoss) -> None:
        super().__init__()
        self.loss, self.normalize = loss, of.normalize
        self.scalars = nn.ParameterList([nn.Parameter(x.detach().clone()) for x in of.parameters()])

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        if self.normalize:
            wide = torch.promote_types(queries.dtype, torch.float32)
            queries, keys = (F.normalize(x.to(wide), dim=1).to(x.dtype) for x in (queries, keys))
        log_scale, *bias = self.scalars
        return self.loss(queries, keys, log_scale.exp(), *bias)


@pytest.mark.parametrize("normalize", [True, False])
@LOSSES
def test_equals_plain_pytorch(loss_type: type, normalize: bool) -> None:
    """In float64, so that only the formula matters; the parameters and their gradients are float32."""
    loss_fn = loss_type(normalize=normalize)
    plain = Spelled(plain_infonce if loss_type is InfoNCELoss else plain_siglip, loss_fn)
    inputs = batch(torch.float64)
    for i, (ours, expected) in enumerate(zip(run(loss_fn, *inputs), run(plain, *inputs), strict=True)):
        torch.testing.assert_close(ours, expected, rtol=1e-6 if i > 2 else 1e-9, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
@LOSSES
def test_is_the_function_bit_for_bit(loss_type: type, normalize: bool) -> None:
    loss_fn = loss_type(normalize=normalize)
    function = Spelled(infonce if loss_type is InfoNCELoss else siglip, loss_fn)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = batch(dtype)
        for ours, expected in zip(run(loss_fn, *inputs), run(function, *inputs), strict=True):
            assert ours.dtype == expected.dtype
            assert torch.equal(ours, expected)


def test_initial_parameters() -> None:
    clip, sigmoid = InfoNCELoss(), SigLIPLoss()
    assert clip.scale.item() == pytest.approx(1 / 0.07)
    assert clip.max_scale == 100.0
    assert sigmoid.scale.item() == pytest.approx(10.0)
    assert sigmoid.logit_bias.item() == -10.0
    assert sigmoid.max_scale is None
    assert all(p.dtype == torch.float32 and p.shape == () for m in (clip, sigmoid) for p in m.parameters())


@LOSSES
def test_normalizes_in_float32(loss_type: type) -> None:
    """In float16 the squares of these entries would overflow or underflow."""
    queries = torch.randn(16, 32)
    loss_fn = loss_type()
    expected = loss_fn(queries.half(), queries.half())
    torch.testing.assert_close(loss_fn((queries * 2000).half(), (queries / 64).half()), expected, rtol=1e-2, atol=1e-3)


@LOSSES
def test_zero_row_is_no_nan(loss_type: type) -> None:
    queries, keys = batch()
    queries[3] = 0
    assert all(torch.isfinite(x).all() for x in run(loss_type(), queries, keys))


@LOSSES
def test_scale_is_bounded_and_can_come_back(loss_type: type) -> None:
    queries, keys = batch()
    loss_fn = loss_type(max_scale=20.0)
    at_bound = loss_type(init_scale=20.0, max_scale=20.0)
    with torch.no_grad():
        loss_fn.log_scale.fill_(math.log(500.0))
    assert loss_fn.scale.item() == pytest.approx(20.0)
    for beyond, expected in zip(run(loss_fn, queries, keys), run(at_bound, queries, keys), strict=True):
        torch.testing.assert_close(beyond, expected, rtol=1e-4, atol=1e-6)
    assert run(loss_fn, queries, keys)[3] != 0


@LOSSES
def test_clamp(loss_type: type) -> None:
    loss_fn = loss_type(max_scale=20.0)
    before = loss_fn.log_scale.item()
    loss_fn.clamp_()
    assert loss_fn.log_scale.item() == before
    with torch.no_grad():
        loss_fn.log_scale.fill_(9.0)
    loss_fn.clamp_()
    assert loss_fn.log_scale.item() == pytest.approx(math.log(20.0))
    assert loss_fn.log_scale.requires_grad

    unbounded = loss_type(max_scale=None)
    with torch.no_grad():
        unbounded.log_scale.fill_(9.0)
    unbounded.clamp_()
    assert unbounded.scale.item() == pytest.approx(math.exp(9.0))


@LOSSES
def test_a_step_of_the_optimizer_lowers_the_loss(loss_type: type) -> None:
    queries, keys = batch()
    loss_fn = loss_type()
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=1e-3)
    before = loss_fn(queries, keys)
    before.backward()
    assert loss_fn.log_scale.grad != 0
    optimizer.step()
    assert loss_fn(queries, keys) < before


@LOSSES
def test_state_dict_roundtrip(loss_type: type) -> None:
    source, target = loss_type(init_scale=33.0), loss_type()
    names = {"log_scale"} | ({"logit_bias"} if loss_type is SigLIPLoss else set())
    assert set(source.state_dict()) == names
    target.load_state_dict(source.state_dict())
    queries, keys = batch()
    assert torch.equal(target(queries, keys), source(queries, keys))


@LOSSES
def test_scale_that_is_not_learnt(loss_type: type) -> None:
    fixed, learnt = loss_type(learnable=False, max_scale=20.0), loss_type(max_scale=20.0)
    assert list(fixed.parameters()) == []
    assert fixed.state_dict().keys() == learnt.state_dict().keys()
    assert "learnable=False" in repr(fixed)
    queries, keys = batch()
    loss = fixed(queries.requires_grad_(), keys)
    assert torch.equal(loss, learnt(queries, keys))
    loss.backward()
    assert fixed.log_scale.grad is None
    with torch.no_grad():
        learnt.log_scale.fill_(9.0)
    fixed.load_state_dict(learnt.state_dict())
    fixed.clamp_()
    assert fixed.log_scale.item() == pytest.approx(math.log(20.0))
    assert fixed.double().scale.dtype == torch.float64


def trained(cast: Callable[[nn.Module], nn.Module], loss_type: type, steps: int = 200) -> list[float]:
    """The scalars after some steps of Adam, for a frozen tower and the loss in one module that is cast as a whole."""
    torch.manual_seed(0)
    model = cast(nn.ModuleDict({"tower": nn.Linear(24, 24, bias=False).requires_grad_(False), "loss": loss_type()}))
    optimizer = torch.optim.Adam(model["loss"].parameters(), lr=1e-3)
    queries, keys = batch()
    dtype = model["tower"].weight.dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model["loss"](model["tower"](queries.to(dtype)), model["tower"](keys.to(dtype))).backward()
        optimizer.step()
    return [p.item() for p in model["loss"].parameters()]


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.bfloat16, nn.Module.half])
@LOSSES
def test_scalars_learn_in_half_precision(loss_type: type, cast: Callable[[nn.Module], nn.Module]) -> None:
    begun = [p.item() for p in loss_type().parameters()]
    expected, got = trained(nn.Module.float, loss_type), trained(cast, loss_type)
    for start, full, low in zip(begun, expected, got, strict=True):
        assert abs(full - start) > 0.1
        assert low == pytest.approx(full, abs=0.02 * abs(full - start))


@pytest.mark.parametrize("learnable", [True, False])
@LOSSES
def test_casts_leave_the_scalars_wide(loss_type: type, learnable: bool) -> None:
    loss_fn = loss_type(learnable=learnable, init_scale=14.3)
    if learnable:
        loss_fn(*batch()).backward()
    wide = [torch.float32] * len(loss_fn.state_dict())

    def scalars() -> list[Tensor]:
        return [*loss_fn.parameters(), *loss_fn.buffers()]

    before = [(x.clone(), None if x.grad is None else x.grad.clone()) for x in scalars()]
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().half()):
        loss_fn = cast(loss_fn)
        for x, (value, grad) in zip(scalars(), before, strict=True):
            assert x.dtype == torch.float32
            assert torch.equal(x, value)
            assert grad is None or (x.grad.dtype == torch.float32 and torch.equal(x.grad, grad))
    assert [x.dtype for x in copy.deepcopy(loss_fn).half().state_dict().values()] == wide
    assert all(x.dtype == torch.float64 for x in loss_fn.double().state_dict().values())
    moved = loss_fn.to("meta", torch.bfloat16).state_dict().values()
    assert [x.dtype for x in moved] == wide and all(x.is_meta for x in moved)


@pytest.mark.parametrize("assign", [True, False])
@LOSSES
def test_a_checkpoint_in_half_precision(loss_type: type, assign: bool) -> None:
    low = {name: x.bfloat16() for name, x in loss_type(init_scale=33.0).state_dict().items()}
    loss_fn = loss_type()
    loss_fn.load_state_dict(low, assign=assign)
    for name, x in loss_fn.state_dict().items():
        assert x.dtype == torch.float32
        assert torch.equal(x, low[name].float())
    assert all(x.dtype == torch.bfloat16 for x in low.values()), "the caller's own"


@pytest.mark.parametrize("learnable", [True, False])
@LOSSES
def test_from_the_meta_device(loss_type: type, learnable: bool) -> None:
    loss_fn = loss_type(init_scale=12.0, learnable=learnable)
    expected = {name: x.clone() for name, x in loss_fn.state_dict().items()}
    loss_fn = loss_fn.to("meta").to_empty(device="cpu")
    with torch.no_grad():
        for x in loss_fn.state_dict().values():
            x.fill_(math.nan)
    loss_fn.reset_parameters()
    assert all(torch.equal(x, expected[name]) for name, x in loss_fn.state_dict().items())
    assert all(p.requires_grad and p.is_leaf for p in loss_fn.parameters())


@LOSSES
def test_deterministic_is_deprecated(loss_type: type) -> None:
    queries, keys = batch()
    with pytest.warns(DeprecationWarning, match="deterministic is deprecated: results are always") as warned:
        loss_fn = loss_type(deterministic=True)
    with pytest.warns(DeprecationWarning, match="deterministic is deprecated") as again:
        loss_fn(queries, keys, deterministic=False)
    assert {w.filename for w in (*warned, *again)} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(queries, keys)
        loss_type(deterministic=None)(queries, keys, deterministic=None)


def test_every_feature_is_normalized(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negatives and the teacher's features are normalised like queries and keys, and only when asked."""
    seen = {}
    loss_fn, unnormalized = InfoNCELoss(), InfoNCELoss(normalize=False)
    monkeypatch.setattr("mmkernels.nn.contrastive.infonce", lambda *features, **options: seen.update(options))
    features = {"negatives": 3 * torch.randn(5, 8), "teacher": (torch.randn(4, 8), torch.randn(4, 8), 0.4)}
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    loss_fn(x, y, **features, label_smoothing=0.1)
    assert torch.equal(seen["negatives"], F.normalize(features["negatives"], dim=1))
    assert all(
        torch.equal(a, F.normalize(b, dim=1)) for a, b in zip(seen["teacher"][:2], features["teacher"][:2], strict=True)
    )
    assert (seen["teacher"][2], seen["label_smoothing"]) == (0.4, 0.1)
    unnormalized(x, y, **features)
    assert seen["negatives"] is features["negatives"]
    loss_fn(x, y, teacher="a string")
    assert seen["teacher"] == "a string", "for the function to refuse"
    guide = FalseNegatives(3 * torch.randn(4, 5), 3 * torch.randn(4, 5), 0.1, "relative")
    loss_fn(x, y, false_negatives=guide)
    for got, given in zip(seen["false_negatives"][:2], guide[:2], strict=True):
        assert torch.equal(got, F.normalize(given, dim=1))
    assert seen["false_negatives"][2:] == (0.1, "relative", None)
    own = 3 * torch.randn(4, 2, 8)
    loss_fn(x, y, negatives=own)
    assert torch.equal(seen["negatives"], F.normalize(own, dim=2))


@LOSSES
def test_options_reach_the_function(loss_type: type) -> None:
    queries, keys = batch()
    assert "backend='reference'" in repr(loss_type(backend="reference"))
    with pytest.raises(ValueError, match="backend: expected None or one of"):
        loss_type(backend="nowhere")(queries, keys)
    with pytest.raises(ValueError, match="backend: expected None or one of"):
        loss_type(backend="reference")(queries, keys, backend="nowhere")
    loss_type(backend="nowhere")(queries, keys, backend="reference")
    with pytest.raises(ValueError, match="group: expected None, or a process group"):
        loss_type()(queries, keys, group="everyone")


BAD_ARGUMENTS = (
    ({"init_scale": -1.0}, ValueError, "init_scale: expected a positive number, got -1.0"),
    ({"init_scale": 0}, ValueError, "init_scale: expected a positive number, got 0"),
    ({"init_scale": math.nan}, ValueError, "init_scale: expected a finite number"),
    ({"init_scale": "1"}, TypeError, "init_scale: expected a number, got '1' \\(str\\)"),
    ({"init_scale": 50.0, "max_scale": 20.0}, ValueError, "max_scale: expected None or at least"),
    ({"max_scale": 0.0}, ValueError, "max_scale: expected a positive number"),
    ({"normalize": "l2"}, TypeError, "normalize: expected True or False, got 'l2'"),
    ({"learnable": "no"}, TypeError, "learnable: expected True or False, got 'no'"),
    ({"temperature": 0.1}, TypeError, "temperature: expected one of .*backend"),
)


@LOSSES
def test_bad_argument(loss_type: type) -> None:
    named.mistakes(*((partial(loss_type, **arguments), *expected) for arguments, *expected in BAD_ARGUMENTS))


def test_bad_bias() -> None:
    named.mistakes(
        (lambda: SigLIPLoss(init_bias=math.inf), ValueError, "init_bias: expected a finite number, got inf"),
        (lambda: SigLIPLoss(init_bias=None), TypeError, "init_bias: expected a number"),
    )


@LOSSES
def test_bad_batch(loss_type: type) -> None:
    queries, keys = batch()
    matrix = r"queries: expected \[N, E\] floating point"
    for normalize in (True, False):
        loss_fn = loss_type(normalize=normalize)
        with named.case(f"normalize={normalize}"):
            named.mistakes(
                (partial(loss_fn, queries[0], keys), ValueError, rf"{matrix}, got \[24\]"),
                (partial(loss_fn, queries.long(), keys), TypeError, rf"{matrix}, got \[37, 24\] int64"),
                (partial(loss_fn, [1.0], keys), TypeError, rf"{matrix}, got \[1.0\]"),
                (partial(loss_fn, queries, keys[:-1]), ValueError, "keys: expected"),
                (partial(loss_fn, queries, keys, temperature=0.1), TypeError, "temperature: expected one of"),
            )
