"""4-bit backbones: how they are loaded, and how their gradients stay right.

On CPUs with AVX512-BF16, bitsandbytes (0.50) repacks the weights of a Linear4bit at its first
forward in eval mode without gradients. The backward pass does not know that layout: gradients
through a repacked layer are silently wrong (cosine 0.6 to 0.8 to the right ones).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dare_hf.errors import DareConfigError, DareStateError

if TYPE_CHECKING:
    from torch import nn

# What stays as it is: heads, vision towers and projectors, by the names transformers gives them.
# A list replaces transformers' own default (the head), and names must be whole paths (5.23).
KEPT_MODULES = (
    "lm_head",
    "model.vision_tower",
    "model.visual",
    "model.vision_model",
    "model.vqmodel",
    "model.multi_modal_projector",
    "model.connector",
)


def quantization_config(**overrides: Any) -> Any:
    """nf4 for the decoder layers, as `quantization_config` of from_pretrained.

    Args:
        overrides: Fields of transformers' BitsAndBytesConfig that replace these.

    Raises:
        DareConfigError: bitsandbytes is not installed.
    """
    from importlib.util import find_spec

    import torch
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise DareConfigError(
            "load_in_4bit: expected bitsandbytes to be installed; it is not. Install dare-hf[4bit]"
        )
    settings: dict[str, Any] = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": list(KEPT_MODULES),
    }
    return BitsAndBytesConfig(**(settings | overrides))


def keep_gradients_right(model: nn.Module) -> int:
    """Stop 4-bit layers from repacking their weights; to be called before the first eval forward.

    Args:
        model: A model, 4-bit or not.

    Returns:
        How many layers were set.

    Raises:
        DareStateError: A layer's weights are repacked already.
    """
    layers = [m for m in model.modules() if hasattr(m, "support_avx512bf16_for_cpu")]
    for layer in layers:
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            raise DareStateError(
                "expected 4-bit weights in their own layout; bitsandbytes has repacked them in a "
                "forward in eval mode, and gradients through them would be wrong. Load the model "
                "again and call keep_gradients_right(model) before its first forward"
            )
        object.__setattr__(layer, "support_avx512bf16_for_cpu", False)
    return len(layers)
