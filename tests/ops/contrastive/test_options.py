"""InfoNCE and SigLIP with their options against the loss written out, on each backend and under torch.compile."""

import functools

import backends
import named
import pytest
import torch
import torch.nn.functional as F
from ops.contrastive.shared import IDS, E, N, inputs_of, rows
from torch import Tensor

from mmkernels import infonce, siglip
from mmkernels.ops.contrastive import chunks
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import loss_and_gradients, plain_infonce_options

backend = backends.fixture("contrastive")


WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(4))
SHUFFLED = torch.randperm(N, generator=torch.Generator().manual_seed(5))
TEACHER = rows(N, 24, 6), rows(N, 24, 7)
SURE = rows(N, 70, 8), F.normalize(rows(N, 70, 9) + 2 * rows(N, 70, 8), dim=1)  # each row's mass is on its own key
OWN = rows(N * 7, E, 8).view(N, 7, E)

# name -> (number of keys, options); features among the options are cast to the dtype of the case
OPTIONS = {
    "targets": (N, dict(targets=SHUFFLED)),
    "one way": (N, dict(symmetric=False)),
    "more keys": (2 * N + 5, dict(symmetric=False)),
    "fewer keys": (50, dict(symmetric=False, targets=torch.arange(N) % 50)),
    "ids": (N, dict(query_ids=IDS)),
    "ids of more keys": (2 * N, dict(query_ids=IDS, key_ids=torch.cat([IDS, IDS.flip(0)]))),
    "ids, huge and negative": (N, dict(query_ids=IDS * (2**50) - 2**40)),
    "ignored": (N, dict(query_ids=IDS, same_id="ignore")),
    "ignored, shuffled": (N, dict(query_ids=IDS, key_ids=IDS.flip(0), same_id="ignore", targets=SHUFFLED)),
    "negatives": (N, dict(negatives=rows(70, E, 8))),
    "own negatives": (N, dict(negatives=OWN)),
    "own negatives, everything": (
        N,
        dict(
            negatives=OWN,
            query_ids=IDS,
            same_id="ignore",
            label_smoothing=0.1,
            weights=WEIGHTS,
            teacher=(*TEACHER, 0.4),
        ),
    ),
    "decoupled": (N, dict(decoupled=True)),
    "decoupled, shuffled": (N, dict(decoupled=True, targets=SHUFFLED, weights=WEIGHTS)),
    "decoupled, one way": (2 * N + 5, dict(decoupled=True, symmetric=False, negatives=OWN)),
    "decoupled, ids": (N, dict(decoupled=True, query_ids=IDS)),
    "decoupled, ignored": (N, dict(decoupled=True, query_ids=IDS, same_id="ignore", negatives=rows(70, E, 8))),
    "decoupled, everything": (
        N,
        dict(
            decoupled=True,
            query_ids=IDS,
            same_id="ignore",
            negatives=OWN,
            label_smoothing=0.1,
            weights=WEIGHTS,
            teacher=(*TEACHER, 0.4),
        ),
    ),
    "hardness": (N, dict(hardness=9.0)),
    "hardness, shuffled": (N, dict(hardness=3.0, targets=SHUFFLED, weights=WEIGHTS)),
    "hardness, more keys": (2 * N + 5, dict(hardness=5.0, symmetric=False, negatives=rows(70, E, 8))),
    "hardness, ignored": (N, dict(hardness=9.0, query_ids=IDS, same_id="ignore", negatives=OWN)),
    "hardness, decoupled": (N, dict(hardness=9.0, decoupled=True)),
    "hardness, everything": (
        N,
        dict(
            hardness=2.0,
            query_ids=IDS,
            same_id="ignore",
            negatives=rows(70, E, 8),
            label_smoothing=0.1,
            weights=WEIGHTS,
            teacher=(*TEACHER, 0.4),
        ),
    ),
    "smoothing": (N, dict(label_smoothing=0.1)),
    "smoothing, ignored": (N, dict(label_smoothing=0.3, query_ids=IDS, same_id="ignore")),
    "weights": (N, dict(weights=WEIGHTS)),
    "weights, shuffled": (N, dict(weights=WEIGHTS, targets=SHUFFLED)),
    "teacher": (N, dict(teacher=(*TEACHER, 0.4))),
    "teacher, sure": (N, dict(teacher=(*SURE, 0.7))),
    "all": (
        N,
        dict(
            query_ids=IDS,
            same_id="ignore",
            negatives=rows(70, E, 8),
            label_smoothing=0.1,
            weights=WEIGHTS,
            teacher=(*TEACHER, 0.4),
        ),
    ),
    "all, ids": (N, dict(query_ids=IDS, negatives=rows(9, E, 8), label_smoothing=0.2, teacher=(*TEACHER, 1.0))),
}


