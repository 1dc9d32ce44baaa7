"""Every contrastive op on each CPU instruction set: losses, options, sampling and retrieval, in every dtype."""

import functools

import isas
import torch

from mmkernels import FalseNegatives, infonce, sample_negatives, siglip, topk_similar
from mmkernels.testing import assert_as_accurate
from mmkernels.testing.contrastive import (
    Case,
    compare,
    features,
    loss_and_gradients,
    plain_infonce,
    plain_infonce_options,
    plain_siglip,
)

LOW = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*LOW, torch.float64)
NAMES = ("queries", "keys", "logit_scale", "logit_bias")
# Ragged rows and columns over several tiles; a width that is no multiple of any vector, and one below a vector.
CASES = (Case("ragged", 203, 91), Case("several tiles", 530, 24), Case("narrow", 37, 3, scale=-3.0, bias=2.0))


@isas.each
def test_each_instruction_set(isa):
    isas.run_on(isa, check)


def check():
    check_losses()
    for dtype in DTYPES:
        check_options(dtype)
        check_search(dtype)


def check_losses():
    for loss, plain, count in ((infonce, plain_infonce, 3), (siglip, plain_siglip, 4)):
        native = functools.partial(loss, backend="native")
        for case in CASES:
            for dtype in LOW:
                compare(native, plain, case, dtype, NAMES[:count])
            scalars = [torch.tensor(x, dtype=torch.float64) for x in (case.scale, case.bias)][: count - 2]
            inputs = (*features(case, torch.float64), *scalars)
            close(loss_and_gradients(native, *inputs), loss_and_gradients(plain, *inputs))


def close(got, expected):
    for ours, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-12)


def check_options(dtype):
    """Ids as positives and as excluded pairs; a queue of negatives, smoothing, weights and a teacher; one direction;
    a filter."""
    n, e = 203, 40
    ids = torch.arange(n) % 40
    queue, teacher = features(Case("queue", 70, e), dtype, 8)[0], features(Case("teacher", n, 24), dtype, 9)
    whole = [torch.arange(rows * 7).view(rows, 7).mul(37).remainder(5).to(dtype) - 2 for rows in (n, n, 70)]
    guide = FalseNegatives(*whole[:2], 1.0, guide_negatives=whole[2])  # exact products: the same decisions in any dtype
    more = dict(negatives=queue, label_smoothing=0.1, teacher=(*teacher, 0.4))
    for options in (
        dict(query_ids=ids, **more),
        dict(query_ids=ids, same_id="ignore", weights=torch.linspace(0, 1, n), **more),
        dict(targets=torch.arange(n).flip(0), symmetric=False, label_smoothing=0.1),
        dict(query_ids=ids, same_id="ignore", negatives=queue, false_negatives=guide),
    ):
        exact = {name: widened(value) for name, value in options.items()}
        ours = functools.partial(infonce, backend="native", **options)
        plain, truth = (functools.partial(plain_infonce_options, **of) for of in (options, exact))
        judge(ours, plain, truth, dtype)
    judge(
        functools.partial(siglip, logit_bias=-8.0, query_ids=ids, backend="native"),
        functools.partial(plain_siglip_ids, ids),
        functools.partial(plain_siglip_ids, ids),
        dtype,
    )


def widened(value):
    if isinstance(value, FalseNegatives):
        return FalseNegatives(*map(widened, value))
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def plain_siglip_ids(ids, queries, keys, scale):
    signs = torch.where(ids[:, None] == ids, 1, -1)
    return -torch.nn.functional.logsigmoid(signs * (scale * queries @ keys.T - 8.0)).sum() / len(ids)


def judge(ours, plain, truth, dtype):
    scale = torch.tensor(14.3, dtype=torch.promote_types(dtype, torch.float32))
    draws = [(*features(Case("options", 203, 40), dtype, seed), scale) for seed in range(4)]
    got, expected = ([loss_and_gradients(f, *draw) for draw in draws] for f in (ours, plain))
    exact = [loss_and_gradients(truth, *(x.double() for x in draw)) for draw in draws]
    if dtype == torch.float64:
        for one, other in zip(got, exact, strict=True):
            close(one, other)
        return
    similarity = [x.double() @ y.double().T for x, y, _ in draws]
    lse = [(14.3 * s).logsumexp(1).abs().mean() for s in similarity]
    moved = [((14.3 * s).softmax(1) * s.abs()).sum(1).mean() for s in similarity]
    terms = (torch.stack(lse), None, None, torch.stack(moved))
    for i, what in enumerate(("loss", *NAMES[:3])):
        three = (torch.stack([draw[i] for draw in of]) for of in (got, expected, exact))
        assert_as_accurate(f"{what}, {dtype}", *three, terms=terms[i])


def check_search(dtype):
    """Draws match the oracle's except where rounding decides; the best k match float64's."""
    queries, keys = (features(Case("random", n, 27, kind="unnormalized"), dtype, seed=n)[0] for n in (150, 2300))
    ids = dict(query_ids=torch.arange(150) % 30, key_ids=torch.arange(2300) % 30)
    drawn = [
        sample_negatives(queries, keys, 0.3, **ids, generator=torch.Generator().manual_seed(5), backend=backend)
        for backend in ("native", "reference")
    ]
    assert (drawn[0] == drawn[1]).double().mean() > 0.99
    assert (ids["key_ids"][drawn[0]] != ids["query_ids"]).all()
    similarity = queries.double() @ keys.double().T
    for k in (1, 300):
        values, indices = topk_similar(queries, keys, k, backend="native")
        torch.testing.assert_close(values.double(), similarity.topk(k).values, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(similarity.gather(1, indices), values.double(), rtol=1e-5, atol=1e-5)
