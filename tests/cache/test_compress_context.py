"""compress_context: what can be done with the cache, what it holds, and what is refused."""

import copy
import math

import flash_stand_in
import pytest
import torch
from laws import (
    FP32_TOLERANCE,
    assert_close,
    assert_same_run,
    dare,
    everything,
    generate,
    inputs_of,
    shared_model,
)

from dare_hf import DareCache, DareConfig, compress_context, compression, dare_disabled, last_report
from dare_hf.architectures.locate import locate
from dare_hf.compat import CACHE
from dare_hf.conformance.subject import Subject, copied
from dare_hf.engine import repetition
from dare_hf.errors import DareInputError, DareStateError, UnsupportedModelError
from dare_hf.testing import masked_forward, tiny_model, written_inputs
from dare_hf.testing.models import PAD_ID

LAST = 3
"""Tokens at the end of a context that all layers keep."""
KEEP = 0.5


def ask(model, inputs, words=(50, 61, 72), **more):
    """The same prompt with a question behind it, whose images are in the cache."""
    new = torch.tensor([words]).expand(len(inputs["input_ids"]), -1)
    asked = {k: v for k, v in inputs.items() if k not in ("mm_encoder_outputs", "pixel_values")}
    asked["input_ids"] = torch.cat([inputs["input_ids"], new], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            asked[name] = torch.nn.functional.pad(inputs[name], (0, len(words)), value=value)
    return asked | more


def compressed(model, inputs, keep=KEEP, **kwargs):
    return compress_context(model, copied(inputs), keep, recent_tokens=LAST, **kwargs)


@pytest.mark.parametrize("images", [(1,), (0, 1, 2)])
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3", "chameleon"])
def test_answers_are_those_of_the_masked_oracle(name, images):
    """A question sees, in each layer, the columns that stayed; the context saw all of its own."""
    model = shared_model(name)
    inputs = inputs_of(model, images, text=24)
    span = inputs["input_ids"].shape[1]
    with dare(model, **everything()):
        cache = compressed(model, inputs, 0.4)
        places = [slot.positions() for slot in cache.layers]
        out = generate(model, ask(model, inputs), **{CACHE: cache})
    size = out.sequences.shape[1] - 1
    real = torch.nn.functional.pad(inputs["attention_mask"], (0, size - span), value=1).bool()
    visible = []
    for where in places:
        kept = torch.zeros(len(real), size + 1, dtype=torch.bool)
        kept.scatter_(1, torch.where(where < 0, size, where), True)
        kept = kept[:, :size]
        kept[:, span:] = True
        seen = kept[:, None, :].repeat(1, size, 1)
        seen[:, :span] = True
        visible.append(seen)
    written = written_inputs(model, inputs, out.sequences[:, :-1])
    expected = masked_forward(model, written, [real] * len(places), visible)
    start = size - len(out.logits)
    for step, ours in enumerate(out.logits):
        theirs = expected[:, start + step]
        assert_close(ours, theirs, tolerance=FP32_TOLERANCE, what=f"{name}, step {step}")
    with dare(model, **everything()):
        whole = generate(model, ask(model, inputs), **{CACHE: compressed(model, inputs, 1.0)})
    worst = max((a - b).abs().max() for a, b in zip(out.logits, whole.logits, strict=True))
    assert worst > 100 * FP32_TOLERANCE, "the case loses nothing by what was cut"


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_a_share_of_one_is_the_unpruned_cache(name):
    model = shared_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    plain = DareCache()
    with dare(model, **everything()):
        cache = compressed(model, inputs, 1.0)
        generate(model, inputs, max_new_tokens=1, **{CACHE: plain})
        pairs = list(zip(cache.layers, plain.layers, strict=True))
        assert all(
            torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values) for a, b in pairs
        )
        assert all(torch.equal(a.positions(), b.positions()) for a, b in pairs)
        runs = [generate(model, ask(model, inputs), **{CACHE: each}) for each in (cache, plain)]
    assert_same_run(*runs, tolerance=0, what=name)


