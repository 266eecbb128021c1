"""Language models: what is particular to them, and that the whole library takes them."""

from dataclasses import replace

import flash_stand_in
import pytest
import torch
from attention_runs import text_attention
from peft import PeftModel
from peft_runs import adapted
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache

from dare_hf import DareCache, DareConfig, apply_dare, last_report, remove_dare
from dare_hf.architectures.locate import attention_of, locate
from dare_hf.compat import CACHE, cache_of
from dare_hf.conformance.laws import NARROW_TOLERANCE, hold_close
from dare_hf.conformance.subject import SCORER, Subject
from dare_hf.engine.undo import UndoRecord
from dare_hf.errors import DareInputError
from dare_hf.report.flops import LayerShape
from dare_hf.routing.scores import key_norm_scores
from dare_hf.scoring.key_norm import KeyNormScorer
from dare_hf.testing.oracle import masked_forward
from dare_hf.testing.shrink import class_of, shrunk_config, shrunk_model

KINDS = ("gemma3_text", "deepseek_v3", "gpt_oss")
"""Sliding windows, latent attention, sinks."""
RATES = {"text_retention": 0.5, "scorer": SCORER, "schedule": "constant"}


@pytest.fixture(scope="module")
def subjects():
    return {name: Subject.of(name) for name in (*KINDS, "llama")}


@pytest.mark.parametrize("name", KINDS)
def test_hops_close_at_a_delimiter_and_the_report_counts_text_alone(subjects, name):
    subject = subjects[name]
    batch = subject.batches["padded"]
    span = batch.modality.shape[1]
    plain = subject.generate(batch)
    word = int(plain.sequences[0, span + 1])
    with subject.dare(hop_delimiters=(word,), text_retention=1.0):
        out = subject.generate(batch)
        cache, report = cache_of(out), last_report(subject.model)
    assert out.sequences.tolist() == plain.sequences.tolist()
    ends = (plain.sequences[:, span:-1] == word).sum(dim=1) + 1
    assert cache.hops.tolist() == ends.tolist()
    assert ends.max() > 1
    assert not any(report.tokens["vision"])
    with subject.dare(**RATES):
        subject.generate(batch)
        report = last_report(subject.model)
    assert report.kv_bytes_predicted == report.kv_bytes < report.kv_bytes_baseline
    assert report.flops["prefill"] < report.flops_baseline["prefill"]


def test_token_types_of_a_language_model_are_no_images():
    model = shrunk_model("gpt2")
    inputs = {"input_ids": torch.arange(20, 30)[None], "token_type_ids": torch.ones(1, 10).long()}
    apply_dare(model, DareConfig(vision_retention=0.1, **RATES | {"text_retention": 1.0}))
    cache = DareCache()
    with torch.no_grad():
        model(**inputs, **{CACHE: cache}, use_cache=True)
    remove_dare(model)
    assert (cache.kept_lengths() == 10).all()


@pytest.mark.parametrize("config", [None, DareConfig(scorer="attention", text_retention=0.7)])
def test_pruned_text_without_training_is_warned_of_once(subjects, config, told):
    apply_dare(subjects["llama"].model, config)
    remove_dare(subjects["llama"].model)
    assert sum("pruning text without training" in text for text in told) == (config is not None)


