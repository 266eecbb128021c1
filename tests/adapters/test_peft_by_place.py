"""Adapters of peft that count places in the sequence, or bring tokens, are refused by name."""

import copy

import pytest
import torch
from laws import SCORER, forward, generate, inputs_of
from peft import (
    CartridgeConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    XLoraConfig,
    get_peft_model,
)
from peft_runs import lora

from dare_hf import DareConfig, apply_dare, dare_disabled, last_report, remove_dare
from dare_hf.errors import DareError, UnsupportedModelError
from dare_hf.testing import tiny_model

NAMES = ("llava", "gemma3")
CONFIG = DareConfig(
    scorer=SCORER, schedule="constant", vision_retention=0.4, text_retention=0.6, decode_window=3
)
VIRTUAL = {
    "PROMPT_TUNING": PromptTuningConfig,
    "P_TUNING": PromptEncoderConfig,
    "PREFIX_TUNING": PrefixTuningConfig,
    "CARTRIDGE": CartridgeConfig,
}
pytestmark = pytest.mark.filterwarnings("ignore")  # peft's word on position ids


def steps(model, inputs, **kwargs):
    return generate(model, inputs, max_new_tokens=4, **kwargs).sequences.tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens(name, kind):
    base = tiny_model(name)
    inputs = inputs_of(base)
    apply_dare(base, CONFIG)
    pruned = steps(base, inputs)
    model = get_peft_model(base, VIRTUAL[kind](task_type="CAUSAL_LM", num_virtual_tokens=5)).eval()
    with pytest.raises(UnsupportedModelError, match=rf"{kind}.*num_virtual_tokens=5"):
        steps(model, inputs)
    with pytest.raises(DareError):
        forward(model, inputs)
    with model.disable_adapter():
        assert steps(model, inputs) == pruned
    assert steps(base, inputs) == pruned
    remove_dare(base)
    plain = steps(model, inputs)
    with pytest.raises(UnsupportedModelError, match=rf"{kind}.*num_virtual_tokens=5"):
        apply_dare(model, CONFIG)
    assert steps(model, inputs) == plain
    apply_dare(base, CONFIG)  # the model inside, by itself
    with dare_disabled(model):
        assert steps(model, inputs) == plain
    assert steps(base, inputs) == pruned


def activated(model, inputs):
    """Return an aLoRA on the model, beside a plain LoRA that is active, and its invocation."""
    token = inputs["input_ids"][0, -6].item()
    model = get_peft_model(model, lora(task_type="CAUSAL_LM"), "plain").eval()
    fields = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [token]}
    config = LoraConfig(target_modules=r".*language_model.*[qv]_proj", **fields)
    config.init_lora_weights = False
    model.add_adapter("invoked", config)
    return model


@pytest.mark.parametrize("name", NAMES)
def test_invocation_tokens(name):
    base = tiny_model(name)
    inputs = inputs_of(base)
    torch.manual_seed(0)
    model = activated(base, inputs)
    assert apply_dare(model, CONFIG) is model  # the plain LoRA is active
    pruned = steps(model, inputs)
    model.set_adapter("invoked")
    for run in (steps, forward):
        with pytest.raises(UnsupportedModelError, match="alora_invocation_tokens"):
            run(model, inputs)
    with dare_disabled(model):
        plain = steps(model, inputs)
    with model.disable_adapter():
        steps(model, inputs)
    model.set_adapter("plain")
    assert steps(model, inputs) == pruned
    assert last_report(model).kv_bytes < last_report(model).kv_bytes_baseline
    remove_dare(model)
    model.set_adapter("invoked")
    with pytest.raises(UnsupportedModelError, match="alora_invocation_tokens"):
        apply_dare(model, CONFIG)
    assert steps(model, inputs) == plain
    assert not any("_dare" in vars(module) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_scalings_by_token(name, tmp_path):
    torch.manual_seed(0)
    for adapter in ("0", "1"):
        get_peft_model(tiny_model(name), lora(task_type="CAUSAL_LM")).save_pretrained(
            tmp_path / adapter
        )
    base = tiny_model(name)
    inputs = inputs_of(base)
    config = base.config.get_text_config()
    base.config.hidden_size, base.config.use_cache = config.hidden_size, False
    adapters = {adapter: str(tmp_path / adapter) for adapter in ("0", "1")}
    given = {"hidden_size": config.hidden_size, "adapters": adapters}
    model = get_peft_model(base, XLoraConfig(task_type="CAUSAL_LM", **given)).eval()
    plain = steps(model, copy.deepcopy(inputs))
    with pytest.raises(UnsupportedModelError, match="XLORA"):
        apply_dare(model, CONFIG)
    assert steps(model, inputs) == plain
