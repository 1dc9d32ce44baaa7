"""Second derivatives and forward mode of the losses: correct on every backend, and never silently missing."""

import functools
import random

import backends
import named
import pytest
import ranks
import torch
import torch.distributed as dist
from derivatives import assert_differentiable_twice
from torch.autograd import forward_ad

from mmkernels import FalseNegatives, infonce, siglip
from mmkernels.ops.contrastive import second
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import plain_infonce, plain_infonce_options, plain_siglip

N, E = 7, 5


backend = backends.fixture("contrastive")


def leaves(seed, n=N, m=N, e=E, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    drawn = (torch.randn(rows, e, generator=generator, dtype=dtype) for rows in (n, m))
    return *(x.requires_grad_() for x in drawn), torch.tensor(1.3, dtype=dtype, requires_grad=True)


def random_options(seed):
    """Any compatible set of infonce's options, and the number of keys."""
    draw, torch_draw = random.Random(seed), torch.Generator().manual_seed(seed)
    options, m = {}, N
    rule = draw.choice(["own", "targets", "ids", "ignore"])
    if draw.random() < 0.3:
        options["symmetric"], m = False, N + 3
    if rule in ("ids", "ignore"):
        options["query_ids"] = torch.randint(4, (N,), generator=torch_draw)
        options["key_ids"] = torch.cat([options["query_ids"], torch.randint(4, (m - N,), generator=torch_draw)])
        options["same_id"] = "positive" if rule == "ids" else "ignore"
    if rule == "targets":
        options["targets"] = torch.randperm(N, generator=torch_draw)
    if draw.random() < 0.4:
        options["label_smoothing"] = 0.2
    if draw.random() < 0.4 and m == N:
        options["weights"] = torch.rand(N, generator=torch_draw, dtype=torch.float64)
    if draw.random() < 0.4:
        options["negatives"] = torch.randn(draw.choice([(3, E), (N, 3, E)]), generator=torch_draw, dtype=torch.float64)
    if draw.random() < 0.4:
        features = (torch.randn(rows, 4, generator=torch_draw, dtype=torch.float64) for rows in (N, m))
        options["teacher"] = (*features, 0.3)
    if draw.random() < 0.4 and rule != "ignore":
        options["decoupled"] = True
    return m, options


@pytest.mark.parametrize("seed", range(16))
def test_infonce_with_any_options(seed, monkeypatch):
    m, options = random_options(seed)
    x, y, scale = leaves(seed, m=m)
    scale = scale.detach() if "teacher" in options else scale  # the teacher's softmax is a constant, its scale too
    loss = functools.partial(infonce, **options)
    for pairs in (second._PAIRS_A_CHUNK, 2 * N):  # one chunk, several
        monkeypatch.setattr(second, "_PAIRS_A_CHUNK", pairs)
        with named.case(f"chunks of {pairs} pairs"):
            assert_differentiable_twice(loss, x, y, scale)


@pytest.mark.parametrize("ids", [None, torch.tensor([0, 1, 0, 2, 1, 3, 0])])
def test_siglip(ids):
    inputs = *leaves(1), torch.tensor(-0.4, dtype=torch.float64, requires_grad=True)
    loss = functools.partial(siglip, query_ids=ids)
    assert_differentiable_twice(loss, *inputs, fast_mode=False)


def penalised(loss, *inputs):
    """The gradient of a loss plus the squared norm of its gradient."""
    value = loss(*inputs)
    grads = torch.autograd.grad(value, inputs, create_graph=True)
    assert all(grad.requires_grad for grad in grads)
    return torch.autograd.grad(value + sum(grad.square().sum() for grad in grads), inputs)


HARDER = {
    "both ways": dict(),
    "shuffled, weights": dict(targets=torch.randperm(N), weights=torch.rand(N, dtype=torch.float64)),
    "decoupled": dict(decoupled=True),
    "negatives": dict(negatives=torch.randn(3, E, dtype=torch.float64)),
    "own negatives, filter": dict(
        negatives=torch.randn(N, 2, E, dtype=torch.float64),
        false_negatives=FalseNegatives(
            *torch.randn(2, N, 3, dtype=torch.float64), 0.1, "relative", torch.randn(N, 2, 3, dtype=torch.float64)
        ),
    ),
    "smoothing, ignored ids": dict(
        label_smoothing=0.1, query_ids=torch.tensor([0, 1, 0, 2, 1, 3, 0]), same_id="ignore", symmetric=False
    ),
}


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("name", HARDER)
def test_hardness_has_the_derivatives_of_detach(name, backend):
    """Finite differences would see the detached similarity; autograd of the dense expression does not."""
    inputs = leaves(7)
    ours = functools.partial(infonce, backend=backend, hardness=2.5, **HARDER[name])
    plain = functools.partial(plain_infonce_options, hardness=2.5, **HARDER[name])
    for function in (torch.autograd.grad, None):
        got, expected = (
            penalised(f, *inputs) if function is None else function(f(*inputs), inputs) for f in (ours, plain)
        )
        for mine, exact in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, exact, rtol=1e-11, atol=1e-12)
    values = [t.detach() for t in inputs]
    tangents = [torch.randn_like(t) for t in values]
    moved = [torch.func.jvp(f, tuple(values), tuple(tangents)) for f in (ours, plain)]
    torch.testing.assert_close(*moved, rtol=1e-11, atol=1e-12)
    jacobians = [torch.func.jacfwd(torch.func.grad(f))(*values) for f in (ours, plain)]
    torch.testing.assert_close(*jacobians, rtol=1e-11, atol=1e-12)


