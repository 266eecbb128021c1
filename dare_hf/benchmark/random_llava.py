"""The model of the benchmarks: a random Llama, of 109.5M parameters, behind LLaVA's interface.

Image features are handed in, so that no vision tower is run.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from dare_hf.errors import DareConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}
IMAGE_ID, _FIRST_TEXT_ID = 3, 10
_STD = 0.02


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes:
        tokens: Prompt tokens of the longest row; nine in ten of a row are vision.
        batch: Rows.
        ragged: Whether rows end at other lengths, down to half, padded on the left.
        pairs: Timed rounds; a round is one run (decode: one step) of every system.
        new_tokens: Tokens that the generate series writes.
        hops: Hops that the hops series closes.
        threads: CPU threads.
        seed: Seed of weights, scorer and inputs.
        device: "cpu" or "cuda".
        dtype: A name in DTYPES.
        attn: An attention implementation of transformers.
        layers: Decoder layers.
        hidden: Width of the hidden state, a multiple of `head_dim`.
        head_dim: Width of a head.
        kv_heads: Key-value heads; None as many as query heads.
        intermediate: Width of the MLP.
        vocab: Rows of the embedding, tied to the lm_head.
        clock: "wall", or "cpu": seconds that the running thread had a core, which a busy machine
            disturbs less; of one thread on a CPU.
        check_tokens: Prompt tokens, all rows together, up to which the timed run itself is held
            against the oracle; a longer one's setting is, at a quarter of them a row.
    """

    tokens: int = 640
    batch: int = 1
    ragged: bool = False
    pairs: int = 9
    new_tokens: int = 32
    hops: int = 8
    threads: int = 1
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    attn: str = "sdpa"
    layers: int = 12
    hidden: int = 768
    head_dim: int = 64
    kv_heads: int | None = None
    intermediate: int = 2048
    vocab: int = 32000
    clock: str = "wall"
    check_tokens: int = 2600

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        if not self.ragged or self.batch == 1:
            return [self.tokens] * self.batch
        shorter = self.tokens // 2
        return [self.tokens - shorter * row // (self.batch - 1) for row in range(self.batch)]

    def check(self) -> None:
        """Refuse what cannot be run here.

        Raises:
            DareConfigError: Unknown dtype, no such device here, or a width of no whole heads.
        """
        if self.dtype not in DTYPES:
            raise DareConfigError(f"dtype: expected one of {list(DTYPES)}, got {self.dtype!r}")
        cuda = self.device.startswith("cuda")
        if not cuda and self.device != "cpu":
            raise DareConfigError(f"device: expected cpu or cuda, got {self.device!r}")
        if cuda and not torch.cuda.is_available():
            raise DareConfigError(f"device: expected one that is there, got {self.device!r}")
        if self.clock not in CLOCKS:
            raise DareConfigError(f"clock: expected one of {list(CLOCKS)}, got {self.clock!r}")
        if self.clock == "cpu" and (cuda or self.threads > 1):
            raise DareConfigError(
                "clock: expected 'wall' with several threads or on a GPU, whose work no thread's "
                f"own clock sees; got {self.clock!r}"
            )
        if self.hidden % self.head_dim:
            raise DareConfigError(
                f"width: expected a multiple of {self.head_dim}, which a head has; "
                f"got {self.hidden}"
            )


def vision_of(length: int) -> int:
    """Vision tokens of a row of `length`."""
    return length * 9 // 10


def build_model(setting: Setting) -> LlavaForConditionalGeneration:
    """The random model; its vision tower is never run and as small as can be."""
    torch.manual_seed(setting.seed)
    heads = setting.hidden // setting.head_dim
    text = LlamaConfig(
        vocab_size=setting.vocab,
        hidden_size=setting.hidden,
        intermediate_size=setting.intermediate,
        num_hidden_layers=setting.layers,
        num_attention_heads=heads,
        num_key_value_heads=setting.kv_heads or heads,
        head_dim=setting.head_dim,
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
        image_token_index=IMAGE_ID,
        image_seq_length=vision_of(setting.tokens),
        tie_word_embeddings=True,
    )
    with torch.device(setting.device):  # a model of 7B is filled where it will run
        model = AutoModelForImageTextToText.from_config(
            config, dtype=DTYPES[setting.dtype], attn_implementation=setting.attn
        )
    model.generation_config.eos_token_id = None  # every run writes as many tokens
    return model.eval()


def build_inputs(setting: Setting) -> dict[str, Any]:
    """Rows of a few text tokens, the image, the other text tokens."""
    generator = torch.Generator().manual_seed(setting.seed)
    shape = (setting.batch, setting.tokens)
    ids = torch.randint(_FIRST_TEXT_ID, setting.vocab, shape, generator=generator)
    real, features = torch.ones_like(ids), []
    for row, length in enumerate(setting.lengths):
        pads, vision = setting.tokens - length, vision_of(length)
        before = pads + (length - vision) // 8
        ids[row, before : before + vision] = IMAGE_ID
        real[row, :pads] = 0
        one = torch.randn(vision, setting.hidden, generator=generator) * _STD
        features.append(one.to(setting.device, DTYPES[setting.dtype]))
    # LLaVA concatenates a list of images, whatever the annotation says (transformers 5.23).
    image = BaseModelOutputWithPooling(pooler_output=features)  # ty: ignore[invalid-argument-type]
    inputs = {"input_ids": ids.to(setting.device), "mm_encoder_outputs": {"image": image}}
    return inputs | ({"attention_mask": real.to(setting.device)} if setting.ragged else {})


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