@pytest.mark.parametrize("keep", [0.35, 0.5, 0.9])
def test_bytes_are_the_share_that_was_asked_for(keep):
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1, 2), text=20)
    with dare(model):
        cache = compressed(model, inputs, keep)
        report = last_report(model)
    layers, counts = len(cache.layers), inputs["attention_mask"].sum(1).tolist()
    wanted = [math.ceil(keep * layers * n - 1e-4) for n in counts]
    assert cache.kept_lengths().sum(0).tolist() == wanted
    assert cache.kv_bytes() == sum(wanted) * cache.layers[0].token_bytes()
    assert report.kv_bytes == report.kv_bytes_predicted == cache.kv_bytes()
    assert report.kv_bytes_baseline == sum(counts) * layers * cache.layers[0].token_bytes()
    longest = cache.kept_lengths().amax(1)
    slabs = (1.25 * longest * len(counts) + 64) * cache.layers[0].token_bytes()
    assert cache.allocated_bytes() <= slabs.sum()
    assert report.flops["prefill"] > 1.9 * report.flops_baseline["prefill"]
    assert any(f"asked for {keep}" in note for note in report.notes)
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


def use_flash(model, monkeypatch):
    """Let the text model alone use flash attention, until the test ends."""
    flash_stand_in.install(monkeypatch)
    text_config = model.config.get_text_config()
    monkeypatch.setattr(text_config, "_attn_implementation_internal", "flash_attention_2")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_flash_keeps_what_sdpa_keeps(name, monkeypatch):
    """Its masks say nothing of what is visible: that comes from the positions of the columns."""
    model = tiny_model(name)
    inputs, places = inputs_of(model, (0, 1, 2), text=20), []
    for _ in range(2):
        with dare(model):
            cache = compressed(model, inputs, chunk_tokens=15)
        places.append([layer.positions().tolist() for layer in cache.layers])
        use_flash(model, monkeypatch)
    assert places[0] == places[1]


def test_sliding_layers_stay_whole_under_flash_and_the_others_pay(monkeypatch):
    model = tiny_model("gemma3")
    inputs = inputs_of(model, (0, 0), text=(40, 30))
    del inputs["token_type_ids"]
    use_flash(model, monkeypatch)
    with dare(model):
        cache = compressed(model, inputs, 0.7)
    counts, kept = inputs["attention_mask"].sum(1), cache.kept_lengths()
    assert kept[0].tolist() == kept[2].tolist() == counts.tolist()
    assert kept.sum(0).tolist() == [math.ceil(0.7 * 4 * n - 1e-4) for n in counts.tolist()]


def test_forced_tokens_that_go_beyond_the_share_are_said():
    model = shared_model("llava")
    with dare(model, always_keep_token_ids=(inputs_of(model)["input_ids"][0, 14].item(),)):
        cache = compress_context(model, inputs_of(model), 0.1, recent_tokens=6)
        note = next(note for note in last_report(model).notes if "compress_context" in note)
    size = cache.get_seq_length()
    kept = sorted({0, 1, 2, 3, 14, *range(size - 6, size)})
    assert [layer.positions()[0].tolist() for layer in cache.layers] == [kept] * len(cache.layers)
    assert "go beyond it" in note


def test_the_cap_binds_each_layer_and_its_rest_goes_to_others():
    model, cap = shared_model("llava"), 17
    inputs = inputs_of(model, (1, 2), text=24)
    with dare(model):
        free = compressed(model, inputs, 0.4).kept_lengths()
    with dare(model, max_kv_tokens=cap):
        cache = compressed(model, inputs, 0.4)
        kept = cache.kept_lengths()
        out = generate(model, ask(model, inputs), **{CACHE: copy.deepcopy(cache)})
    counts = inputs["attention_mask"].sum(1)
    assert int(free.max()) > cap
    budget = [math.ceil(0.4 * len(kept) * n - 1e-4) for n in counts.tolist()]
    wanted = [min(n, cap * len(kept)) for n in budget]
    assert int(kept.max()) <= cap
    assert kept.sum(0).tolist() == wanted
    assert out.sequences.shape[1] == inputs["input_ids"].shape[1] + 3 + len(out.logits)