@pytest.mark.parametrize("name", KINDS)
def test_routers_are_saved_loaded_and_trained(name, tmp_path):
    """Law 4 among it: the training forward has the logits of every step of generate."""
    shrunk_model(name).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prompt = {"input_ids": torch.arange(20, 40)[None], "attention_mask": torch.ones(1, 20).long()}
    options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    model = adapted(base, decode_window=3, hop_decay=0.7)
    out = model.generate(**prompt, **options, output_logits=True)
    assert min(cache_of(out).hops) >= 2
    assert last_report(model).kv_bytes < last_report(model).kv_bytes_baseline
    labels = out.sequences[:, :-1].clone()
    labels[:, :20] = -100
    taught = model(input_ids=out.sequences[:, :-1], labels=labels)
    for step, logits in enumerate(out.logits):
        assert (taught.logits[:, 19 + step] - logits).abs().max() < NARROW_TOLERANCE
    taught.loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "dare_" in n and p.requires_grad]
    assert sum(float(g.abs().sum()) for g in gradients if g is not None) > 0
    model.save_pretrained(tmp_path / "adapter")
    card = (tmp_path / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "AutoModelForCausalLM.from_pretrained" in card
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    for loaded in (whole, PeftModel.from_pretrained(fresh, tmp_path / "adapter")):
        again = loaded.generate(**prompt, **options)
        assert again.sequences.tolist() == out.sequences.tolist()


class Watch:
    """Sits where attention looks for DARE, and keeps what it was called with."""

    mean, watching = None, True

    def __init__(self):
        self.seen = None

    def tensors(self, query, key, value):
        return query, key, value

    def before_attention(self, tensors, call):
        return call.mask

    def after_attention(self, tensors, call):
        self.seen = (*tensors, call)


@pytest.mark.parametrize("name", ["gpt_oss", "mimo_v2_flash", "gemma2", "vaultgemma", "llama"])
def test_scores_read_the_probabilities_of_the_models_own_attention(name):
    """Sinks take their share and soft caps bend logits, in what is read as in what is run."""
    from dare_hf.engine.attention_functions import observed_name

    model = class_of(shrunk_config(name))._from_config(
        shrunk_config(name), attn_implementation="eager"
    )
    anatomy = locate(model.eval())
    undo, watches = UndoRecord(), [Watch() for _ in anatomy.layers]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(10)  # sharp enough that a cap bends
        ids = torch.arange(20, 34)[None]
        plain = model(input_ids=ids, output_attentions=True).attentions
        undo.set(anatomy.text_config, "_attn_implementation_internal", observed_name("eager"))
        for layer, watch in zip(anatomy.layers, watches, strict=True):
            undo.set(attention_of(layer), "_dare", watch)
        model(input_ids=ids)
        undo.undo()
    for watch, theirs in zip(watches, plain, strict=True):
        query, key, _, call = watch.seen
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        mask = call.mask[..., : key.shape[2]]
        ours = call.softmax.probabilities(query @ key.transpose(-1, -2), mask)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    if name in ("gpt_oss", "mimo_v2_flash"):
        assert any(float(theirs.sum(-1).min()) < 0.99 for theirs in plain)


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "jetmoe", "deepseek_v3"])
def test_key_norms_are_those_of_the_keys_attention_stores(name):
    """Also where queries, keys and values come out of one matrix."""
    model = shrunk_model(name)
    anatomy = locate(model)
    layer, seen = anatomy.layers[0], []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.arange(20, 31)[None], **{CACHE: cache}, use_cache=True)
        handle.remove()
        spec = anatomy.spec
        scorer = KeyNormScorer((spec.pre_attention_norm, spec.key_projection))
        ours = scorer.scores(None, layer, 0, seen[0])
    stored = cache.layers[0]
    keys = stored.keys
    if hasattr(attention_of(layer), "expand_kv") and keys.shape[1] == 1:  # latents are stored
        keys = attention_of(layer).expand_kv(keys, stored.values)[0]
    torch.testing.assert_close(ours, key_norm_scores(keys), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "qwen3_next", "deepseek_v3", "mimo_v2_flash"])
def test_layers_cost_what_torch_counts(name):
    """Transposed linear maps, biases of experts, gates beside queries, other widths of values."""
    config = shrunk_config(name)
    model = class_of(config)._from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    anatomy = locate(model.eval())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.arange(20, 31)[None])
    counts = counter.get_flop_counts()
    paths = {id(module): path for path, module in model.named_modules()}
    for layer in anatomy.layers:
        shape = LayerShape.of(layer, anatomy.text_config)
        (counted,) = (v for k, v in counts.items() if k.endswith(f".{paths[id(layer)]}"))
        assert 2 * (11 * shape.linear_macs + 121 * shape.pair_macs) == sum(counted.values())


def numbering(monkeypatch, **config):
    """A Llama 4 whose layers without RoPE count places themselves from the fourth token on."""
    from dare_hf.testing import text_families
    from dare_hf.testing.text_families import CONFIGS

    family = text_families.TEXT_FAMILIES["llama4_text"]
    tuned = replace(family, config={**CONFIGS["llama4_text"], "floor_scale": 4, **config})
    monkeypatch.setitem(text_families.TEXT_FAMILIES, "llama4_text", tuned)
    return Subject.of("llama4_text")


