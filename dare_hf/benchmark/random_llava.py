"""The model of the prefill bench: a random Llama of 109.5M parameters behind LLaVA's interface.

Image features are handed in, so that no vision tower is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_IMAGE_ID, _FIRST_TEXT_ID = 3, 10
_STD = 0.02


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        tokens: Prompt tokens; nine in ten are vision.
        pairs: Timed pairs of each series.
        threads: CPU threads.
        seed: Seed of weights, scorer and inputs.
        device: "cpu" or "cuda".
        dtype: A name in DTYPES.
        layers: Decoder layers.
        hidden: Width of the hidden state, a multiple of 64.
        intermediate: Width of the MLP.
        vocab: Rows of the embedding, tied to the lm_head.
    """

    tokens: int = 640
    pairs: int = 9
    threads: int = 1
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    layers: int = 12
    hidden: int = 768
    intermediate: int = 2048
    vocab: int = 32000

    @property
    def vision(self) -> int:
        """Vision tokens of the prompt."""
        return self.tokens * 9 // 10


def build_model(setting: Setting) -> LlavaForConditionalGeneration:
    """The random model; its vision tower is never run and as small as can be."""
    torch.manual_seed(setting.seed)
    heads = setting.hidden // 64
    text = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(4096, setting.tokens + 1),
        initializer_range=_STD,
        tie_word_embeddings=True,
    )
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        image_size=8,
        patch_size=8,
    )
    config = LlavaConfig(
        text_config=text,
        vision_config=vision,
        image_token_index=_IMAGE_ID,
        image_seq_length=setting.vision,
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config).eval()
    return model.to(setting.device, DTYPES[setting.dtype])


def build_inputs(setting: Setting, model: nn.Module) -> dict[str, Any]:
    """One row: a few text tokens, the image, the other text tokens."""
    generator = torch.Generator().manual_seed(setting.seed)
    ids = torch.randint(_FIRST_TEXT_ID, setting.vocab, (1, setting.tokens), generator=generator)
    before = (setting.tokens - setting.vision) // 8
    ids[:, before : before + setting.vision] = _IMAGE_ID
    features = torch.randn(setting.vision, setting.hidden, generator=generator) * _STD
    features = features.to(setting.device, DTYPES[setting.dtype])
    # LLaVA concatenates a list of images, whatever the annotation says (transformers 5.23).
    image = BaseModelOutputWithPooling(pooler_output=[features])  # ty: ignore[invalid-argument-type]
    return {
        "input_ids": ids.to(setting.device),
        "mm_encoder_outputs": {"image": image},
        "use_cache": True,
        "logits_to_keep": 1,
    }


def linear_scorer(setting: Setting) -> Callable[..., Tensor]:
    """What a trained router computes, with random weights: sigmoid(w_m . rmsnorm(x))."""
    generator = torch.Generator().manual_seed(setting.seed + 1)
    weight = torch.randn(setting.layers, 2, setting.hidden, generator=generator)
    weight = (weight * setting.hidden**-0.5).to(setting.device)

    def score(
        hidden: Tensor, modality: Tensor, *, layer: int, hop: Tensor, positions: Tensor
    ) -> Tensor:
        normed = torch.nn.functional.rms_norm(hidden.float(), hidden.shape[-1:], eps=1e-6)
        scores = torch.sigmoid(normed @ weight[layer].T)
        return torch.where(modality == 1, scores[..., 1], scores[..., 0])

    return score