def test_hardness_of_a_scale_of_zero():
    """The penalty remains; features get no gradient through it, the scale does."""
    x, y, _ = leaves(8)
    scale = torch.tensor(0.0, dtype=torch.float64, requires_grad=True)
    results = []
    for f in (infonce, plain_infonce_options):
        loss = f(x, y, scale, hardness=2.0)
        results.append((loss, *torch.autograd.grad(loss, (x, y, scale))))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-14)
    assert not results[0][1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@backends.every
def test_gradient_penalty(backend, dtype):
    """As accurate as plain PyTorch, whichever backend gave the statistics."""
    backends.need("contrastive", backend, dtype)
    for name in ("infonce", "siglip", "options"):
        judge_gradient_penalty(backend, name, dtype)


def judge_gradient_penalty(backend, name, dtype):
    ids = torch.randint(20, (33,), generator=torch.Generator().manual_seed(2))
    options = dict(query_ids=ids, same_id="ignore", label_smoothing=0.1)
    ours, plain = {
        "infonce": (infonce, plain_infonce),
        "siglip": (lambda x, y, s: siglip(x, y, s, -2.0, backend=backend), lambda x, y, s: plain_siglip(x, y, s, -2.0)),
        "options": (functools.partial(infonce, **options), functools.partial(plain_infonce_options, **options)),
    }[name]
    ours = ours if name == "siglip" else functools.partial(ours, backend=backend)
    draws = [leaves(seed, 33, 33, 24) for seed in range(4)]
    draws = [[t.detach().to(dtype if t.ndim else torch.float32).requires_grad_() for t in draw] for draw in draws]
    wide = [[t.detach().double().requires_grad_() for t in draw] for draw in draws]
    results = ([penalised(loss, *draw) for draw in of] for loss, of in ((ours, draws), (plain, draws), (plain, wide)))
    for what, *three in zip(
        ("queries", "keys", "scale"), *(zip(*result, strict=True) for result in results), strict=True
    ):
        assert_as_accurate(f"{name}: {what}", *(torch.stack(values) for values in three))


@pytest.mark.parametrize("backend", ["native", "reference"])  # Triton's kernels take no float64
def test_functorch(backend):
    backends.need("contrastive", backend, torch.float64)
    x, y, scale = (t.detach() for t in leaves(3))
    loss = functools.partial(infonce, backend=backend)
    torch.testing.assert_close(torch.func.hessian(loss)(x, y, scale), torch.func.hessian(plain_infonce)(x, y, scale))
    torch.testing.assert_close(torch.func.jacfwd(loss)(x, y, scale), torch.func.grad(plain_infonce)(x, y, scale))
    v = torch.randn_like(x)
    ours, plain = (torch.func.jvp(lambda x, f=f: f(x, y, scale), (x,), (v,)) for f in (loss, plain_infonce))
    torch.testing.assert_close(ours, plain)
    leaf = x.clone().requires_grad_()
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(loss(forward_ad.make_dual(leaf, v), y, scale)).tangent
    (grad,) = torch.autograd.grad(moved, leaf)
    torch.testing.assert_close(moved, plain[1])
    torch.testing.assert_close(grad, torch.autograd.functional.vhp(lambda x: plain_infonce(x, y, scale), x, v)[1])
    ours, plain = (torch.autograd.functional.hessian(lambda x, f=f: f(x, y, scale), x) for f in (loss, plain_infonce))
    torch.testing.assert_close(ours, plain)
    reverse_over_forward = torch.func.jacrev(torch.func.jacfwd(lambda x: loss(x, y, scale)))(x)
    torch.testing.assert_close(reverse_over_forward, plain)


def test_first_gradients_are_the_same_with_a_graph(backend):
    inputs = [t.detach().float().requires_grad_() for t in leaves(4)]
    for loss in (infonce, lambda x, y, s, backend: siglip(x, y, s, -1.0, backend=backend)):
        with_graph, without = (
            torch.autograd.grad(loss(*inputs, backend=backend), inputs, create_graph=graph) for graph in (True, False)
        )
        assert all(torch.equal(a, b) for a, b in zip(with_graph, without, strict=True))


def test_no_rows():
    inputs = leaves(0, 0, 0)
    for loss in (infonce, lambda *a: siglip(*a, -1.0), functools.partial(infonce, label_smoothing=0.1)):
        assert [list(grad.shape) for grad in penalised(loss, *inputs)] == [[0, E], [0, E], []]


def test_third_derivatives_say_so():
    x, y, scale = leaves(5)
    (grad,) = torch.autograd.grad(infonce(x, y, scale), x, create_graph=True)
    (second_order,) = torch.autograd.grad(grad.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="contrastive_infonce_second has no gradient: third"):
        second_order.sum().backward()
    with pytest.raises(NotImplementedError, match=r"autograd\.functional\.hvp, which asks for one"):
        torch.autograd.functional.hvp(lambda x: infonce(x, y.detach(), scale.detach()), x.detach(), x.detach())


def test_no_samples_under_vmap():
    x = torch.zeros(0, E)
    assert torch.func.jacrev(lambda x: infonce(x, x, 2.0))(x).shape == (0, E)
    assert torch.func.jacfwd(lambda x: infonce(x, x, 2.0))(x).shape == (0, E)
    assert torch.func.vmap(lambda x: infonce(x, x, 2.0))(torch.zeros(0, 4, E)).shape == (0,)


def test_a_bare_op_loses_no_tangent():
    """Compiled or bare, an op has no forward mode: the graph breaks, or an error is raised."""
    x, y, scale = (t.detach() for t in leaves(6))

    def moved(x):
        return torch.func.jvp(lambda x: infonce(x, y, scale), (x,), (y,))[1]

    torch.compiler.reset()
    torch.testing.assert_close(torch.compile(moved, backend="aot_eager")(x), moved(x))
    torch.compiler.reset()
    # Dynamo of torch 2.6 stops at a context manager before it reaches the op.
    why = "WITH_EXCEPT_START" if torch.__version__.startswith("2.6.") else "contrastive_infonce_fwd has no forward mode"
    with pytest.raises(torch._dynamo.exc.Unsupported, match=why):
        torch.compile(moved, backend="aot_eager", fullgraph=True)(x)

    def bare(x):
        return torch.ops.mmkernels.contrastive_infonce_fwd(x, y, scale, "reference")[0]

    with pytest.raises(NotImplementedError, match="contrastive_infonce_fwd has no forward mode"):
        torch.func.jvp(bare, (x,), (y,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="has no forward mode"):
        bare(forward_ad.make_dual(x, y))


def _over_ranks(rank, world):
    x, y, scale = leaves(rank)
    refused = []
    for loss in (infonce, lambda *a, group: siglip(*a, -1.0, group=group)):
        value = loss(x, y, scale, group=dist.group.WORLD)
        with pytest.raises(NotImplementedError, match=r"double backward .* not supported with a group"):
            torch.autograd.grad(value, x, create_graph=True)
        with pytest.raises(NotImplementedError, match="group: expected None"):
            torch.func.jvp(functools.partial(loss, group=dist.group.WORLD), (x, y, scale), (x, y, scale))
        refused.append(loss)
    return len(refused)


def test_over_ranks_a_graph_is_refused():
    assert ranks.run(2, _over_ranks) == [2, 2]
