"""What a model is, to the last attribute, and that it is so again."""

import copy

import torch
from laws import (
    forward,
    generate,
)

RUN_STATE = {"rope_deltas"}


def attributes(module) -> dict[str, object]:
    """Return each attribute of a module as something that compares by identity or value."""
    seen: dict[str, object] = {"class": type(module)}
    for key, value in vars(module).items():
        if key in RUN_STATE:
            continue
        if isinstance(value, dict):  # hooks, parameters, buffers, submodules
            seen[key] = [(name, id(entry)) for name, entry in value.items()]
        else:
            seen[key] = id(value)
    return seen


def snapshot(model) -> dict[str, object]:
    """Return everything that apply_dare could have changed."""
    configs = {"": model.config, "text": model.config.get_text_config()}
    configs["generation"] = model.generation_config
    if hasattr(model.config, "vision_config"):
        configs["vision"] = model.config.vision_config
    return {
        "modules": {name: attributes(module) for name, module in model.named_modules()},
        "configs": {name: copy.deepcopy(vars(config)) for name, config in configs.items()},
        "attention": {
            name: module.config._attn_implementation
            for name, module in model.named_modules()
            if hasattr(module, "config")
        },
        "state": list(model.state_dict()),
        "forward": {name: id(m.forward.__func__) for name, m in model.named_modules() if name},
        "generate": model.generate.__func__,
    }


def warm(model, inputs) -> torch.Tensor:
    """Let HF install its lazy output-capture hooks, and return the plain logits."""
    forward(model, inputs, output_hidden_states=True)
    generate(model, inputs)
    return forward(model, inputs).logits


def hold_same(before, after):
    for part in before:
        if isinstance(before[part], dict):
            for key in before[part]:
                assert after[part].get(key) == before[part][key], f"{part} of {key!r} changed"
        assert after[part] == before[part], f"{part} changed"
