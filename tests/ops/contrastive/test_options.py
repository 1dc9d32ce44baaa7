"""InfoNCE and SigLIP with their options: against the written-out loss, the statistics, and a user's mistakes."""

import functools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import BackendError, ContrastiveStats, infonce, siglip
from mmkernels.ops.contrastive import api, chunks, op
from mmkernels.ops.contrastive.types import LSE, MEAN, POSITIVE, TOTAL, Need, Pairs
from mmkernels.runtime.backends import candidates, resolve
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import loss_and_gradients, plain_infonce_options

N, E = 111, 40


def served(backend: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
    reason = candidates("contrastive", torch.device(device), dtype)[backend]
    if reason is not None:
        pytest.skip(reason)
    return backend


@pytest.fixture(params=["native", "triton", "reference"])
def backend(request) -> str:
    return served(request.param)


@pytest.fixture
def widest(backend) -> torch.dtype:
    """The widest type that a backend takes."""
    return torch.float32 if backend == "triton" else torch.float64


def rows(n, e=E, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, e, generator=generator, dtype=torch.float64), dim=1)


IDS = torch.randint(0, 40, (N,), generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.rand(N, generator=torch.Generator().manual_seed(4))
SHUFFLED = torch.randperm(N, generator=torch.Generator().manual_seed(5))
TEACHER = rows(N, 24, 6), rows(N, 24, 7)
SURE = rows(N, 70, 8), F.normalize(rows(N, 70, 9) + 2 * rows(N, 70, 8), dim=1)  # each row's mass on its own key

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


def cast(options, dtype):
    def converted(value):
        if isinstance(value, tuple):
            return tuple(converted(v) for v in value)
        matrix = isinstance(value, Tensor) and value.ndim == 2
        return value.to(dtype) if matrix else value

    return {name: converted(value) for name, value in options.items()}


def to_device(value, device):
    if isinstance(value, dict):
        return {name: to_device(v, device) for name, v in value.items()}
    if isinstance(value, tuple):
        return tuple(to_device(v, device) for v in value)
    return value.to(device) if isinstance(value, Tensor) else value


def inputs_of(m, dtype, seed=0):
    x = rows(N, E, 10 + seed)
    y = F.normalize(rows(m, E, 20 + seed) + (x if m == N else 0), dim=1)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return x.to(dtype), y.to(dtype), torch.tensor(14.3, dtype=wide)


def terms_of(x, y, scale):
    """Sums of absolute terms, of which any order of summation may lose a rounding: the rows' lse, and their means."""
    similarity = x.double() @ y.double().T
    logits = scale.double() * similarity
    return logits.logsumexp(1).abs().mean(), None, None, (logits.softmax(1) * similarity.abs()).sum(1).mean()


def judge(name, dtype, backend, device="cpu", seeds=4):
    """As accurate as plain PyTorch in the same dtype, several draws together."""
    served(backend, dtype, device)
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
@pytest.mark.parametrize("name", OPTIONS)
def test_as_accurate_as_plain_pytorch(name, dtype):
    judge(name, dtype, "native")


# The interpreter takes seconds a case: each in one type, and in float32 those whose rounding is the loss's own.
INTERPRETED = {(name, LOW[i % 3]): None for i, name in enumerate(OPTIONS)}
INTERPRETED |= {(name, torch.float32): None for name in ("ids", "teacher", "teacher, sure", "all, ids")}


@pytest.mark.parametrize(("name", "dtype"), list(INTERPRETED), ids=str)
def test_triton_interpreted(name, dtype):
    judge(name, dtype, "triton", seeds=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_triton_on_a_gpu(name, dtype):
    judge(name, dtype, "triton", "cuda")


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", OPTIONS)
def test_float64_is_the_oracle(name, backend):
    served(backend)
    m, options = OPTIONS[name]
    inputs = inputs_of(m, torch.float64)
    ours = loss_and_gradients(functools.partial(infonce, backend=backend, **options), *inputs)
    for got, truth in zip(
        ours, loss_and_gradients(functools.partial(plain_infonce_options, **options), *inputs), strict=True
    ):
        torch.testing.assert_close(got, truth, rtol=1e-10, atol=1e-13)


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
    served(backend, dtype)
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


def test_statistics(backend, widest):
    x, y, scale = inputs_of(N, widest)
    negatives = rows(30, E, 8).to(widest)
    loss, stats = infonce(x, y, scale, negatives=negatives, return_stats=True, backend=backend)
    assert isinstance(stats, ContrastiveStats)
    logits, wide = scale * x @ y.T, scale * x @ torch.cat([y, negatives]).T
    labels, off = torch.arange(N), ~torch.eye(N, dtype=torch.bool)
    torch.testing.assert_close(loss, infonce(x, y, scale, negatives=negatives, backend=backend))
    torch.testing.assert_close(stats.lse_q, wide.logsumexp(1))
    torch.testing.assert_close(stats.lse_k, logits.logsumexp(0))
    torch.testing.assert_close(stats.accuracy_q, (wide.argmax(1) == labels).to(widest).mean())
    torch.testing.assert_close(stats.accuracy_k, (logits.argmax(0) == labels).to(widest).mean())
    torch.testing.assert_close(stats.positive, (logits / scale).diagonal().mean())
    torch.testing.assert_close(stats.negative, (logits / scale)[off].mean())
    entropies = (-(s.softmax(1) * s.log_softmax(1)).sum(1).mean() for s in (wide, logits.T))
    torch.testing.assert_close(stats.entropy, sum(entropies) / 2)
    assert not any(value.requires_grad for value in stats)


@pytest.mark.parametrize("same_id", ["positive", "ignore"])
def test_statistics_with_ids(backend, same_id):
    x, y, scale = inputs_of(N, torch.float32)
    _, stats = infonce(x, y, scale, query_ids=IDS, same_id=same_id, return_stats=True, backend=backend)
    similarity, same = x @ y.T, IDS[:, None] == IDS
    negatives = similarity[~same]
    torch.testing.assert_close(stats.negative, negatives.mean(), rtol=1e-5, atol=1e-6)
    positives = similarity[same] if same_id == "positive" else similarity.diagonal()
    torch.testing.assert_close(stats.positive, positives.mean())
    assert stats.lse_q.dtype == torch.float32


def test_statistics_of_siglip(backend):
    x, y, scale = inputs_of(N, torch.float32)
    loss, stats = siglip(x, y, scale, -5.0, return_stats=True, backend=backend)
    torch.testing.assert_close(loss, siglip(x, y, scale, -5.0, backend=backend))
    torch.testing.assert_close(stats.lse_q, (scale * x @ y.T - 5).logsumexp(1))
    torch.testing.assert_close(stats.accuracy_q, ((x @ y.T).argmax(1) == torch.arange(N)).float().mean())


def tolerance(dtype):
    """Of sums in another order."""
    return dict(rtol=1e-5, atol=2e-6) if dtype == torch.float32 else {}


def statistics(x, y, scale, targets, backend="native", columns=True):
    return op.softmax_fwd(x, y, scale, Pairs(targets), None, True, columns, backend)


def test_parts_merge_into_the_whole(backend, widest):
    """What a distributed loss does: local rows against all keys, columns merged over ranks; one rank has no rows."""
    x, y, scale = inputs_of(N, widest)
    assert_close = functools.partial(torch.testing.assert_close, **tolerance(widest))
    targets = torch.arange(N)
    of_rows, of_columns = statistics(x, y, scale, targets, backend)
    parts = [slice(0, 40), slice(40, 40), slice(40, N)]
    seen = [statistics(x[part], y, scale, targets[part], backend) for part in parts]
    assert_close(torch.cat([rows for rows, _ in seen], 1), of_rows)
    columns = torch.stack([columns for _, columns in seen])  # [W, 7, M]
    lse = columns[:, LSE].logsumexp(0)
    assert_close(lse, of_columns[LSE])
    assert_close(((columns[:, LSE] - lse).exp() * columns[:, MEAN]).sum(0), of_columns[MEAN])
    assert_close(columns[:, [POSITIVE, TOTAL]].sum(0), of_columns[[POSITIVE, TOTAL]])
    assert_close(columns[:, 5:].amax(0), of_columns[5:])

    weights = torch.rand(2, 4, N, dtype=torch.float64)

    def backward(part):
        rest = Pairs(targets[part]), None, None, Need(True, True), backend
        return op.softmax_bwd(weights[0][:, part], weights[1], x[part], y, scale, of_rows[LSE, part], lse, *rest)

    dx, dy, _ = backward(slice(0, N))
    assert_close(torch.cat([backward(part)[0] for part in parts]), dx)
    assert_close(sum(backward(part)[1] for part in parts), dy)


@pytest.mark.parametrize("name", ["all", "all, ids", "more keys"])
def test_oracle_in_chunks_is_the_oracle(name, monkeypatch):
    m, options = OPTIONS[name]
    loss = functools.partial(infonce, backend="reference", **options)
    whole = loss_and_gradients(loss, *inputs_of(m, torch.float64))
    monkeypatch.setattr(chunks, "LOGITS", 17 * m)
    for got, want in zip(loss_and_gradients(loss, *inputs_of(m, torch.float64)), whole, strict=True):
        torch.testing.assert_close(got, want)


def test_siglip_oracle_in_chunks(monkeypatch):
    x, y, scale = inputs_of(N, torch.float64)
    loss = functools.partial(siglip, logit_bias=-3.0, query_ids=IDS, backend="reference")
    whole = loss_and_gradients(loss, x, y, scale)
    monkeypatch.setattr(chunks, "LOGITS", 20 * N)
    for got, want in zip(loss_and_gradients(loss, x, y, scale), whole, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["all", "ids", "one way", "targets"])
def test_same_bits_again_interpreted(name):
    served("triton")
    m, options = OPTIONS[name]
    loss = functools.partial(infonce, backend="triton", **cast(options, torch.float32))
    first, again = (loss_and_gradients(loss, *inputs_of(m, torch.float32)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("name", ["all", "ids", "one way"])
def test_same_bits_for_any_number_of_threads(name):
    if candidates("contrastive", torch.device("cpu"), torch.float32)["native"]:
        pytest.skip("no native core")
    m, options = OPTIONS[name]
    loss = functools.partial(infonce, backend="native", **cast(options, torch.float32))
    before = torch.get_num_threads()
    try:
        first = loss_and_gradients(loss, *inputs_of(m, torch.float32))
        for threads in (1, 2, 3, 2, 1):
            torch.set_num_threads(threads)
            again = loss_and_gradients(loss, *inputs_of(m, torch.float32))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["all", "all, ids"])
def test_compiled_whole_and_functorch(name, backend):
    m, options = OPTIONS[name]
    loss = functools.partial(infonce, backend=backend, **cast(options, torch.float32))
    inputs = inputs_of(m, torch.float32)
    expected = loss_and_gradients(loss, *inputs)
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(loss_and_gradients(compiled, *inputs), expected, strict=True):
        torch.testing.assert_close(got, want)
    for got, want in zip(torch.func.grad(loss, argnums=(0, 1, 2))(*inputs), expected[1:], strict=True):
        torch.testing.assert_close(got, want)


def test_opcheck(backend):
    x, y, scale = (t.requires_grad_() for t in inputs_of(N + 4, torch.float32))
    ids = IDS, torch.cat([IDS, IDS[:4]])
    args = (x, y, scale, None, *ids, "positive", *(None,) * 4, True, True, backend)
    torch.library.opcheck(torch.ops.mmkernels.contrastive_softmax_fwd.default, args)
    bias = torch.tensor(-3.0, requires_grad=True)
    torch.library.opcheck(
        torch.ops.mmkernels.contrastive_sigmoid_fwd.default, (x, y, scale, bias, None, *ids, "positive", backend)
    )
    plain = x.detach(), y.detach(), scale.detach()
    lse = torch.zeros(N, dtype=torch.float64), torch.zeros(N + 4, dtype=torch.float64)
    weights = torch.ones(4, N, dtype=torch.float64), torch.ones(4, N + 4, dtype=torch.float64)
    for mean in ((None, None), lse):
        args = (*weights, *plain, *lse, None, *ids, "ignore", *(None,) * 4, *mean, True, False, backend)
        torch.library.opcheck(torch.ops.mmkernels.contrastive_softmax_bwd.default, args)
        for coefficients in (weights, (None, None)):
            second = (x.detach(), None, scale.detach(), *coefficients, *args[2:])
            torch.library.opcheck(torch.ops.mmkernels.contrastive_softmax_second.default, second)


def test_no_rows_and_one_row(backend):
    for n, expected in ((0, 0.0), (1, 0.0)):
        x = torch.randn(n, E, requires_grad=True)
        options = dict(label_smoothing=0.1, query_ids=torch.arange(n), return_stats=True, backend=backend)
        loss, _ = infonce(x, x, 2.0, **options)
        assert loss.item() == pytest.approx(expected, abs=1e-6)
        assert torch.autograd.grad(loss, x)[0].shape == x.shape


def test_logits_that_overflow_float32(backend):
    """Where float64 has a finite loss, so have we."""
    x, y = rows(20, 8), rows(20, 8, 1)
    loss = infonce(x.float() * 1e15, y.float() * 1e15, torch.tensor(1e6), symmetric=False, backend=backend)
    truth = plain_infonce_options(
        (x.float() * 1e15).double(), (y.float() * 1e15).double(), torch.tensor(1e6).double(), symmetric=False
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0)


X, Y = torch.randn(2, 4, 8).unbind()
FOUR = torch.arange(4)
MISTAKES = [
    (
        dict(targets=torch.zeros(4)),
        TypeError,
        r"targets: expected \[4\] int64 or int32, one per query, got .*float32",
    ),
    (dict(targets=torch.arange(3)), ValueError, r"targets: expected \[4\] int64"),
    (dict(targets=FOUR + 1), ValueError, "targets: expected indices of keys, 0 to 3"),
    (dict(targets=FOUR - 1), ValueError, "targets: expected indices of keys, 0 to 3"),
    (dict(targets=FOUR * 0), ValueError, "targets: expected each key once"),
    (dict(query_ids=FOUR[:3]), ValueError, r"query_ids: expected \[4\] int64"),
    (dict(query_ids=FOUR, key_ids=FOUR[:3]), ValueError, r"key_ids: expected \[4\] int64 or int32, one per key"),
    (dict(key_ids=FOUR), ValueError, "query_ids: expected query ids, required"),
    (dict(query_ids=FOUR, key_ids=FOUR * 0), ValueError, "query_ids: expected each to occur among key_ids"),
    (dict(query_ids=FOUR * 0, key_ids=FOUR), ValueError, "key_ids: expected each to occur among query_ids"),
    (dict(query_ids=FOUR, targets=FOUR), ValueError, "targets: expected None with query_ids"),
    (dict(same_id="ignore"), ValueError, r"query_ids: expected \[N\] ids, required when same_id='ignore'"),
    (dict(same_id="both"), ValueError, "same_id: expected 'positive' or 'ignore', got 'both'"),
    (dict(negatives=Y[:, :7]), ValueError, r"negatives: expected \[K, 8\], as wide as queries"),
    (dict(negatives=Y.double()), TypeError, "negatives: expected float32 like queries"),
    (dict(label_smoothing=1.5), ValueError, r"label_smoothing: expected a number in \[0, 1\], got 1.5"),
    (dict(label_smoothing=torch.tensor(0.1)), TypeError, r"label_smoothing: expected a number in \[0, 1\]"),
    (dict(label_smoothing=float("nan")), ValueError, "label_smoothing: expected a number"),
    (dict(symmetric=1), TypeError, "symmetric: expected True or False"),
    (dict(weights=FOUR), TypeError, r"weights: expected \[4\] floating point"),
    (dict(weights=torch.ones(3)), ValueError, r"weights: expected \[4\] floating point"),
    (dict(weights=torch.zeros(4)), ValueError, "weights: expected finite non-negative numbers, not all zero"),
    (dict(weights=torch.tensor([1, 1, -1, 1.0])), ValueError, "weights: expected finite non-negative"),
    (dict(weights=torch.tensor([1, torch.nan, 1, 1.0])), ValueError, "weights: expected finite non-negative"),
    (dict(weights=torch.tensor([1, torch.inf, 1, 1.0])), ValueError, "weights: expected finite non-negative"),
    (dict(weights=torch.ones(4, requires_grad=True)), ValueError, "weights: expected a tensor that requires no"),
    (dict(teacher=(X, Y)), TypeError, r"teacher: expected \(queries_m, keys_m, alpha\)"),
    (dict(teacher=(X[:3], Y, 0.1)), ValueError, r"teacher\[0\]: expected \[4, F\] float32"),
    (dict(teacher=(X, Y[:, :3], 0.1)), ValueError, r"teacher\[1\]: expected \[4, 8\], as wide as teacher\[0\]"),
    (dict(teacher=(X, Y, 1.1)), ValueError, r"teacher\[2\]: expected a number in \[0, 1\], got 1.1"),
    (dict(teacher=(X, Y.half(), 0.1)), TypeError, r"teacher\[1\]: expected \[4, F\] float32"),
    (dict(keys=Y[:3]), ValueError, r"keys: expected \[4, E\], one per query"),
    (dict(keys=Y[:3], symmetric=False), ValueError, r"keys: expected at least \[4, E\]"),
    (
        dict(keys=torch.cat([Y, Y]), query_ids=FOUR, key_ids=torch.arange(8) % 4, weights=torch.ones(4)),
        ValueError,
        "weights: expected None, because the 8 keys have no weights",
    ),
    (dict(keys=torch.cat([Y, Y]), query_ids=FOUR), ValueError, r"key_ids: expected \[8\]"),
    (dict(return_stats=1), TypeError, "return_stats: expected True or False"),
    (dict(exchange="ring"), ValueError, "exchange: expected 'auto' without a group"),
    (dict(group=object()), ValueError, "group: expected None, or a process group .call init_process_group"),
]


@pytest.mark.parametrize(("wrong", "error", "message"), MISTAKES)
def test_a_mistake_is_named(wrong, error, message):
    with pytest.raises(error, match=message):
        infonce(**(dict(queries=X, keys=Y, logit_scale=1.0) | wrong))


def test_mistakes_under_compile_are_asserted():
    torch.compiler.reset()
    loss = torch.compile(lambda t: infonce(X, Y, 1.0, targets=t), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="targets: expected indices of keys"):
        loss(FOUR + 1)


def test_a_backend_that_does_not_know_an_option_says_so():
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device("cpu"), dtype=torch.float32)
    limits = api._limits({"targets": None, "label_smoothing": 0.1}, on_gpu)
    with pytest.raises(BackendError, match=r"(?s)native: no CUDA.* kernel supports label_smoothing.*reference: can"):
        resolve("contrastive", on_gpu, "native", limits)
    assert limits.get("triton") is None
