"""`PackedBatch.to_hf` in models of the installed transformers, and M-RoPE positions against their `get_rope_index`."""

import functools
import types

import pytest
import torch
from torch import Tensor

from mmkernels import AttentionMask, Media, Modality, PackedBatch, attention

transformers = pytest.importorskip("transformers", minversion="5.18", reason="transformers >= 5.18 is not installed")

IMAGE, AUDIO, VIDEO = Modality.IMAGE, Modality.AUDIO, Modality.VIDEO
VISION_START, VISION_END, AUDIO_START, AUDIO_END, IMAGE_PAD, VIDEO_PAD, AUDIO_PAD = range(56, 63)
PLACEHOLDER = {IMAGE: IMAGE_PAD, VIDEO: VIDEO_PAD, AUDIO: AUDIO_PAD}
VARLEN = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def ours(module, query, key, value, attention_mask, scaling, cu_seq_lens_q=None, is_causal=None, **_):
    """This package's attention for `AttentionInterface`: [1, H, T, D] -> [1, T, H, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    cu_seqlens = torch.tensor([0, len(q)], dtype=torch.int32) if cu_seq_lens_q is None else cu_seq_lens_q
    mask = AttentionMask.packed(cu_seqlens, causal=module.is_causal if is_causal is None else is_causal)
    return attention(q, k, v, mask, scale=scaling)[None], None


transformers.AttentionInterface.register("mmkernels_ours", ours)
TEXT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TEXT |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
TEXT |= {"bos_token_id": None, "eos_token_id": None}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
VISION = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
TOKENS = {"image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD}
TOKENS |= {"vision_start_token_id": VISION_START, "vision_end_token_id": VISION_END}


def llama(implementation):
    return transformers.LlamaForCausalLM._from_config(
        transformers.LlamaConfig(**TEXT), attn_implementation=implementation
    )


def qwen2_vl(implementation):
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | {"rope_parameters": MROPE}, vision_config=VISION | {"spatial_merge_size": 2}, **TOKENS
    )
    return transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=implementation)


def text(n: int) -> Tensor:
    return torch.randint(0, 50, (n,))


def media(modality: int, t: int, h: int, w: int, seconds: float | None = None) -> Media:
    """Pixels, 2 x 4 x 4 per patch."""
    values = torch.randn(t * h * w, 3 * 2 * 4 * 4)
    return Media(modality, values, (t, h, w), merge_size=2, time_step=seconds)


def texts() -> list:
    return [text(5), text(1), text(9), text(1), text(3)]


def mixed() -> list:
    return [
        [text(3), media(IMAGE, 1, 4, 6), text(4)],
        [text(4)],
        [media(VIDEO, 5, 4, 4), text(5)],
        [text(1), media(IMAGE, 1, 2, 2), text(2), media(VIDEO, 2, 2, 4), media(IMAGE, 1, 4, 4), text(1)],
    ]


MODELS = {"llama": (llama, texts, False), "qwen2_vl": (qwen2_vl, mixed, True), "qwen2_vl text": (qwen2_vl, texts, True)}


def pack(samples, **options) -> PackedBatch:
    lengths = [sum(len(p) if isinstance(p, Tensor) else p.length for p in s) for s in map(parts_of, samples)]
    labels = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]
    return PackedBatch.from_samples(samples, labels=labels, placeholder=PLACEHOLDER, **options).validate()


def parts_of(sample) -> list:
    return [sample] if isinstance(sample, Tensor) else sample


def gradient(model, loss) -> Tensor:
    """The gradients of all parameters as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distance(got: Tensor, expected: Tensor) -> float:
    """Close relative to the norm; samples that mix differ by a quarter to a half of it."""
    return float((got - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "mmkernels_ours"])
