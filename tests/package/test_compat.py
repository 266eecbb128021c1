"""The range of transformers versions: declared once, branched on in one file, run on the oldest."""

import ast
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from torch import nn
from transformers import LlavaForConditionalGeneration
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.integrations import peft as integration

from dare_hf import DareCache, DareConfig, apply_dare, compat, dare_disabled, remove_dare
from dare_hf.errors import DareInputError, DareStateError, UnsupportedModelError
from dare_hf.testing import tiny_inputs, tiny_model
from dare_hf.training import add_adapter

ROOT = Path(__file__).parents[2]


def test_the_range_of_versions_is_declared_and_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, second = compat.minor(compat.NEWEST)
    bounds = f"transformers>={compat.OLDEST},<{first}.{second + 1}"
    assert bounds in project["dependencies"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert f"\ntransformers=={compat.NEWEST}." in pins
    assert f"OLDEST := {compat.OLDEST}.0\n" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_version_asked_for_is_the_one_that_runs():
    asked = os.environ.get("DARE_TEST_TRANSFORMERS")
    assert asked in (None, transformers.__version__)
    assert compat.minor(transformers.__version__) >= compat.minor(compat.OLDEST)


def test_only_one_file_looks_at_versions():
    """Elsewhere a version is printed at most: no comparison names one."""
    names = ("VERSION", "__version__", "Version(", "minor(")
    found = []
    for path in sorted((ROOT / "dare_hf").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        compared = [ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Compare)]
        if any(name in text for text in compared for name in names):
            found.append(path.relative_to(ROOT).as_posix())
    assert found == ["dare_hf/compat.py"]


@pytest.mark.parametrize(
    ("text", "numbers"), [("5.23.0", (5, 23)), ("5.19", (5, 19)), ("6.0.0.dev0", (6, 0))]
)
def test_a_version_is_read(text, numbers):
    assert compat.minor(text) == numbers


@pytest.mark.parametrize("where", ["call", "config", "model"])
def test_chunks_are_refused_where_they_lose_images(monkeypatch, where):
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    options = {"max_new_tokens": 3, "do_sample": False}
    apply_dare(model)
    before = model.generate(**inputs, **options)
    given = dict(options)
    if where == "call":
        given["prefill_chunk_size"] = 7
    elif where == "config":
        given = {"generation_config": transformers.GenerationConfig(prefill_chunk_size=7)}
    else:
        model.generation_config.prefill_chunk_size = 7
    monkeypatch.setattr(compat, "VERSION", (5, 22))
    with pytest.raises(DareInputError, match=r"prefill_chunk_size: expected transformers >= 5\.23"):
        model.generate(**inputs, **given)
    model.generation_config.prefill_chunk_size = None
    assert torch.equal(model.generate(**inputs, **options), before)
    remove_dare(model)


def test_chunks_are_left_alone_where_they_are_right(monkeypatch):
    monkeypatch.setattr(compat, "VERSION", (5, 23))
    compat.check_prefill_chunks(7)
    monkeypatch.setattr(compat, "VERSION", (5, 19))
    compat.check_prefill_chunks(None)


def test_type_ids_of_a_span_cover_the_sequence_where_the_mask_needs_it(monkeypatch):
    whole, cut = torch.tensor([[0, 1, 1, 0, 1]]), torch.tensor([[0, 1]])
    made = {"input_ids": cut, "token_type_ids": cut}
    monkeypatch.setattr(compat, "VERSION", (5, 22))
    gemma, llava = tiny_model("gemma3"), tiny_model("llava")
    read = compat.span_inputs(gemma, made, {"token_type_ids": whole})
    assert read["token_type_ids"] is whole
    assert read["input_ids"] is cut
    assert made["token_type_ids"] is cut
    assert compat.span_inputs(gemma, made, {}) is made
    assert compat.span_inputs(llava, made, {"token_type_ids": whole}) is made
    monkeypatch.setattr(compat, "VERSION", (5, 23))
    assert compat.span_inputs(gemma, made, {"token_type_ids": whole}) is made


@pytest.mark.parametrize(
    ("name", "refused"), [("llava", False), ("gemma3", True), ("qwen2_5_vl", True)]
)
def test_images_of_a_later_turn_are_refused_where_they_are_misplaced(monkeypatch, name, refused):
    model, said = tiny_model(name), torch.tensor([[3, 3, 20, 21, 22]])
    seen = torch.cat([said, torch.tensor([[3]])], dim=1)

    def check(past, ids):
        compat.check_new_images(model, past, ids, (3,))

    monkeypatch.setattr(compat, "VERSION", (5, 23))
    check(5, seen)
    monkeypatch.setattr(compat, "VERSION", (5, 22))
    for past, ids in [(0, seen), (2, said), (5, said[:, 2:]), (5, None)]:
        check(past, ids)
    for ids in (seen, seen[:, 5:]):
        if refused:
            with pytest.raises(DareInputError, match=r"expected transformers >= 5\.23 for new"):
                check(5, ids)
        else:
            check(5, ids)


def test_a_later_turn_is_refused_before_anything_runs(monkeypatch):
    model, cache = tiny_model("qwen2_5_vl"), DareCache()
    inputs = tiny_inputs(model)
    apply_dare(model)
    monkeypatch.setattr(compat, "VERSION", (5, 22))
    model.generate(**inputs, **{compat.CACHE: cache}, max_new_tokens=2, do_sample=False)
    length = cache.get_seq_length()
    with pytest.raises(DareInputError, match=r"(past_key_values|cache): expected transformers"):
        model.generate(**inputs, **{compat.CACHE: cache}, max_new_tokens=2)
    assert cache.get_seq_length() == length
    remove_dare(model)


def test_checkpoints_around_a_layer_are_refused(monkeypatch):
    layer = tiny_model("llava").train().model.language_model.layers[0]
    monkeypatch.setattr(compat, "VERSION", (5, 22))
    compat.check_checkpoints(layer)
    layer.gradient_checkpointing = True
    with pytest.raises(DareInputError, match="gradient_checkpointing: expected transformers"):
        compat.check_checkpoints(layer)
    compat.check_checkpoints(layer.eval())
    monkeypatch.setattr(compat, "VERSION", (5, 23))
    compat.check_checkpoints(layer.train())


def test_a_model_that_checkpoints_keeps_a_cache_where_transformers_does():
    """Without gradients since 5.24 (tested as transformers itself says for the plain model)."""
    model = tiny_model("llava").train()
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)()  # its name in transformers 5.19
    inputs = tiny_inputs(model)
    with torch.no_grad():
        plain = compat.cache_of(model(**inputs, use_cache=True))
        apply_dare(model)
        ours = compat.cache_of(model(**inputs, use_cache=True))
    assert (plain is None) == (ours is None)
    assert ours is None or isinstance(ours, DareCache)


