"""`attn_implementation="mmkernels"` in models of transformers: what their own attention computes, and samples in one
row get what they get alone."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

transformers = pytest.importorskip("transformers")
if not hasattr(transformers, "AttentionMaskInterface"):
    pytest.skip("needs transformers with AttentionMaskInterface", allow_module_level=True)

from integrations.tiny_models import MODELS, built, text  # noqa: E402  after the skip
from transformers import masking_utils  # noqa: E402

from mmkernels.integrations.transformers import attention as implementation  # noqa: E402
from mmkernels.integrations.transformers import attention_forward, make_mask, register  # noqa: E402

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]
TEXTS = ("bert", "llama", "mistral", "qwen2", "gemma2")
PACKABLE = [name for name, tiny in MODELS.items() if tiny.packable]
PADDINGS = {
    "left": (slice(0, 4), slice(0, 0)),
    "right": (slice(0, 0), slice(7, 11)),
    "inside": (slice(0, 2), slice(4, 6)),
}
Outcome = tuple[Tensor, dict[str, Tensor]]


@pytest.fixture(autouse=True)
def registered() -> None:
    register()
    transformers.logging.set_verbosity_error()


def weighted(out: Tensor) -> Tensor:
    """A scalar in which every element counts differently."""
    return (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def outcome(name: str, which: str, inputs: dict[str, Any], keep: Tensor | None = None) -> Outcome:
    """Output and gradients, in float64 unless eager is the reference, which gives NaN in float64 (it rounds the lowest
    number to -inf)."""
    dtype = torch.float32 if own(name)[0] == "eager" else torch.float64
    model = built(name, which).to(dtype)
    inputs = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}
    out = MODELS[name].output(model(**inputs))
    out = out if keep is None else out[keep]
    weighted(out).backward()
    return out.detach(), gradients(model)


def own(name: str) -> tuple[str, float]:
    """transformers' own implementation that is closest to exact, and how close: eager rounds the softmax to float32,
    sdpa has no softcap."""
    return ("eager", 1e-5) if name == "gemma2" else ("sdpa", 1e-9)


def assert_same(found: Outcome, expected: Outcome, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 5
    for name, grad in expected[1].items():
        wrong = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(found[1][name], grad, rtol=10 * tolerance, atol=10 * tolerance, msg=wrong)


@pytest.mark.parametrize("name", list(MODELS))
def test_as_transformers_itself(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ours = implementation.attention
    monkeypatch.setattr(implementation, "attention", lambda *args, **kw: calls.append(1) or ours(*args, **kw))
    inputs, (theirs, tolerance) = MODELS[name].sample(1), own(name)
    assert_same(outcome(name, "mmkernels", inputs), outcome(name, theirs, inputs), tolerance)
    assert len(calls) >= 2  # it is ours that ran


@pytest.mark.parametrize("padding", list(PADDINGS))
@pytest.mark.parametrize("name", TEXTS)
def test_padding(name: str, padding: str) -> None:
    keep = torch.ones(2, 11, dtype=torch.bool)
    for row, cut in enumerate(PADDINGS[padding]):
        keep[row, cut] = False
    inputs = {"input_ids": torch.cat([text(1, 11), text(2, 11)]), "attention_mask": keep.long()}
    theirs, tolerance = own(name)
    assert_same(outcome(name, "mmkernels", inputs, keep), outcome(name, theirs, inputs, keep), tolerance)


def packed(name: str, model: Any, samples: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], list[int]]:
    """Samples in one row, and the tokens of each."""
    along_tokens = {"input_ids", "token_type_ids", "mm_token_type_ids", "aspect_ratio_ids", "aspect_ratio_mask"}
    of_images = 1 if name in ("idefics3", "mllama") else 0
    lengths = [sample["input_ids"].shape[1] for sample in samples]
    inputs: dict[str, Tensor] = {}
    for key in samples[0]:
        values = [sample[key] for sample in samples]
        if key == "cross_attention_mask":  # [1, T, images, tiles]
            rows = [nn.functional.pad(v, (0, 0, v.shape[2] * i, v.shape[2] * (2 - i))) for i, v in enumerate(values)]
            inputs[key] = torch.cat(rows, 1)
        else:
            inputs[key] = torch.cat(values, 1 if key in along_tokens else of_images)
    within = torch.cat([torch.arange(length) for length in lengths])[None]
    if hasattr(model, "model") and hasattr(model.model, "get_rope_index"):
        rows = [
            model.model.get_rope_index(
                s["input_ids"], mm_token_type_ids=s["mm_token_type_ids"], image_grid_thw=s["image_grid_thw"]
            )[0]
            for s in samples
        ]
        inputs["position_ids"] = torch.cat([within[None], torch.cat(rows, -1)])
    else:
        inputs["position_ids"] = within
    return inputs, lengths


def boundaries(lengths: list[int]) -> dict[str, Any]:
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths)}


@pytest.mark.parametrize("told", ["position_ids", "cu_seq_lens"])
@pytest.mark.parametrize("name", PACKABLE)
def test_packed_as_alone(name: str, told: str) -> None:
    """With default settings: in evaluation mode a model has a cache, with which transformers' own masks forget that
    position_ids begin again."""
    model, samples = built(name, "mmkernels"), [MODELS[name].sample(seed) for seed in (1, 2, 3)]
    alone = []
    for sample in samples:
        alone.append(MODELS[name].output(model(**sample)))
        weighted(alone[-1]).backward()
    expected = gradients(model)
    inputs, lengths = packed(name, model, samples)
    inputs |= boundaries(lengths) if told == "cu_seq_lens" else {}
    parts = MODELS[name].output(model(**inputs)).split(lengths, 1)
    torch.stack([weighted(part) for part in parts]).sum().backward()
    for part, of_one in zip(parts, alone, strict=True):
        torch.testing.assert_close(part, of_one, rtol=0, atol=1e-5)
    found, largest = gradients(model), max(float(grad.abs().max()) for grad in expected.values())
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("name", ["clip", "siglip", "vit"])
def test_towers_as_alone(name: str) -> None:
    """Texts in one row, images in one batch: hidden states and gradients."""
    model, samples = built(name, "mmkernels"), [MODELS[name].sample(seed) for seed in (1, 2, 3)]
    images = getattr(model, "vision_model", model)
    alone, together = [images(s["pixel_values"]).last_hidden_state for s in samples], []
    together += images(torch.cat([s["pixel_values"] for s in samples])).last_hidden_state.split(1)
    if name == "clip":  # SigLIP's text tower does not hand on what tells samples apart, to any implementation
        lengths = [s["input_ids"].shape[1] for s in samples]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        row = {"input_ids": torch.cat([s["input_ids"] for s in samples], 1), "position_ids": positions}
        together += model.text_model(**row, **boundaries(lengths)).last_hidden_state.split(lengths, 1)
        alone += [model.text_model(s["input_ids"]).last_hidden_state for s in samples]
    parameters = [p for key, p in model.named_parameters() if not key.startswith(("logit_", "visual_p", "text_p"))]
    grads = [
        torch.autograd.grad(torch.stack([weighted(part) for part in parts]).sum(), parameters, allow_unused=True)
        for parts in (together, alone)
    ]
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    for found, expected in zip(*grads, strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_as_eager(name: str, cache: str) -> None:
    """Left padding, caches that grow and caches of a fixed size, windows shorter than the text."""
    if name == "gemma3":
        inputs = MODELS[name].sample(1)
    else:
        inputs = {
            "input_ids": torch.cat([text(1, 9), text(2, 9)]),
            "attention_mask": torch.ones(2, 9, dtype=torch.long),
        }
        inputs["attention_mask"][0, :4] = 0
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_logits": True, "cache_implementation": None if cache == "dynamic" else "static"}
    ours, eager = (built(name, which).generate(**inputs, **options) for which in ("mmkernels", "eager"))
    assert torch.equal(ours.sequences, eager.sequences)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(eager.logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_gradient_checkpointing(name: str) -> None:
    results = []
    for recompute in (False, True):
        model = built(name, "mmkernels").train()
        if recompute:
            model.gradient_checkpointing_enable()
        samples = [MODELS[name].sample(seed) for seed in (1, 2)]
        inputs, lengths = packed(name, model, samples)
        out = MODELS[name].output(model(**inputs, **boundaries(lengths)))
        weighted(out).backward()
        results.append((out.detach(), gradients(model)))
    assert_same(results[1], results[0])


@pytest.mark.parametrize("padding", [None, "left", "inside"])
def test_compiled(padding: str | None) -> None:
    """In one graph, although a mask's values are not known then."""
    keep = torch.ones(2, 11, dtype=torch.long)
    for row, cut in enumerate(PADDINGS[padding] if padding else ()):
        keep[row, cut] = 0
    inputs = {"input_ids": torch.cat([text(1, 11), text(2, 11)]), **({"attention_mask": keep} if padding else {})}
    model = built("mistral", "mmkernels")
    model.config.use_cache = False
    expected = model(**inputs).logits[keep.bool()]
    found = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs).logits[keep.bool()]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_vision_towers_take_all_images_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sample = built(name, "mmkernels"), MODELS[name].sample(1)
    model(**sample)  # the implementation meets the tower
    lengths = []
    ours = implementation.attention
    monkeypatch.setattr(
        implementation, "attention", lambda q, *args, **kw: lengths.append(q.shape[1]) or ours(q, *args, **kw)
    )
    model(**sample)
    depth, patches = len(model.model.visual.blocks), int(sample["image_grid_thw"].prod(1).sum())
    assert lengths[:depth] == [patches] * depth
    eager = built(name, "eager")
    assert eager.model.visual.blocks[0].attn.config._attn_implementation == "eager"
    torch.testing.assert_close(eager(**sample).logits, model(**sample).logits, rtol=0, atol=1e-5)  # still by itself


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(each, Tensor):
                self.bytes = max(self.bytes, each.untyped_storage().nbytes())
        return out