HARDER = "hardness", "hardness, ignored", "hardness, more keys"


def cast(options, dtype):
    def converted(value):
        if isinstance(value, tuple):
            return tuple(converted(v) for v in value)
        matrix = isinstance(value, Tensor) and value.ndim >= 2
        return value.to(dtype) if matrix else value

    return {name: converted(value) for name, value in options.items()}


def to_device(value, device):
    if isinstance(value, dict):
        return {name: to_device(v, device) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def terms_of(x, y, scale):
    """Sums of absolute terms, each of which may lose a rounding in any order of summation: the rows' lse, and their
    means."""
    similarity = x.double() @ y.double().T
    logits = scale.double() * similarity
    return logits.logsumexp(1).abs().mean(), None, None, (logits.softmax(1) * similarity.abs()).sum(1).mean()


def judge(name, dtype, backend, device="cpu", seeds=4):
    """As accurate as plain PyTorch in the same dtype, several draws together."""
    backends.need("contrastive", backend, dtype, device)
    m, options = OPTIONS[name]
    options = to_device(options, device)
    ours = functools.partial(infonce, backend=backend, **cast(options, dtype))
    plain = functools.partial(plain_infonce_options, **cast(options, dtype))
    wide = functools.partial(plain_infonce_options, **cast(cast(options, dtype), torch.float64))
    results = []
    for seed in range(seeds):
        inputs = [x.to(device) for x in inputs_of(m, dtype, seed)]
        truth = loss_and_gradients(wide, *(x.double() for x in inputs))
        mine, theirs = loss_and_gradients(ours, *inputs), loss_and_gradients(plain, *inputs)
        results.append((mine, theirs, truth, terms_of(*inputs)))
    for i, what in enumerate(("loss", "queries", "keys", "logit_scale")):
        got, expected, true = (torch.stack([draw[who][i] for draw in results]) for who in range(3))
        terms = None if true.ndim > 1 else torch.stack([draw[3][i] for draw in results])
        assert_as_accurate(f"{name}: {what}", got, expected, true, terms=terms)


LOW = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_native(dtype):
    for name in OPTIONS:
        with named.case(name):
            judge(name, dtype, "native")


# Each path through Triton's kernels; test_contrastive_triton.py checks every rule against the oracle. The interpreter
# is slow: each path in one dtype, and in float32 those where the loss itself rounds.
ROADS = (
    *("targets", "more keys", "ids of more keys", "ignored, shuffled", "negatives", "teacher", "all", "all, ids"),
    *("decoupled, shuffled", "decoupled, ids", "decoupled, everything", "hardness, shuffled", "hardness, everything"),
    *("ids, huge and negative", "fewer keys", "weights, shuffled"),
)
INTERPRETED = {(name, LOW[i % 3]): None for i, name in enumerate(ROADS)}
INTERPRETED |= {(name, torch.float32): None for name in ("ids", "teacher, sure", "all, ids")}


@pytest.mark.parametrize(("name", "dtype"), list(INTERPRETED), ids=str)
def test_triton_interpreted(name, dtype):
    judge(name, dtype, "triton", seeds=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_triton_on_a_gpu(name, dtype):
    judge(name, dtype, "triton", "cuda")


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_float64_is_the_oracle(backend):
    backends.need("contrastive", backend, torch.float64)
    for name, (m, options) in OPTIONS.items():
        inputs = inputs_of(m, torch.float64)
        ours = loss_and_gradients(functools.partial(infonce, backend=backend, **options), *inputs)
        truth = loss_and_gradients(functools.partial(plain_infonce_options, **options), *inputs)
        for what, got, expected in zip(("loss", "queries", "keys", "scale"), ours, truth, strict=True):
            torch.testing.assert_close(
                got, expected, rtol=1e-10, atol=1e-13, msg=lambda m, of=f"{name}: {what}": f"{of}: {m}"
            )


def test_scalars_without_an_allowance(backend):
    """The loss and the scale's gradient over many draws: an error that all rows share, such as that of a rounded scale,
    or of terms that are rounded before they cancel, hides in the comparator's epsilons."""
    for name in ("one way", "ids", "negatives", "own negatives", "teacher, sure", "weights", "decoupled, ids", *HARDER):
        m, options = OPTIONS[name]
        options = cast(options, torch.float32)
        ours, plain = functools.partial(infonce, backend=backend, **options), plain_infonce_options
        wide = functools.partial(plain, **cast(options, torch.float64))
        draws = []
        for seed in range(6 if backends.interpreted(backend) else 24):
            x, y, scale = inputs_of(m, torch.float32, seed)
            losses = functools.partial(ours, x, y), functools.partial(plain, x, y, **options)
            truth = loss_and_gradients(functools.partial(wide, x.double(), y.double()), scale.double())
            draws.append([*(loss_and_gradients(loss, scale) for loss in losses), truth])
        for i, (what, most) in enumerate({"loss": 1.6, "scale": 1.0}.items()):  # the loss is close to its own rounding
            three = [torch.stack([draw[who][i] for draw in draws]) for who in range(3)]
            with named.case(name, what):
                assert assert_as_accurate(what, *three).ratio < most


def test_smoothing_is_that_of_cross_entropy(backend):
    x, y, scale = inputs_of(N, torch.float32)
    expected = F.cross_entropy(scale * x @ y.T, torch.arange(N), label_smoothing=0.25)
    got = infonce(x, y, scale, symmetric=False, label_smoothing=0.25, backend=backend)
    torch.testing.assert_close(got, expected)


def plain_siglip_ids(x, y, scale, bias, query_ids, key_ids):
    logits = scale * x @ y.T + bias
    signs = torch.where(query_ids[:, None] == key_ids, 1.0, -1.0).to(logits.dtype)
    return -F.logsigmoid(signs * logits).sum() / len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_siglip_ids(dtype, backend):
    backends.need("contrastive", backend, dtype)
    m, key_ids = N + 30, torch.cat([IDS, torch.arange(30)])
    ids = dict(query_ids=IDS, key_ids=key_ids)
    x, y, scale = inputs_of(m, dtype)
    inputs = (x, y, scale, torch.tensor(-8.0, dtype=scale.dtype))
    got, plain = (
        loss_and_gradients(functools.partial(f, **ids), *inputs)
        for f in (functools.partial(siglip, backend=backend), plain_siglip_ids)
    )
    truth = loss_and_gradients(functools.partial(plain_siglip_ids, **ids), *(t.double() for t in inputs))
    if dtype == torch.float64:
        for ours, oracle in zip(got, truth, strict=True):
            torch.testing.assert_close(ours, oracle, rtol=1e-11, atol=1e-14)
        return
    for what, *three in zip(("loss", "queries", "keys", "scale", "bias"), got, plain, truth, strict=True):
        assert_as_accurate(what, *three)


@pytest.mark.parametrize("name", ["all", "all, ids", "more keys", "siglip"])
def test_oracle_in_chunks_is_the_oracle(name, monkeypatch):
    m, options = OPTIONS.get(name, (N, dict(logit_bias=-3.0, query_ids=IDS)))
    loss = functools.partial(siglip if name == "siglip" else infonce, backend="reference", **options)
    whole = loss_and_gradients(loss, *inputs_of(m, torch.float64))
    monkeypatch.setattr(chunks, "LOGITS", 17 * m)
    for got, want in zip(loss_and_gradients(loss, *inputs_of(m, torch.float64)), whole, strict=True):
        torch.testing.assert_close(got, want)


def test_compiled_whole_and_functorch(backend):
    for name in ("all", "all, ids", "decoupled, ids", "hardness, everything"):
        m, options = OPTIONS[name]
        loss = functools.partial(infonce, backend=backend, **cast(options, torch.float32))
        inputs = inputs_of(m, torch.float32)
        expected = loss_and_gradients(loss, *inputs)
        torch.compiler.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        with named.case(name, "compiled"):
            for got, want in zip(loss_and_gradients(compiled, *inputs), expected, strict=True):
                torch.testing.assert_close(got, want)
        with named.case(name, "torch.func"):
            for got, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), expected[1:], strict=True):
                torch.testing.assert_close(got, want)