@pytest.mark.parametrize("model", MODELS)
def test_samples_stay_apart(model, implementation):
    """Logits, loss and gradients of a packed batch equal those of each sample alone, called without packing."""
    build, samples, mrope = MODELS[model]
    network, samples = build(implementation), samples()
    batch = pack(samples, capacity=70, mrope=mrope)
    together = network(**batch.to_hf())
    logits, losses, begin = [], [], 0
    for sample in samples:
        alone = pack([sample], mrope=mrope).to_hf()
        for name in (*VARLEN, "use_cache"):
            alone.pop(name)
        targets = int((alone["labels"][0, 1:] != -100).sum())
        out = network(**alone)
        logits.append(out.logits[0])
        losses += [out.loss * targets] if targets else []
        begin += alone["input_ids"].shape[1]
    real = batch.num_tokens - batch.padding
    assert distance(together.logits[0, :real], torch.cat(logits)) < 1e-6
    mean = sum(losses) / int((batch.to_hf()["labels"] != -100).sum())
    assert distance(together.loss, mean) < 1e-6
    assert distance(gradient(network, together.loss), gradient(network, mean)) < 1e-5


def test_no_cache_is_built():
    """With a cache, eager and sdpa models ignore the packed positions, and samples mix."""
    out = llama("sdpa")(**pack(texts()).to_hf())
    assert out.get("cache") is None and out.get("past_key_values") is None


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_model_with_mrope_and_plain_positions(implementation):
    """It would spread [1, T] over its axes and see no samples in it: to_hf must be told which kind of model it is."""
    network, samples = qwen2_vl(implementation), mixed()
    batch = pack(samples)
    with pytest.raises(ValueError, match=r"mrope: expected True or False .* with images or clips, got None"):
        batch.to_hf()
    begin = 0
    together = network(**batch.to_hf(mrope=True)).logits[0]
    for sample in samples:
        alone = pack([sample])
        logits = network(**alone.to_hf(mrope=True)).logits[0]
        assert distance(together[begin : begin + len(logits)], logits) < 1e-6
        begin += len(logits)


# Positions


def stub(owner, config, **fields):
    """What a model's get_rope_index needs of its self, without the model."""
    self = types.SimpleNamespace(config=config, **fields)
    for name in ("get_vision_position_ids", "get_llm_pos_ids_for_vision", "get_chunked_index"):
        if hasattr(owner, name):
            setattr(self, name, types.MethodType(getattr(owner, name), self))
    return self


def vl_index(family, class_name, sample, rate):
    """For Qwen2-VL, Qwen2.5-VL and Qwen3-VL: token kinds are passed."""
    module = getattr(transformers.models, family)
    owner = getattr(getattr(module, f"modeling_{family}"), class_name)
    vision = types.SimpleNamespace(spatial_merge_size=2, tokens_per_second=rate)
    self = stub(owner, types.SimpleNamespace(vision_config=vision))
    ids, grids, seconds, _ = described(sample)
    kinds = torch.where(ids == IMAGE_PAD, 1, torch.where(ids == VIDEO_PAD, 2, 0))
    timed = {} if rate is None else {"second_per_grid_ts": seconds}
    return owner.get_rope_index(self, ids[None], kinds[None], grids[IMAGE], grids[VIDEO], **timed)[0][:, 0]


def omni_index(family, class_name, sample, rate):
    """For Qwen2.5-Omni and Qwen3-Omni: kinds follow from the ids; the number of frames of a recording is passed."""
    owner = getattr(getattr(getattr(transformers.models, family), f"modeling_{family}"), class_name)
    tokens = {"image_token_id": IMAGE_PAD, "video_token_id": VIDEO_PAD, "audio_token_id": AUDIO_PAD}
    tokens |= {"vision_start_token_id": VISION_START, "audio_start_token_id": AUDIO_START}
    config = types.SimpleNamespace(
        position_id_per_seconds=rate, seconds_per_chunk=2, audio_config=types.SimpleNamespace(n_window=50), **tokens
    )
    ids, grids, seconds, frames = described(sample)
    call = functools.partial(owner.get_rope_index, stub(owner, config, spatial_merge_size=2))
    everything = torch.ones_like(ids)[None]
    return call(ids[None], grids[IMAGE], grids[VIDEO], everything, False, frames, seconds)[0][:, 0].long()