def test_masks_take_little_memory() -> None:
    tokens = 1 << 14
    function = masking_utils.sliding_window_causal_mask_function(100)
    with Largest() as largest:
        mask = make_mask(
            1, tokens, tokens, mask_function=function, attention_mask=torch.ones(1, tokens, dtype=torch.bool)
        )
    assert largest.bytes <= 8 << 22  # a block of int64 indices; the whole mask would have 2^28 elements
    index = torch.arange(tokens)
    lines = mask[0, 0, 1:]
    assert torch.equal(lines[:, 0], (index - 99).clamp(min=0).int()) and torch.equal(lines[:, 1], index.int() + 1)


LAYER = nn.Module()


def called(mask: Tensor | None = None, heads: int = 2, tokens: int = 6, **options: Any) -> Tensor:
    q, k, v = torch.randn(3, 2, heads, tokens, 8, generator=torch.Generator().manual_seed(0))
    return attention_forward(LAYER, q, k, v, mask, **options)[0]


def test_dense_masks() -> None:
    """Of somebody's own making: bool or additive, in which the same keys are hidden from many queries."""
    generator = torch.Generator().manual_seed(1)
    seen = torch.rand(2, 1, 6, 6, generator=generator) < 0.6
    seen[0, 0, 2] = False
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, seen).nan_to_num().transpose(1, 2)
    lowest = torch.finfo(torch.float32).min
    for mask in (
        seen,
        torch.where(seen, 0.0, lowest),
        torch.where(seen, 0.0, -torch.inf),
        torch.where(seen, 0.0, -1e4),
    ):
        torch.testing.assert_close(called(mask, is_causal=False), expected, rtol=1e-5, atol=1e-6)
    for part in (seen[:, :, :1], seen[:1]):  # the same for all queries, or for all rows
        expected = nn.functional.scaled_dot_product_attention(q, k, v, part).transpose(1, 2)
        torch.testing.assert_close(called(part, is_causal=False), expected.nan_to_num(), rtol=1e-5, atol=1e-6)
    seen[1, 0, :, 0] = ~seen[1, 0, :, 0]  # in place: what was computed from it is stale
    expected = nn.functional.scaled_dot_product_attention(q, k, v, seen).nan_to_num().transpose(1, 2)
    torch.testing.assert_close(called(seen, is_causal=False), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_attentions": True}, "output_attentions: expected False"),
        ({"position_bias": torch.zeros(1, 2, 6, 6)}, "position_bias: expected no tensor that attn_implementation='mmk"),
        ({"mask": torch.randn(2, 1, 6, 6)}, "attention_mask: expected 0 where a key is seen, .*, got a bias"),
        (
            {"mask": torch.ones(2, 2, 6, 6, dtype=torch.bool)},
            r"attention_mask: expected a mask \[B, 1, 6, 6\] .*, got \[2, 2",
        ),
        ({"is_causal": False, "sliding_window": 3}, "sliding_window: expected a mask with it .*, got 3 without"),
        (
            {"cu_seq_lens_q": torch.tensor([0, 6], dtype=torch.int32)},
            "cu_seq_lens_q: expected .* one row, got one of 2",
        ),
    ],
)
def test_what_is_not_supported_is_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        called(**options)