def test_opcheck(backend):
    x, y, scale = (t.requires_grad_() for t in inputs_of(N + 4, torch.float32))
    ids = IDS, torch.cat([IDS, IDS[:4]])
    args = (x, y, scale, None, *ids, "positive", *(None,) * 7, 0.0, True, True, backend)
    torch.library.opcheck(torch.ops.mmkernels.contrastive_softmax_fwd.default, args)
    bias = torch.tensor(-3.0, requires_grad=True)
    torch.library.opcheck(
        torch.ops.mmkernels.contrastive_sigmoid_fwd.default, (x, y, scale, bias, None, *ids, "positive", backend)
    )
    plain = x.detach(), y.detach(), scale.detach()
    lse = torch.zeros(N, dtype=torch.float64), torch.zeros(N + 4, dtype=torch.float64)
    weights = torch.ones(4, N, dtype=torch.float64), torch.ones(4, N + 4, dtype=torch.float64)
    for mean in ((None, None), lse):
        args = (*weights, *plain, *lse, None, *ids, "ignore", *(None,) * 7, 0.0, *mean, True, False, backend)
        torch.library.opcheck(torch.ops.mmkernels.contrastive_softmax_bwd.default, args)
        for coefficients in (weights, (None, None)):
            second = (x.detach(), None, scale.detach(), *coefficients, *args[2:])
            torch.library.opcheck(torch.ops.mmkernels.contrastive_softmax_second.default, second)