class Processor:
    """Ends texts as Chameleon's processor does, in the newer or the older way."""

    tokenizer = SimpleNamespace(sep_token_id=9)

    def __call__(self, *, return_for_text_completion, ids):
        open_ended = return_for_text_completion and compat.VERSION >= (5, 23)
        ids = torch.tensor([row if open_ended else [*row, 9] for row in ids])
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": torch.ones(ids.shape[0], 3, 4, 4),
        }


@pytest.mark.parametrize("version", [(5, 22), (5, 23)])
def test_a_text_that_goes_on_has_no_separator_behind_it(monkeypatch, version):
    monkeypatch.setattr(compat, "VERSION", version)
    batch = compat.processed(Processor(), ids=[[1, 2, 9], [3, 4, 5]])
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 1]]
    assert batch["pixel_values"].shape == (2, 3, 4, 4)


NEWER = (int(compat.NEWEST.split(".")[0]), int(compat.NEWEST.split(".")[1]) + 1)


def newer(monkeypatch):
    monkeypatch.setattr(compat, "VERSION", NEWER)
    monkeypatch.setattr(compat.transformers, "__version__", f"{NEWER[0]}.{NEWER[1]}.0")


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
@pytest.mark.parametrize("model_name", ["llava", "qwen2_5_vl"])
def test_a_cache_is_taken_by_either_name(model_name, name):
    model, cache = tiny_model(model_name), DareCache()
    inputs = tiny_inputs(model)
    apply_dare(model)
    options = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    out = model.generate(**inputs, **options, **{name: cache})
    assert compat.cache_of(out) is cache
    assert torch.equal(out.sequences, model.generate(**inputs, **options).sequences)
    again, step = DareCache(), {"input_ids": inputs["input_ids"][:, -1:]}
    model(**inputs, **{name: again})
    assert again.get_seq_length() == inputs["input_ids"].shape[1]
    logits = model(**step, **{name: again}).logits
    with pytest.raises(DareInputError, match="got both"):
        model(**step, cache=again, past_key_values=DareCache())
    with dare_disabled(model):
        model(**step, **{name: DareCache()})
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("name", compat.CACHE_NAMES)
def test_a_paged_cache_is_refused_by_either_name(name):
    model = tiny_model("llava")
    apply_dare(model)
    paged = PagedAttentionCache.__new__(PagedAttentionCache)
    for call in (model, model.generate):
        with pytest.raises(DareInputError, match="continuous batching packs"):
            call(**tiny_inputs(model), **{name: paged})