def test_patterns_that_no_mask_describes() -> None:
    seen = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    with pytest.raises(ValueError, match="attention_mask: expected an interval of keys for each query, or at most 31"):
        called(seen, tokens=64)
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected boundaries from 0 to 6, the tokens here, got 0 to 5"):
        attention_forward(LAYER, q, k, v, None, cu_seq_lens_q=torch.tensor([0, 5]))
    with pytest.raises(
        ValueError, match="attention_mask: expected one for 2 queries and 6 keys of a causal call, got None"
    ):
        attention_forward(LAYER, q[:, :, :2], k, v, None, is_causal=True)


def test_boundaries_of_a_row() -> None:
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    two, late, three = torch.tensor([0, 4, 6]), torch.tensor([1, 4, 6]), torch.tensor([0, 2, 4, 6])
    with pytest.raises(ValueError, match="cu_seq_lens_q: expected boundaries from 0 to 6, the tokens here, got 1 to 6"):
        attention_forward(LAYER, q, k, v, None, cu_seq_lens_q=late)
    with pytest.raises(ValueError, match="cu_seq_lens_k: expected 3 boundaries like cu_seq_lens_q, got 4"):
        attention_forward(LAYER, q, k, v, None, cu_seq_lens_q=two, cu_seq_lens_k=three)
    mask = make_mask(1, 6, 6, device="cpu")
    out = attention_forward(LAYER, q, k, v, mask, cu_seq_lens_q=two, cu_seq_lens_k=two)[0]
    others = attention_forward(LAYER, q, k, v, mask, cu_seq_lens_q=two, cu_seq_lens_k=torch.tensor([0, 1, 6]))[0]
    assert not torch.allclose(out, others)  # not what was computed for other boundaries