def test_a_tight_cap_keeps_the_last_token_and_the_first_ones():
    model = shared_model("llava")
    with dare(model, max_kv_tokens=3):
        cache = compressed(model, inputs_of(model))
    size = cache.get_seq_length()
    assert [layer.positions()[0].tolist() for layer in cache.layers] == [[0, 1, size - 1]] * 4


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_a_cache_serves_many_questions(name):
    """As copies, as one cache that is cropped back, and as repeated rows: the same answers."""
    model = shared_model(name)
    inputs = inputs_of(model, (1,), text=20)
    length = inputs["input_ids"].shape[1]
    questions = [(50, 61, 72), (33, 34), (90,)]
    with dare(model, DareConfig()):
        cache = compressed(model, inputs)
        kept = cache.kept_lengths().tolist()
        copies = [
            generate(model, ask(model, inputs, words), **{CACHE: copy.deepcopy(cache)})
            for words in questions
        ]
        for words, expected in zip(questions, copies, strict=True):
            out = generate(model, ask(model, inputs, words), **{CACHE: cache})
            assert_same_run(out, expected, what=f"{name}, cropped back")
            assert last_report(model).kv_bytes_predicted == cache.kv_bytes()
            cache.crop(length - cache.get_seq_length())
            assert cache.kept_lengths().tolist() == kept
    assert len({tuple(out.sequences[0].tolist()[-4:]) for out in copies}) > 1


def test_rows_can_be_repeated_for_a_batch_of_questions():
    model = shared_model("llava")
    inputs = inputs_of(model, (1,), text=20)
    questions = [(50, 61, 72), (33, 34)]
    with dare(model, DareConfig()):
        cache = compressed(model, inputs)
        alone = [
            generate(model, ask(model, inputs, words), **{CACHE: copy.deepcopy(cache)})
            for words in questions
        ]
        cache.batch_repeat_interleave(2)
        turns = [ask(model, inputs, words) for words in ((50, 61, 72), (PAD_ID, 33, 34))]
        both = {
            name: torch.cat([turn[name] for turn in turns])
            for name in ("input_ids", "attention_mask")
        }
        both["attention_mask"][1, inputs["input_ids"].shape[1]] = 0
        out = generate(model, both, **{CACHE: cache})
    said = [run.sequences[0, -len(run.logits) :].tolist() for run in alone]
    assert out.sequences[:, -len(out.logits) :].tolist() == said


def test_rates_of_the_configuration_are_those_of_questions():
    """What is kept of a context does not depend on them; a question's image is pruned by them."""
    model = shared_model("llava")
    inputs, more = inputs_of(model, (1,), text=20), inputs_of(model, (1,), seed=5)
    kept, counts = [], []
    for fields in (everything(), {"vision_retention": 0.3, "text_retention": 0.6}):
        with dare(model, **fields):
            cache = compressed(model, inputs)
            kept.append([layer.positions().tolist() for layer in cache.layers])
            turn = ask(model, inputs, more["input_ids"][0].tolist())
            turn["mm_encoder_outputs"] = more["mm_encoder_outputs"]
            before = cache.kept_lengths()
            generate(model, turn, max_new_tokens=1, **{CACHE: cache})
            counts.append((cache.kept_lengths() - before)[:, 0].tolist())
    assert kept[0] == kept[1]
    assert counts[0] == [more["input_ids"].shape[1]] * 4
    assert max(counts[1]) < counts[0][0]


def test_the_model_is_left_as_it_was_even_where_reading_fails(monkeypatch):
    model = shared_model("llava")
    inputs = inputs_of(model, (1,), text=20)
    with dare(model):
        expected = compressed(model, inputs).kept_lengths().tolist()
        before = generate(model, inputs)

        def fail(*args):
            raise KeyError("broken")

        with monkeypatch.context() as patch:
            patch.setattr(repetition, "squared_attention", fail)
            with pytest.raises(KeyError, match="broken"):
                compressed(model, inputs)
        assert_same_run(generate(model, inputs), before, tolerance=0, what="after a failure")
        assert compressed(model, inputs).kept_lengths().tolist() == expected
    attention = locate(model).layers[0].self_attn
    assert type(attention.config).__name__ != "View"
    assert not locate(model).text_model._forward_pre_hooks