def test_a_newer_transformers_is_warned_of_once_and_runs(monkeypatch, told):
    model = tiny_model("llava")
    newer(monkeypatch)
    for _ in range(2):
        apply_dare(model)
        model.generate(**tiny_inputs(model), max_new_tokens=2)
        remove_dare(model)
    said = [line for line in told if "is not tested" in line]
    assert len(said) == 1
    for word in (f"{NEWER[0]}.{NEWER[1]}.0", compat.OLDEST, compat.NEWEST, "dare-hf conformance"):
        assert word in said[0]


def test_a_tested_transformers_is_not_warned_of():
    assert compat.untested() == ""


def test_a_layer_that_calls_its_cache_otherwise_is_refused(monkeypatch):
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    before = model.generate(**inputs, max_new_tokens=2)

    class Renamed(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.self_attn = layer.self_attn

        def forward(self, hidden_states, kv_store=None, **kwargs):
            return hidden_states

    layers = model.model.language_model.layers
    own, layers[1] = layers[1], Renamed(layers[1])
    for untested in (False, True):
        if untested:
            newer(monkeypatch)
        with pytest.raises(UnsupportedModelError, match="not tested with"):
            apply_dare(model)
    layers[1] = own
    assert torch.equal(model.generate(**inputs, max_new_tokens=2), before)


def test_a_cache_under_an_unknown_name_is_refused(monkeypatch):
    model = tiny_model("llava")
    apply_dare(model)
    newer(monkeypatch)
    with pytest.raises(DareInputError, match=r"kv_store: .*is not tested with"):
        model(**tiny_inputs(model), kv_store=DareCache())
    model(**tiny_inputs(model))


class Hidden(LlavaForConditionalGeneration):
    """Hides its arguments, as a user's subclass may."""

    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


def test_a_forward_that_hides_its_arguments_is_looked_through():
    compat.check_takes_cache(Hidden(tiny_model("llava").config))


def test_what_generate_calls_is_not_deprecated():
    """Every warning is an error here, deprecations of the old name included."""
    model = tiny_model("qwen2_5_vl")
    apply_dare(model, DareConfig(decode_window=2))
    options = {"max_new_tokens": 5, "do_sample": False}
    for extra in ({}, {"num_beams": 2}, {"prompt_lookup_num_tokens": 2}):
        model.generate(**tiny_inputs(model), **options, **extra)
    model(**tiny_inputs(model), use_cache=True)


def test_the_oldest_peft_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    first, second = compat.minor(peft.__version__)
    assert f"peft>={compat.OLDEST_PEFT},<{first}.{second + 1}" in project["dependencies"]


@pytest.mark.parametrize("floor", ["0.20.0", "0.99.0"])
def test_adapters_work_where_transformers_asks_for_a_newer_peft(monkeypatch, floor):
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", floor)
    before = dict(vars(integration.PeftAdapterMixin))
    model, plain = tiny_model("llava"), tiny_model("llava")
    if floor == "0.99.0":
        with pytest.raises(ValueError, match="version of PEFT"):
            model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]), "lora")
        assert not any(vars(model).get("peft_config", {}))
    add_adapter(model, peft.LoraConfig(target_modules=["q_proj"]), "lora")
    add_adapter(model, DareConfig(scorer="router", schedule="learned"), "dare")
    model.set_adapter(["lora", "dare"])
    assert model.active_adapters() == ["lora", "dare"]
    assert len(model.get_adapter_state_dict("dare")) == 3 * len(model.model.language_model.layers)
    model.delete_adapter("dare")
    model.delete_adapter("lora")
    with pytest.raises(DareStateError):
        remove_dare(model)
    inputs = tiny_inputs(model)
    ours, theirs = (m.generate(**inputs, max_new_tokens=3) for m in (model, plain))
    assert torch.equal(ours, theirs)
    assert dict(vars(integration.PeftAdapterMixin)) == before


def test_a_loaded_adapter_is_managed_where_transformers_asks_for_a_newer_peft(
    monkeypatch, tmp_path
):
    peft.get_peft_model(tiny_model("llava"), DareConfig(scorer="router")).save_pretrained(tmp_path)
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.99.0")
    model = tiny_model("llava")
    model.load_adapter(str(tmp_path), "one")
    model.load_adapter(str(tmp_path), "two")
    model.set_adapter("two")
    assert model.active_adapters() == ["two"]
    for name in ("one", "two"):
        model.delete_adapter(name)
    assert not {"set_adapter", "active_adapters", "_dare"} & set(vars(model))


def test_a_peft_older_than_the_tested_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(integration, "MIN_PEFT_VERSION", "0.99.0")
    assert "set_adapter" in compat.adapter_methods()
    monkeypatch.setattr(peft, "__version__", "0.20.0")
    assert compat.adapter_methods() == {}
