"""Models of transformers that train in milliseconds, and samples for them: one of each architecture that counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

__all__ = ["MODELS", "Tiny", "built", "text"]

WORDS, IMAGE, START, END = 90, 95, 96, 97  # ids below WORDS are words
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
OF_QWEN = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 98}


@dataclass
class Tiny:
    """An architecture.

    Args:
        model: its class.
        config: its configuration.
        sample: seed -> the inputs of one sample, with a batch dimension.
        output: what of the output is compared, [1, tokens, ...] of a sample.
        packable: whether several samples fit in one row: models of one stream of tokens.
    """

    model: Any
    config: Callable[[], Any]
    sample: Callable[[int], dict[str, Tensor]]
    output: Callable[[Any], Tensor]
    packable: bool = True


def text(seed: int, tokens: int | None = None) -> Tensor:
    """Words [1, 3 to 12]."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(3, 13, (), generator=generator)) if tokens is None else tokens
    return torch.randint(3, WORDS, (1, count), generator=generator)


def pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))


def _words(seed: int) -> dict[str, Tensor]:
    return {"input_ids": text(seed)}


def _pictures(seed: int) -> dict[str, Tensor]:
    return {"pixel_values": pixels(seed, 1, 3, 16, 16)}


def _pair(seed: int) -> dict[str, Tensor]:
    ids = torch.cat([text(seed), torch.tensor([[2]])], 1)
    return {"input_ids": ids, "pixel_values": pixels(seed, 1, 3, 16, 16)}


def _beside_image(tokens: int, types: bool = False) -> Callable[[int], dict[str, Tensor]]:
    """Words, an image of so many tokens, words."""

    def sample(seed: int) -> dict[str, Tensor]:
        image = torch.full((1, tokens), IMAGE)
        ids = torch.cat([text(seed, 1 + seed % 3), image, text(seed + 50)], 1)
        inputs = {"input_ids": ids, "pixel_values": pixels(seed, 1, 3, 16, 16)}
        return inputs | ({"token_type_ids": (ids == IMAGE).long()} if types else {})

    return sample


def _prefix(seed: int) -> dict[str, Tensor]:
    """An image and words that all see each other, then words that see what is before them."""
    inputs = _beside_image(4)(seed)
    types = torch.zeros_like(inputs["input_ids"])
    types[:, -2:] = 1
    return inputs | {"token_type_ids": types}


def _of_qwen(seed: int) -> dict[str, Tensor]:
    """Two images of different sizes among words."""
    grid = torch.tensor([[1, 4, 4], [1, 2, 4 + 2 * (seed % 3)]])
    parts = [text(seed, 2)]
    for count in (grid.prod(1) // 4).tolist():
        parts += [torch.tensor([[START]]), torch.full((1, count), IMAGE), torch.tensor([[END]]), text(seed + 70, 2)]
    ids = torch.cat(parts, 1)
    patches = pixels(seed, int(grid.prod(1).sum()), 3 * 2 * 4 * 4)
    types = (ids == IMAGE).int()
    return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": types}


def _of_idefics(seed: int) -> dict[str, Tensor]:
    inputs = _beside_image(4)(seed)
    return inputs | {"pixel_values": inputs["pixel_values"][None]}


def _of_mllama(seed: int) -> dict[str, Tensor]:
    """Two images of one or two tiles; words see the last before them."""
    first, second = text(seed, 3), text(seed + 30, 4)
    ids = torch.cat([torch.tensor([[IMAGE]]), first, torch.tensor([[IMAGE]]), second], 1)
    sees = torch.zeros(1, ids.shape[1], 2, 2, dtype=torch.long)
    sees[:, :4, 0, : 1 + seed % 2] = 1
    sees[:, 4:, 1, :2] = 1
    return {
        "input_ids": ids,
        "pixel_values": pixels(seed, 1, 2, 2, 3, 16, 16),
        "aspect_ratio_ids": torch.tensor([[1 + seed % 2, 2]]),
        "aspect_ratio_mask": torch.tensor([[[1, seed % 2], [1, 1]]]),
        "cross_attention_mask": sees,
    }


def _logits(out: Any) -> Tensor:
    return out.logits


def _hidden(out: Any) -> Tensor:
    return out.last_hidden_state


def _embeddings(out: Any) -> Tensor:
    return torch.stack([out.text_embeds, out.image_embeds], 1)


def _llava() -> Any:
    vision = hf.CLIPVisionConfig(**VISION)
    return hf.LlavaConfig(
        vision_config=vision, text_config=hf.LlamaConfig(**GROUPED), image_token_id=IMAGE, vision_feature_layer=-1
    )


def _paligemma() -> Any:
    return hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=hf.GemmaConfig(**GROUPED | {"head_dim": 8}),
        image_token_id=IMAGE,
        projection_dim=32,
    )


