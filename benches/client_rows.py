"""The rows of clients.py: each library's own implementation, and ours."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # one model of every architecture

__all__ = ["ROWS", "Row"]

Side = Callable[[], tuple[list[Tensor], list[Tensor]]]  # -> losses or outputs, gradients
ROWS_OF_BATCH, WIDTH = 4096, 512


@dataclass(frozen=True)
class Row:
    """A loss or a model.

    Args:
        name: on the command line.
        library: its distribution.
        what: in the table.
        lines: of a user's code that change.
        make: -> theirs and ours.
        timed: whether it is large enough to be.
    """

    name: str
    library: str
    what: str
    lines: int
    make: Callable[[], tuple[Side, Side]]
    timed: bool = True


def features(rows: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, width, generator=generator), dim=-1)


def side_of(loss: Callable[[], Any], leaves: list[Tensor]) -> Side:
    def run() -> tuple[list[Tensor], list[Tensor]]:
        out = loss()
        values = list(out) if isinstance(out, tuple) else [out]
        grads = torch.autograd.grad(torch.stack(values).sum(), leaves)
        return [value.detach() for value in values], list(grads)

    return run


def open_clip_loss(name: str) -> Callable[[], tuple[Side, Side]]:
    def make() -> tuple[Side, Side]:
        import open_clip.loss

        from mmkernels.integrations import open_clip as ours

        images, texts = (features(ROWS_OF_BATCH, WIDTH, seed).requires_grad_() for seed in (0, 1))
        scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
        args: list[Any] = [images, texts, scale]
        if name == "SigLipLoss":
            args.append(bias)
        if name == "DistillClipLoss":
            args += [features(ROWS_OF_BATCH, WIDTH, 2), features(ROWS_OF_BATCH, WIDTH, 3), torch.tensor(50.0)]
        leaves = [x for x in args if x.requires_grad]
        calls = [functools.partial(getattr(module, name)(), *args) for module in (open_clip.loss, ours)]
        return side_of(calls[0], leaves), side_of(calls[1], leaves)

    return make


def ranking_loss(columns: int, **options: Any) -> Callable[[], tuple[Side, Side]]:
    def make() -> tuple[Side, Side]:
        from sentence_transformers.sentence_transformer import losses as theirs

        from mmkernels.integrations import sentence_transformers as ours

        leaves = [features(ROWS_OF_BATCH // 2, WIDTH, seed).requires_grad_() for seed in range(columns)]
        losses = [m.MultipleNegativesRankingLoss(nn.Identity(), **options) for m in (theirs, ours)]
        calls = [functools.partial(loss.compute_loss_from_embeddings, leaves, None) for loss in losses]
        return side_of(calls[0], leaves), side_of(calls[1], leaves)

    return make


def gist_loss() -> tuple[Side, Side]:
    """Its loss stage, between the embeddings."""
    from sentence_transformers.sentence_transformer import losses as theirs

    from mmkernels.integrations import sentence_transformers as ours

    rows = ROWS_OF_BATCH // 16  # theirs holds [mini-batch, rows, width]
    leaves = [features(rows, WIDTH, seed).requires_grad_() for seed in range(3)]
    guide = [features(rows, WIDTH, seed) for seed in range(7, 10)]
    settings = {"temperature": 0.05, "mini_batch_size": 32, "margin_strategy": "absolute", "margin": 0.05}
    settings |= {"contrast_anchors": True, "contrast_positives": True, "gather_across_devices": False}
    sides = []
    for module in (theirs, ours):
        loss = module.CachedGISTEmbedLoss.__new__(module.CachedGISTEmbedLoss)
        nn.Module.__init__(loss)
        loss.show_progress_bar, loss.similarity_fct = False, nn.CosineSimilarity(dim=-1)
        loss.cross_entropy_loss = nn.CrossEntropyLoss()
        for key, value in settings.items():
            setattr(loss, key, value)
        call = functools.partial(loss.calculate_loss, [[x] for x in leaves], [[x] for x in guide])
        sides.append(side_of(call, leaves))
    return sides[0], sides[1]


def of_model(models: list[Any], inputs: list[dict[str, Any]], output: Callable[[Any], Tensor]) -> tuple[Side, Side]:
    """Two models with the same weights, each with its form of the input; outputs are compared as `output` returns."""

    def of_one(model: Any, given: dict[str, Any]) -> Side:
        leaves = [p for p in model.parameters() if p.requires_grad]

        def run() -> tuple[list[Tensor], list[Tensor]]:
            out = output(model(**given))
            weights = torch.linspace(-1, 1, out.numel()).view_as(out)
            grads = torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True)
            return [out.detach()], [grad for grad in grads if grad is not None]

        return run

    return of_one(models[0], inputs[0]), of_one(models[1], inputs[1])


def built(kind: Any, config: Any, implementation: str) -> Any:
    import transformers

    from mmkernels.integrations.transformers import register

    register()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    return kind._from_config(copy.deepcopy(config), attn_implementation=implementation).eval()


def of_architecture(name: str) -> Callable[[], tuple[Side, Side]]:
    """Tiny: what counts is that every line of it runs. Against the model's own default implementation."""

    def make() -> tuple[Side, Side]:
        from integrations import tiny_models

        import mmkernels.integrations.transformers as ours

        ours.register()
        tiny = tiny_models.MODELS[name]
        models = [tiny_models.built(name, each) for each in ("eager", "mmkernels")]
        return of_model(models, [tiny.sample(1)] * 2, tiny.output)

    return make