def described(sample):
    """(token ids, modality -> grids, seconds per step of the clips, frames of the recordings) of a sample's parts."""
    ids = PackedBatch.from_samples([sample], placeholder=PLACEHOLDER).tokens
    items = [part for part in sample if isinstance(part, Media)]
    grids = {
        kind: torch.tensor([item.grid_thw for item in items if item.modality == kind]).reshape(-1, 3)
        for kind in (IMAGE, VIDEO)
    }
    seconds = torch.tensor(
        [1.0 if item.time_step is None else item.time_step for item in items if item.modality == VIDEO]
    )
    return ids, grids, seconds, torch.tensor([item.values.shape[0] for item in items if item.modality == AUDIO])


def recording(frames: int, tokens: int) -> list:
    return [torch.tensor([AUDIO_START]), Media(AUDIO, torch.zeros(frames, 1), tokens=tokens), torch.tensor([AUDIO_END])]


def shown(modality: int, t: int, h: int, w: int, seconds: float | None = None) -> list:
    return [torch.tensor([VISION_START]), media(modality, t, h, w, seconds), torch.tensor([VISION_END])]


def conversation(seconds: list[float | None]) -> list:
    """Wide and tall images, clips shorter and longer in time than in space, back to back and behind text."""
    one, two, three = seconds
    return [
        *(text(4), *shown(IMAGE, 1, 4, 12), text(3), *shown(VIDEO, 9, 8, 8, one)),
        *(*shown(VIDEO, 20, 2, 4, two), text(2), *shown(IMAGE, 1, 6, 2), *shown(VIDEO, 2, 6, 4, three), text(5)),
    ]


NO_TIME, FRACTIONS = [None] * 3, [0.28, 1 / 3, 0.7]
WHOLE = [1.0, 2.0, 0.0]  # Qwen3-Omni does not round, so int64 could not match it
# family, class, its function, rule, positions per second, seconds per step of three clips
FAMILIES = [
    ("qwen2_vl", "Qwen2VLModel", vl_index, "spatial", None, NO_TIME),
    ("qwen2_5_vl", "Qwen2_5_VLModel", vl_index, "spatial", 2, FRACTIONS),
    ("qwen2_5_omni", "Qwen2_5OmniPreTrainedModelForConditionalGeneration", omni_index, "largest", 25, FRACTIONS),
    ("qwen3_omni_moe", "Qwen3OmniMoePreTrainedModelForConditionalGeneration", omni_index, "largest", 13, WHOLE),
]


@pytest.mark.parametrize(
    ("family", "class_name", "index", "rule", "rate", "seconds"), FAMILIES, ids=[case[0] for case in FAMILIES]
)
def test_positions_of_each_family(family, class_name, index, rule, rate, seconds):
    samples = [conversation(seconds), [text(7), *shown(IMAGE, 1, 2, 2)], conversation(seconds[::-1])]
    if index is omni_index:
        samples[1] += [text(2), *recording(100, 25 if family == "qwen2_5_omni" else 13), text(3)]
    options = {} if rate is None else {"tokens_per_second": rate}
    batch = PackedBatch.from_samples(samples, mrope=rule, placeholder=PLACEHOLDER, capacity=900, **options)
    expected = [index(family, class_name, sample, rate) for sample in samples]
    real = batch.num_tokens - batch.padding
    assert torch.equal(batch.position_ids[:, :real], torch.cat(expected, 1))


def test_qwen3_vl_has_a_grid_for_each_step():
    """A timestamp precedes each step of a clip: the batch holds each step as a one-step clip, transformers the whole
    clip."""
    steps = [part for second in range(5) for part in (text(3 + second % 2), *shown(VIDEO, 1, 4, 6))]
    sample = [text(4), *shown(IMAGE, 1, 4, 12), *steps, text(5)]
    owner = transformers.models.qwen3_vl.modeling_qwen3_vl.Qwen3VLModel
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2))
    ids, grids, _, _ = described(sample)
    kinds = torch.where(ids == IMAGE_PAD, 1, torch.where(ids == VIDEO_PAD, 2, 0))
    whole = torch.tensor([[5, 4, 6]])
    expected = owner.get_rope_index(stub(owner, config), ids[None], kinds[None], grids[IMAGE], whole)[0][:, 0]
    for rule in ("spatial", "largest"):
        batch = PackedBatch.from_samples([sample], mrope=rule, placeholder=PLACEHOLDER)
        assert torch.equal(batch.position_ids, expected)