def test_models_that_compute_attention_by_themselves() -> None:
    config = transformers.BloomConfig(vocab_size=100, hidden_size=32, n_layer=1, n_head=4)
    model = transformers.BloomModel._from_config(config, attn_implementation="mmkernels")
    for tokens in (3, 4, 9):
        with pytest.raises(
            ValueError, match="attn_implementation: expected 'eager' for bloom, which computes attention"
        ):
            model(text(1, tokens), attention_mask=torch.ones(1, tokens, dtype=torch.long))


def test_a_mask_of_which_a_part_is_passed_on() -> None:
    mask = make_mask(1, 6, 6, attention_mask=torch.tensor([[1, 1, 0, 0, 1, 1]]))
    q, k, v = torch.randn(3, 1, 2, 6, 8)
    for part in (slice(-6, None), slice(0, 6), slice(-3, None)):
        with pytest.raises(ValueError, match="or only a part of it passed on"):
            attention_forward(LAYER, q[:, :, part], k, v, mask[:, :, part])
    logits = torch.randn(1, 2, 6, 4)
    with pytest.raises(RuntimeError, match="must match"):  # a model that adds it to its logits
        logits + mask


def test_positions_that_jump_are_of_one_sample() -> None:
    """With a cache; without one transformers itself takes every jump for another sample's beginning."""
    ids, jumps = text(1, 9), torch.tensor([[2, 3, 4, 5, 9, 10, 11, 20, 21]])
    found, expected = (
        built("llama", which)(ids, position_ids=jumps, past_key_values=transformers.DynamicCache()).logits
        for which in ("mmkernels", "eager")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_sinks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The logits of GPT-OSS's sinks."""
    sink = torch.tensor([0.3, -1.0])
    q, k, v = torch.randn(3, 2, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    logits = q @ k.mT / 8**0.5
    logits = torch.cat([logits, sink[None, :, None, None].expand(2, -1, 6, 1)], -1)
    expected = (logits.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    torch.testing.assert_close(called(is_causal=False, s_aux=sink), expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_callable_mask_function(monkeypatch: Any) -> None:
    """Of a model's own, over numbers instead of tensors."""

    def function(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) | ((query < 3) & (key < 3))

    for use_vmap in (False, True):
        mask = make_mask(2, 6, 6, mask_function=function, use_vmap=use_vmap, device="cpu")
        assert mask[1, 0, 1:, 1].tolist() == [3, 3, 3, 4, 5, 6] and mask[1, 0, 1:, 0].tolist() == [0] * 6