def llama(window: int | None, packed: bool) -> Callable[[], tuple[Side, Side]]:
    """Eight samples of 40 to 600 tokens: padded to the longest, or in one row."""

    def make() -> tuple[Side, Side]:
        import transformers as hf

        shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 1000}
        shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 4096}
        kind, config = hf.LlamaForCausalLM, hf.LlamaConfig(**shape)
        if window is not None:
            kind, config = hf.MistralForCausalLM, hf.MistralConfig(**shape, sliding_window=window)
        lengths = [40, 120, 200, 280, 360, 440, 520, 600]
        generator = torch.Generator().manual_seed(0)
        samples = [torch.randint(1000, (length,), generator=generator) for length in lengths]
        if packed:
            positions = torch.cat([torch.arange(length) for length in lengths])[None]
            given = {"input_ids": torch.cat(samples)[None], "position_ids": positions, "use_cache": False}
            models = [built(kind, config, which) for which in ("sdpa", "mmkernels")]
            return of_model(models, [given] * 2, lambda out: out.logits)
        ids = nn.utils.rnn.pad_sequence(samples, batch_first=True)
        mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
        given = {"input_ids": ids, "attention_mask": mask}
        models = [built(kind, config, which) for which in ("sdpa", "mmkernels")]
        return of_model(models, [given] * 2, lambda out: out.logits[mask.bool()])

    return make


def qwen_vision() -> tuple[Side, Side]:
    """The vision tower with 16 images: one by one with sdpa, at once with ours."""
    import transformers as hf
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel as Tower

    config = hf.Qwen2VLConfig(vision_config={"depth": 4, "embed_dim": 256, "num_heads": 8, "hidden_size": 256})
    grid = torch.tensor([[1, 8 + 2 * (i % 5), 8 + 2 * (i % 3)] for i in range(16)])
    patches = torch.randn(int(grid.prod(1).sum()), 1176, generator=torch.Generator().manual_seed(0))
    models = [built(Tower, config.vision_config, which) for which in ("sdpa", "mmkernels")]
    for model in models:
        model(patches, grid)  # ours meets the tower
    return of_model(models, [{"hidden_states": patches, "grid_thw": grid}] * 2, lambda out: out.pooler_output)


def packing() -> tuple[Side, Side]:
    """20,000 rows of 8 to 4,000 tokens, without a cache. What is compared: how many tokens are there in the end."""
    import datasets
    import trl

    from mmkernels.integrations.datasets import pack_dataset

    datasets.disable_caching()
    datasets.disable_progress_bars()
    lengths = (8 * torch.rand(20_000, generator=torch.Generator().manual_seed(0)).pow(-0.7)).long().clamp(max=4000)
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths.tolist()]})

    def counted(pack: Callable[..., Any], **options: Any) -> Side:
        def run() -> tuple[list[Tensor], list[Tensor]]:
            packed = pack(rows, 2048, **options)
            tokens = torch.tensor(float(sum(map(sum, packed["seq_lengths"][:]))))
            return [tokens], [tokens]

        return run

    return counted(trl.pack_dataset, strategy="bfd_split"), counted(pack_dataset, oversize="split")


LOSSES = [
    Row("clip_loss", "open_clip_torch", "ClipLoss, N=4096", 1, open_clip_loss("ClipLoss")),
    Row("siglip_loss", "open_clip_torch", "SigLipLoss, N=4096", 1, open_clip_loss("SigLipLoss")),
    Row("distill_loss", "open_clip_torch", "DistillClipLoss, N=4096", 1, open_clip_loss("DistillClipLoss")),
    Row("mnrl", "sentence-transformers", "MultipleNegativesRankingLoss, three columns, N=2048", 1, ranking_loss(3)),
    Row(
        "mnrl_symmetric",
        "sentence-transformers",
        "the same in two directions",
        1,
        ranking_loss(3, directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
    ),
    Row(
        "mnrl_gte",
        "sentence-transformers",
        "the same in four directions (GTE)",
        1,
        ranking_loss(3, directions=("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")),
    ),
    Row(
        "mnrl_hard",
        "sentence-transformers",
        "the same with hardness weights",
        1,
        ranking_loss(3, hardness_mode="all_negatives", hardness_strength=9.0),
    ),
    Row("gist", "sentence-transformers", "CachedGISTEmbedLoss, three columns, N=256: loss stage", 1, gist_loss),
]
MODELS = [
    Row("llama_padded", "transformers", "Llama, padded batch of 8, against sdpa", 2, llama(None, False)),
    Row("llama_packed", "transformers", "Llama, 8 samples in a row, against sdpa", 2, llama(None, True)),
    Row("mistral_packed", "transformers", "Mistral, window 128, 8 samples in a row, sdpa", 2, llama(128, True)),
    Row("qwen_vision", "transformers", "Qwen2-VL's vision tower, 16 images, against sdpa", 2, qwen_vision),
]
PACKING = [Row("packing", "trl", "pack_dataset, 20,000 rows into 2,048 tokens: kept tokens", 1, packing)]
ARCHITECTURES = (
    "bert",
    "vit",
    "clip",
    "siglip",
    "llama",
    "mistral",
    "qwen2",
    "gemma2",
    "gemma3",
    "paligemma",
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "mllama",
)
ROWS = [
    *LOSSES,
    *MODELS,
    *PACKING,
    *(
        Row(name, "transformers", f"{name}, tiny, against eager", 2, of_architecture(name), False)
        for name in ARCHITECTURES
    ),
]