def test_a_second_reading_leaves_no_trace_in_the_cache():
    """Tokens, hops and remembered queries are those of the context."""
    model = shared_model("llava")
    inputs = inputs_of(model, (1,), text=20)
    plain = DareCache()
    with dare(model, **everything(scorer="attention", max_kv_tokens=500)):
        cache = compressed(model, inputs, chunk_tokens=9)
        generate(model, inputs, max_new_tokens=1, **{CACHE: plain})
    assert torch.equal(cache.log.hop, plain.log.hop)
    assert cache.hops.tolist() == plain.hops.tolist() == [1]
    for ours, theirs in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(ours.ring.positions, theirs.ring.positions)
        assert ours.seen == theirs.seen


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"keep": 0}, "keep: expected a share in"),
        ({"keep": 1.2}, "keep: expected a share in"),
        ({"keep": float("nan")}, "keep: expected a share in"),
        ({"keep": "half"}, "keep: expected a share in"),
        ({"recent_tokens": 0}, "recent_tokens: expected an int of at least 1"),
        ({"chunk_tokens": 2.5}, "chunk_tokens: expected an int of at least 1"),
        ({"score": "attention"}, "score: expected one of"),
        ({"score": "reading", "processor": object()}, "repeats nothing"),
        ({"inputs": torch.tensor([[1, 2]])}, "inputs: expected what a processor returns"),
        ({"inputs": {CACHE: DareCache()}}, "Leave the cache out"),
    ],
)
def test_what_cannot_be_done_is_refused(change, match):
    model = shared_model("llava")
    with dare(model):
        arguments = {"inputs": inputs_of(model), "keep": 0.5, **change}
        with pytest.raises(DareInputError, match=match):
            compress_context(model, **arguments)


def test_models_that_cannot_go_on_with_it_are_refused():
    model = shared_model("llava")
    with pytest.raises(DareStateError, match="Call apply_dare"):
        compress_context(model, inputs_of(model))
    with dare(model):
        with dare_disabled(model), pytest.raises(DareStateError, match="switched on"):
            compress_context(model, inputs_of(model))
        wide = inputs_of(model)
        wide["prefill_chunk_size"] = 8
        with pytest.raises(DareInputError, match="in one forward"):
            compress_context(model, wide)
        assert compress_context(model, inputs_of(model)).kv_bytes() > 0


def test_batches_whose_rows_all_are_mostly_pads_are_refused():
    model = shared_model("llava")
    inputs = inputs_of(model, (1,))
    for name, fill in (("input_ids", 0), ("attention_mask", 0)):
        inputs[name] = torch.nn.functional.pad(inputs[name], (200, 0), value=fill)
    with dare(model), pytest.raises(DareInputError, match="Cut the columns"):
        compressed(model, inputs)


def test_models_whose_context_cannot_be_repeated_are_refused(monkeypatch):
    """Images beside the tokens; inputs for every layer and words without them; shared heads."""
    beside = Subject.of("mllama")
    with beside.dare(**everything()), pytest.raises(UnsupportedModelError, match="beside"):
        compress_context(beside.model, copied(beside.batches["alone"].inputs))
    layered = Subject.of("gemma3n")
    inputs = copied(layered.batches["alone"].inputs)
    with layered.dare(**everything()):
        with pytest.raises(DareInputError, match="processor: expected none"):
            compress_context(layered.model, inputs, processor=Words())
        assert compress_context(layered.model, inputs).kv_bytes() > 0
    model = shared_model("llava")
    monkeypatch.setattr(compression, "shared_heads", lambda *args: object())
    with dare(model), pytest.raises(UnsupportedModelError, match="tensor parallelism"):
        compress_context(model, inputs_of(model))


class Words:
    """A tokenizer of one word."""

    def encode(self, text, add_special_tokens):
        return [20]