@pytest.mark.parametrize("pruned", ["bypass", "drop"])
def test_what_was_dropped_does_not_come_back_behind_a_layer_that_keeps_everything(
    pruned, monkeypatch
):
    subject = numbering(monkeypatch, no_rope_layers=[1, 0, 1, 1])
    batch, cache = subject.batches["alone"], DareCache()
    with subject.dare(**RATES, pruned=pruned):
        logits = subject.forward(batch, **{CACHE: cache}, use_cache=True)
    held = [set(layer.positions()[0].tolist()) for layer in cache.layers]
    assert len(held[1]) == batch.real.sum() > len(held[0])
    assert (held[2] <= held[0]) == (pruned == "drop")
    keep = [torch.zeros_like(batch.real) for _ in held]
    for mask, columns in zip(keep, held, strict=True):
        mask[0, sorted(columns)] = True
    hold_close(subject, logits, masked_forward(subject.model, batch.inputs, keep), "llama4")


def test_rows_beyond_which_layers_number_their_queries_are_not_trained_on(monkeypatch):
    """The simulation prunes there and a run of generate would not: refused, not another model."""
    subject = numbering(monkeypatch)
    ids = torch.arange(20, 32)[None]
    trained = {"input_ids": ids, "labels": torch.where(torch.arange(12) < 2, -100, ids)}
    with subject.dare(**RATES), pytest.raises(DareInputError, match="expected fewer than 4 tokens"):
        subject.model(**trained)
    with subject.dare(**RATES):
        short = {name: part[:, :3] for name, part in trained.items()}
        longer = {**trained, "labels": torch.where(torch.arange(12) < 6, -100, ids)}
        assert subject.model(**short).loss.isfinite()
        assert subject.model(**longer).loss.isfinite()
        hops = (torch.arange(12) > 5).long()[None]
        with pytest.raises(DareInputError, match="expected fewer than 4 tokens"):
            subject.model(input_ids=ids, hop_ids=hops)


@pytest.mark.parametrize("pruned", ["bypass", "drop"])
def test_layers_that_number_their_queries_run_all_of_them(pruned, monkeypatch):
    """Temperature tuning of Llama 4 counts places itself: with a query left out it would be off."""
    subject = numbering(monkeypatch)
    batch = subject.batches["alone"]
    cache = DareCache()
    with subject.dare(**RATES, pruned=pruned):
        logits = subject.forward(batch, **{CACHE: cache}, use_cache=True)
        notes = last_report(subject.model).notes
    assert any("layers [3] keep everything from 4 tokens on" in note for note in notes)
    real = batch.real.sum()
    kept = cache.kept_lengths()[:, 0]
    assert kept[3] == real
    assert (kept[:3] < real).all()
    keep = [torch.zeros_like(batch.real) for _ in kept]
    for index, mask in enumerate(keep):
        mask[0, cache.layer(index).positions()[0]] = True
    hold_close(subject, logits, masked_forward(subject.model, batch.inputs, keep), "llama4")


@pytest.mark.parametrize("scorer", ["attention", SCORER])
@pytest.mark.parametrize("name", ["ministral3", "mistral4"])
def test_attention_that_reads_positions_reads_them_under_flash(name, scorer, monkeypatch):
    """Their queries are scaled by position; the kernel must not see gaps as packed sequences."""
    flash_stand_in.install(monkeypatch)
    subject = Subject.of(name)
    subject.model.float()
    fields = {**RATES, "scorer": scorer}
    for batch in subject.batches.values():
        written = []
        for implementation in ("sdpa", "flash_attention_2"):
            with text_attention(subject.model, implementation), subject.dare(**fields):
                written.append(subject.forward(batch)[batch.real])
                report = last_report(subject.model)
        torch.testing.assert_close(*written, atol=1e-3, rtol=1e-3)
        assert (report.kv_bytes < report.kv_bytes_baseline) == (scorer == SCORER)
