"""What the adapter tests share: models, adapters with learned-looking weights, runs."""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch
from laws import forward, generate, inputs_of
from peft import LoraConfig, PeftModel, get_peft_model

from dare_hf import DareConfig
from dare_hf.engine.attach import state_of
from dare_hf.testing import tiny_model
from dare_hf.training import add_adapter

MODELS = ("llava", "chameleon")
ROUNDING = 1e-5
"""A frozen model and a trainable one differ by 5e-7, DARE or not: torch takes other kernels."""
LEARNED: dict[str, Any] = {
    "scorer": "router",
    "schedule": "learned",
    "max_hops": 4,
    "recent_tokens": 0,  # prompts are shorter than what is protected by default
}
LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "r": 2, "init_lora_weights": False}


def routers(model):
    """The active routers of a model."""
    return state_of(model).controller.routers


@torch.no_grad()
def learn(model, seed: int = 0) -> None:
    """Write weights and rates into the active routers as a training would have left them."""
    generator = torch.Generator().manual_seed(seed)
    for router in routers(model):
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) / 3)
        router.bias.copy_(torch.randn(2, generator=generator) / 3)
        if isinstance(router.rate_logits, torch.nn.Parameter):
            router.rate_logits.copy_(torch.randn(router.rate_logits.shape, generator=generator))


def adapted(model, *, seed: int | None = 0, name: str = "default", **fields: Any) -> PeftModel:
    """A PeftModel with one router adapter that looks learned; seed None leaves it fresh."""
    peft_model = get_peft_model(model, DareConfig(**{**LEARNED, **fields}), adapter_name=name)
    if seed is not None:
        learn(peft_model, seed)
    return peft_model.eval()


@functools.cache
def saved(folder_of, name: str = "llava", seed: int = 0, **fields: Any) -> str:
    """A folder with a saved adapter for the tiny model `name`; one for a whole session."""
    folder = str(folder_of / f"{name}-{seed}-{abs(hash(tuple(sorted(fields.items()))))}")
    adapted(tiny_model(name), seed=seed, **fields).save_pretrained(folder)
    return folder


class Run(NamedTuple):
    """What a generate wrote, and its logits; equal up to rounding."""

    sequences: torch.Tensor
    logits: torch.Tensor

    def __eq__(self, other):
        same = self.sequences.tolist() == other.sequences.tolist()
        return same and bool((self.logits - other.logits).abs().max() < ROUNDING)

    def __ne__(self, other):
        return not self == other


def tokens(model, inputs, **kwargs: Any) -> Run:
    """Run generate."""
    out = generate(model, inputs, **{"max_new_tokens": 5, **kwargs})
    barred = torch.finfo(torch.float32).min
    return Run(out.sequences, torch.stack(out.logits).clamp(min=barred / 2))


def lora(**fields: Any) -> LoraConfig:
    """A LoRA whose fresh weights change the output."""
    return LoraConfig(**{**LORA, **fields})


def add_quietly(model, config, name: str) -> None:
    """transformers' add_adapter; peft warns of every second adapter that way."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        torch.manual_seed(1)
        add_adapter(model, config, name)


def load_quietly(model, folder: str, name: str) -> None:
    """transformers' load_adapter, likewise."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        model.load_adapter(folder, adapter_name=name)


__all__ = [
    "LEARNED",
    "MODELS",
    "adapted",
    "add_quietly",
    "forward",
    "generate",
    "inputs_of",
    "learn",
    "load_quietly",
    "lora",
    "routers",
    "saved",
    "tokens",
]