def test_what_is_plain_pytorch_keeps_its_precision_under_autocast(backend):
    x, y, scale = inputs_of(N, torch.bfloat16)
    for options in (dict(negatives=OWN.bfloat16()), dict(decoupled=True), dict(hardness=2.0, negatives=OWN.bfloat16())):
        expected = infonce(x, y, scale, backend=backend, **options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(infonce(x, y, scale, backend=backend, **options), expected)


def test_no_rows_and_one_row(backend):
    for n, expected in ((0, 0.0), (1, 0.0)):
        x = torch.randn(n, E, requires_grad=True)
        options = dict(label_smoothing=0.1, query_ids=torch.arange(n), return_stats=True, backend=backend)
        loss, _ = infonce(x, x, 2.0, **options)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert torch.autograd.grad(loss, x)[0].shape == x.shape


def test_own_negatives_of_any_number(backend):
    """None, one, or so many that a row's own decide its loss."""
    x, y, scale = inputs_of(N, torch.float32)
    expected = infonce(x, y, scale, backend=backend)
    none = torch.zeros(N, 0, E, requires_grad=True)
    loss = infonce(x, y, scale, negatives=none, backend=backend)
    assert torch.equal(loss, infonce(x, y, scale, negatives=torch.zeros(0, E), backend=backend))
    torch.testing.assert_close(loss, expected)
    assert infonce(x[:0], y[:0], scale, negatives=torch.zeros(0, 3, E), backend=backend).item() == 0
    hard = (y[:, None] * 300).expand(N, 2, E).contiguous()
    loss = infonce(x, y, scale, negatives=hard, symmetric=False, backend=backend)
    logits = scale.double() * x.double() @ y.double().T
    own = 300 * logits.diagonal()[:, None].expand(N, 2)
    truth = torch.cat([logits, own], 1).logsumexp(1) - logits.diagonal()
    torch.testing.assert_close(loss.double(), truth.mean(), rtol=1e-6, atol=0)


def test_decoupled_rows_without_negatives(backend):
    """Their loss is 0, they count in the mean, and get no gradient; NaN still shows."""
    for n in (0, 1):
        x, y = (rows(n, 8, seed).float().requires_grad_() for seed in (1, 2))
        loss = infonce(x, y, torch.tensor(5.0), decoupled=True, backend=backend)
        assert loss.item() == 0
        assert not any(grad.any() for grad in torch.autograd.grad(loss, (x, y)))
    x, y = (rows(3, 8, seed).float().requires_grad_() for seed in (1, 2))
    negatives = torch.zeros(3, 1, 8)
    options = dict(same_id="positive", query_ids=torch.zeros(3).long(), decoupled=True, backend=backend)
    loss = infonce(x, y, 5.0, **options)
    assert loss.item() == 0
    assert not any(grad.any() for grad in torch.autograd.grad(loss, (x, y)))
    loss = infonce(x, y, 5.0, negatives=negatives, symmetric=False, **options)
    torch.testing.assert_close(loss, -5 * (x @ y.T).mean())
    broken = x.detach().clone()
    broken[0, 0] = torch.nan
    assert infonce(broken, y, 5.0, **options).isnan()


def test_decoupled_does_not_cancel(backend):
    """The positive has all of the mass, 1e8 times and more: the rest is not a difference."""
    x = F.normalize(rows(40, 16) + 1e-3, dim=1).float()
    scale = 200.0
    logits = scale * x.double() @ x.double().T
    eye = torch.eye(40, dtype=torch.bool)
    truth = logits.masked_fill(eye, -torch.inf).logsumexp(1) - logits.diagonal()
    assert (truth < -18).sum() > 20
    loss = infonce(x, x, scale, decoupled=True, symmetric=False, backend=backend)
    torch.testing.assert_close(loss.double(), truth.mean(), rtol=1e-5, atol=0)


def test_logits_that_overflow_float32(backend):
    """Where float64 has a finite loss, so do we."""
    x, y = rows(20, 8), rows(20, 8, 1)
    loss = infonce(x.float() * 1e15, y.float() * 1e15, torch.tensor(1e6), symmetric=False, backend=backend)
    truth = plain_infonce_options(
        (x.float() * 1e15).double(), (y.float() * 1e15).double(), torch.tensor(1e6).double(), symmetric=False
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


def test_mistakes_under_compile_are_asserted():
    torch.compiler.reset()
    x, y = torch.randn(2, 4, 8).unbind()
    loss = torch.compile(lambda t: infonce(x, y, 1.0, targets=t), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="targets: expected indices of keys"):
        loss(torch.arange(4) + 1)
