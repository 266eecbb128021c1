"""Masks and kernels: sdpa stays maskless, flash and flex give what sdpa gives, nothing is S x S."""

import flash_stand_in
import pytest
import torch
from attention_runs import flex, text_attention  # noqa: F401
from laws import (
    BATCHES,
    FP32_TOLERANCE,
    SCORER,
    TINY_MODELS,
    assert_close,
    assert_same_run,
    dare,
    forward,
    generate,
    inputs_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dare_hf import last_report
from dare_hf.compat import cache_of
from dare_hf.errors import DareStateError
from dare_hf.testing import tiny_model

PRUNED = {"vision_retention": 0.4, "text_retention": 0.7}
MASKLESS = ("llava", "qwen2_5_vl", "chameleon")
"""Models HF itself passes no mask to at batch 1; Gemma's image blocks need one."""
FLASH = ("llava", "qwen2_5_vl", "chameleon")
"""Models whose images flash attention can run: Gemma's bidirectional blocks it cannot."""
SCORERS = ("attention", SCORER)


@pytest.fixture
def seen(monkeypatch):
    """Record what sdpa receives: whether there is a mask, queries, keys."""
    calls, inner = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record(module, query, key, value, attention_mask, **kwargs):
        calls.append((attention_mask is not None, query.shape[2], key.shape[2]))
        return inner(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", record)
    return calls


@pytest.mark.parametrize("scorer", [*SCORERS, "random", "key_norm", "position"])
@pytest.mark.parametrize("name", MASKLESS)
def test_at_batch_one_no_mask_reaches_attention(name, scorer, seen):
    model = tiny_model(name)
    inputs = inputs_of(model)
    generate(model, inputs)
    plain = list(seen)
    seen.clear()
    with dare(model, scorer=scorer, **PRUNED):
        generate(model, inputs)
    assert len(seen) == len(plain)
    assert not any(masked for masked, _, _ in plain)
    assert not any(masked for masked, _, _ in seen)
    layers = model.config.get_text_config().num_hidden_layers
    for (_, queries, keys), (_, full, _) in zip(seen[:layers], plain[:layers], strict=True):
        assert queries == keys < full


@pytest.mark.parametrize("name", TINY_MODELS)
def test_attention_never_sees_more_keys_than_are_stored(name, seen):
    model = tiny_model(name)
    with dare(model, **PRUNED):
        out = generate(model, inputs_of(model, (0, 1, 2)))
    stored = cache_of(out).kept_lengths().max(dim=1).values
    layers = model.config.get_text_config().num_hidden_layers
    assert [keys for _, _, keys in seen[-layers:]] == stored.tolist()


class Widest(TorchDispatchMode):
    """Remembers the largest second-largest dimension of any tensor made."""

    def __init__(self):
        super().__init__()
        self.width, self.made = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1:
                width = sorted(tensor.shape)[-2]
                if width > self.width:
                    self.width, self.made = width, f"{func} {list(tensor.shape)}"
        return output


@pytest.mark.parametrize("scorer", ["attention", "random", "key_norm", "position"])
@pytest.mark.parametrize("name", MASKLESS)
def test_no_square_of_the_sequence_is_made(name, scorer):
    model = tiny_model(name)
    inputs = inputs_of(model, (20,), text=220)
    length = inputs["input_ids"].shape[1]
    with dare(model, scorer=scorer, **PRUNED), Widest() as widest, torch.no_grad():
        model(**inputs)
    # Vocabulary and layer widths stay below 140, the kept tokens of any layer above it.
    assert length * 0.4 > 140
    assert widest.width <= 140, widest.made


@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("fields", [{}, {"prefix_tokens": 0}, {"pruned": "drop"}], ids=str)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", FLASH)
def test_flash_gives_what_sdpa_gives(name, scorer, fields, rows, monkeypatch):
    flash_stand_in.install(monkeypatch)
    model = tiny_model(name)
    inputs = inputs_of(model, BATCHES[rows])
    config = {"scorer": scorer, **PRUNED, **fields}
    plain = generate(model, inputs)
    with dare(model, **config):
        expected = generate(model, inputs)
    with text_attention(model, "flash_attention_2"):
        assert_same_run(generate(model, inputs), plain, what="unpatched flash")
        with dare(model, **config):
            ours = generate(model, inputs)
    assert_same_run(ours, expected, what=f"{name} under flash, {scorer}")


@pytest.mark.parametrize("scorer", SCORERS)
def test_flash_gives_what_sdpa_gives_over_turns_and_speculation(scorer, monkeypatch):
    flash_stand_in.install(monkeypatch)
    model = tiny_model("llava")
    inputs = inputs_of(model)
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1, "max_new_tokens": 14}
    with text_attention(model, "flash_attention_2"), dare(model, scorer=scorer, **PRUNED):
        greedy = generate(model, inputs, max_new_tokens=14)
        fast = generate(model, inputs, **lookup)
    assert fast.sequences.tolist() == greedy.sequences.tolist()


@pytest.mark.parametrize("rows", BATCHES)
def test_flash_leaves_sliding_layers_unpruned_and_says_so(rows, monkeypatch):
    flash_stand_in.install(monkeypatch)
    model = tiny_model("gemma3")
    images = [0] * len(BATCHES[rows])
    inputs = inputs_of(model, images, text=(30, 24, 20)[: len(images)])
    del inputs["token_type_ids"]  # without images there are none; with them flash is refused
    kinds = model.config.get_text_config().layer_types
    schedule = [(1.0, 1.0 if kind == "sliding_attention" else 0.5) for kind in kinds]
    with dare(model, schedule=schedule):
        expected = generate(model, inputs)
    with text_attention(model, "flash_attention_2"), dare(model, text_retention=0.5):
        out = generate(model, inputs)
        report = last_report(model)
    assert_same_run(out, expected, what="full layers alone were pruned")
    kept = cache_of(out).kept_lengths()
    real = inputs["attention_mask"].sum(dim=1) + len(out.logits) - 1
    for layer, kind in enumerate(kinds):
        assert (kept[layer] == real).all() == (kind == "sliding_attention")
    assert any("sliding" in note and "flash" in note for note in report.notes)


@pytest.mark.filterwarnings("ignore:_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG is set")
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.usefixtures("flex")
def test_flex_gives_what_sdpa_gives(name, scorer, rows):
    model = tiny_model(name)
    inputs = inputs_of(model, BATCHES[rows])
    config = {"scorer": scorer, **PRUNED}
    with dare(model, **config):
        expected = generate(model, inputs, max_new_tokens=3)
        logits = forward(model, inputs).logits
    with text_attention(model, "flex_attention"), dare(model, **config):
        assert_same_run(
            generate(model, inputs, max_new_tokens=3), expected, what=f"{name} under flex"
        )
        ours = forward(model, inputs).logits
    real = inputs["attention_mask"].bool()
    assert_close(ours[real], logits[real], tolerance=FP32_TOLERANCE, what=f"{name} under flex")


def test_another_attention_set_on_a_patched_model_is_refused():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    with dare(model, scorer="attention", **PRUNED):
        expected = generate(model, inputs)
        model.set_attn_implementation("eager")
        with pytest.raises(DareStateError, match="apply_dare"):
            generate(model, inputs)
    with dare(model, scorer="attention", **PRUNED):
        assert generate(model, inputs).sequences.tolist() == expected.sequences.tolist()