def _gemma3() -> Any:
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    return hf.Gemma3Config(
        vision_config=hf.SiglipVisionConfig(**VISION | {"image_size": 16, "patch_size": 4}, vision_use_head=False),
        text_config=hf.Gemma3TextConfig(
            **GEMMA | {"num_hidden_layers": 3}, sliding_window=5, layer_types=layers, use_bidirectional_attention=False
        ),
        image_token_id=IMAGE,
        boi_token_id=START,
        eoi_token_id=END,
        mm_tokens_per_image=4,
    )


def _qwen2_vl() -> Any:
    return hf.Qwen2VLConfig(
        vision_config=QWEN_VISION | {"embed_dim": 16, "hidden_size": 32},
        text_config=GROUPED | {"rope_parameters": ROTARY},
        **OF_QWEN,
    )


def _qwen2_5_vl() -> Any:
    vision = QWEN_VISION | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24, "window_size": 16}
    return hf.Qwen2_5_VLConfig(
        vision_config=vision | {"fullatt_block_indexes": [1]},
        text_config=GROUPED | {"rope_parameters": ROTARY},
        **OF_QWEN,
    )


def _qwen3_vl() -> Any:
    vision = QWEN_VISION | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
    return hf.Qwen3VLConfig(
        vision_config=vision | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        text_config=GROUPED | {"rope_parameters": ROTARY | {"mrope_interleaved": True}, "head_dim": 8},
        **OF_QWEN,
    )


def _idefics3() -> Any:
    return hf.Idefics3Config(
        vision_config=VISION | {"patch_size": 4},
        text_config=hf.LlamaConfig(**GROUPED),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )


def _mllama() -> Any:
    vision = VISION | {"attention_heads": 2, "num_global_layers": 1, "max_num_tiles": 2, "vision_output_dim": 64}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]]}
    of_text = GROUPED | {
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    return hf.MllamaConfig(vision_config=vision, text_config=of_text, image_token_index=IMAGE)


MODELS: dict[str, Tiny] = {
    "bert": Tiny(hf.BertModel, lambda: hf.BertConfig(**TEXT), _words, _hidden),
    "vit": Tiny(hf.ViTModel, lambda: hf.ViTConfig(**VISION), _pictures, _hidden, packable=False),
    "clip": Tiny(
        hf.CLIPModel,
        lambda: hf.CLIPConfig(text_config=TEXT | {"projection_dim": 8}, vision_config=VISION, projection_dim=8),
        _pair,
        _embeddings,
        packable=False,
    ),
    "siglip": Tiny(
        hf.SiglipModel,
        lambda: hf.SiglipConfig(text_config=TEXT, vision_config=VISION),
        _pair,
        _embeddings,
        packable=False,
    ),
    "llama": Tiny(hf.LlamaForCausalLM, lambda: hf.LlamaConfig(**GROUPED), _words, _logits),
    "mistral": Tiny(hf.MistralForCausalLM, lambda: hf.MistralConfig(**GROUPED, sliding_window=4), _words, _logits),
    "qwen2": Tiny(hf.Qwen2ForCausalLM, lambda: hf.Qwen2Config(**GROUPED), _words, _logits),
    "gemma2": Tiny(hf.Gemma2ForCausalLM, lambda: hf.Gemma2Config(**GEMMA, sliding_window=4), _words, _logits),
    "gemma3": Tiny(hf.Gemma3ForConditionalGeneration, _gemma3, _beside_image(4, types=True), _logits),
    "paligemma": Tiny(hf.PaliGemmaForConditionalGeneration, _paligemma, _prefix, _logits),
    "llava": Tiny(hf.LlavaForConditionalGeneration, _llava, _beside_image(4), _logits),
    "qwen2_vl": Tiny(hf.Qwen2VLForConditionalGeneration, _qwen2_vl, _of_qwen, _logits),
    "qwen2_5_vl": Tiny(hf.Qwen2_5_VLForConditionalGeneration, _qwen2_5_vl, _of_qwen, _logits),
    "qwen3_vl": Tiny(hf.Qwen3VLForConditionalGeneration, _qwen3_vl, _of_qwen, _logits),
    "idefics3": Tiny(hf.Idefics3ForConditionalGeneration, _idefics3, _of_idefics, _logits),
    "mllama": Tiny(hf.MllamaForConditionalGeneration, _mllama, _of_mllama, _logits),
}


def built(name: str, implementation: str) -> Any:
    """A model in evaluation mode (no dropout), with the same weights for every implementation."""
    torch.manual_seed(0)
    model = MODELS[name].model._from_config(copy.deepcopy(MODELS[name].config()), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():  # biases, gates and the like begin at 0, which hides what passes them
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()
