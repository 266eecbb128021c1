"""What people do with models: shared configs, early exit, pickles, exports, direct forwards."""

import copy
import inspect
import io
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laws import SCORER, assert_same_run, dare, forward, generate, inputs_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft_runs import adapted, saved, tokens

from dare_hf import (
    DareCache,
    DareConfig,
    apply_dare,
    dare_disabled,
    last_report,
    register_scorer,
    remove_dare,
)
from dare_hf.compat import CACHE, cache_of
from dare_hf.config.scorer_names import REGISTERED
from dare_hf.engine.attach import state_of
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.testing import tiny_model
from dare_hf.training import auxiliary_loss

NAMES = ("llava", "gemma3")


@pytest.mark.parametrize("name", [*NAMES, "chameleon"])
@pytest.mark.parametrize("scorer", ["attention", "random"])
def test_two_models_of_one_config(name, scorer):
    first = tiny_model(name)
    alone, inputs = tiny_model(name), inputs_of(first)
    kind, before = type(first), first.config.get_text_config()._attn_implementation
    config = DareConfig(scorer=scorer, decode_window=3)
    with dare(alone, config):
        expected = generate(alone, inputs)
    second = kind(first.config).eval()
    apply_dare(first, config)
    third = kind(first.config).eval()  # made while another model has DARE
    for model in (second, third):
        model.load_state_dict(first.state_dict())
        plain = generate(model, inputs)
        apply_dare(model, config)
        assert_same_run(generate(model, inputs), expected, what=f"{name}, shared config")
        assert_same_run(generate(first, inputs), expected, what=f"{name}, the first")
        remove_dare(model)
        assert_same_run(generate(model, inputs), plain, tolerance=0, what=f"{name}, removed")
    remove_dare(first)
    assert first.config.get_text_config()._attn_implementation == before
    assert_same_run(generate(first, inputs), plain, tolerance=0, what=f"{name}, all removed")


@pytest.mark.parametrize("name", NAMES)
def test_early_exit_runs_the_first_layers_at_their_own_rates(name):
    model, short = tiny_model(name, layers=6), tiny_model(name, layers=6)
    text, inputs = model.config.get_text_config(), inputs_of(model)
    pairs = [(0.5, 0.8), (0.4, 0.9), (0.7, 0.6), (0.9, 0.9), (0.3, 0.3), (0.2, 0.2)]
    short.model.language_model.layers = short.model.language_model.layers[:3]
    short.config.get_text_config().num_hidden_layers = 3
    fields = {"hop_delimiters": tuple(range(10, 40)), "hop_decay": 0.6}
    with dare(short, schedule=pairs[:3], **fields):
        expected, wanted = generate(short, inputs), last_report(short)
    with dare(model, schedule=pairs, **fields):
        whole = generate(model, inputs)
        text.num_hidden_layers = 3
        found, report = generate(model, inputs), last_report(model)
        assert_same_run(found, expected, what="three of six layers")
        assert (report.flops, report.flops_baseline) == (wanted.flops, wanted.flops_baseline)
        assert report.kv_bytes == report.kv_bytes_predicted == wanted.kv_bytes
        assert report.kv_bytes_baseline == wanted.kv_bytes_baseline
        assert [hop[:3] for hop in report.retention] == wanted.retention
        assert all(hop[3:] == [{"text": None, "vision": None}] * 3 for hop in report.retention)
        text.num_hidden_layers = 6
        assert_same_run(generate(model, inputs), whole, tolerance=0, what="all layers again")


@pytest.mark.parametrize("name", NAMES)
def test_rates_are_solved_for_the_full_depth(name):
    model = tiny_model(name)
    text, inputs = model.config.get_text_config(), inputs_of(model)
    with dare(model, DareConfig(scorer="key_norm")):
        generate(model, inputs)
        rates = last_report(model).retention[0]
    text.num_hidden_layers = 2
    plain = generate(model, inputs)
    with dare(model, DareConfig(scorer="key_norm")):
        cache = DareCache(model.config)
        generate(model, inputs, **{CACHE: cache})
        assert last_report(model).retention[0][:2] == rates[:2]
        assert cache.kept_lengths().shape[0] == 2
    with dare(model, vision_retention=1.0, text_retention=1.0):
        assert_same_run(generate(model, inputs), plain, what="two layers, nothing pruned")


DELIMITERS = tuple(range(10, 60))
CONFIGS = {
    "attention": DareConfig(decode_window=3),
    "function": DareConfig(scorer=SCORER, schedule="constant", hop_delimiters=DELIMITERS),
}


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def torch_saved(thing):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("name", [*NAMES, "chameleon"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("travel", [pickled, torch_saved, copy.deepcopy])
def test_a_patched_model_travels(name, config, travel):
    model = tiny_model(name)
    inputs, plain = inputs_of(model), generate(model, inputs_of(model))
    apply_dare(model, CONFIGS[config])
    expected = generate(model, inputs)
    twin = travel(model)
    assert_same_run(generate(twin, inputs), expected, tolerance=0, what="the twin")
    assert last_report(twin).flops == last_report(model).flops
    assert state_of(twin).controller is not state_of(model).controller
    with dare_disabled(twin):
        assert_same_run(generate(twin, inputs), plain, tolerance=0, what="the twin, disabled")
    remove_dare(model)
    assert_same_run(generate(twin, inputs), expected, tolerance=0, what="the other was removed")
    remove_dare(twin)
    assert_same_run(generate(twin, inputs), plain, tolerance=0, what="the twin, removed")
    assert not any("_dare" in key or key == "forward" for m in twin.modules() for key in vars(m))


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_model_with_a_router_travels(name, tmp_path):
    folder, inputs = saved(tmp_path, name), inputs_of(tiny_model(name))
    applied = apply_dare(tiny_model(name), folder)
    wrapped = PeftModel.from_pretrained(tiny_model(name), folder).eval()
    expected = tokens(applied, inputs)
    for model in (applied, wrapped):
        assert tokens(model, inputs) == expected
        twin = pickled(model)
        assert tokens(twin, inputs) == expected
        assert last_report(twin).kv_bytes == last_report(model).kv_bytes
    trained = pickled(adapted(tiny_model(name))).train()
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    loss = trained(**inputs, labels=labels).loss + auxiliary_loss(trained)[0]
    loss.backward()
    grads = [p.grad for n, p in trained.named_parameters() if "dare_router" in n]
    assert all(grad is not None for grad in grads)
    assert any(grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("name", NAMES)
def test_what_generate_returns_travels(name):
    model = tiny_model(name)
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, scorer=SCORER, hop_delimiters=DELIMITERS, hop_decay=0.7):
        out = generate(model, inputs)
        twin = pickled(out)
        cache, own = cache_of(twin), cache_of(out)
        assert cache.report.to_dict() == own.report.to_dict()
        assert torch_saved(cache).kept_lengths().equal(own.kept_lengths())
        assert cache.kv_bytes() == own.kv_bytes()
        assert cache.hops.equal(own.hops)
        more = {"input_ids": torch.full((3, 1), 70), "use_cache": True}
        more["attention_mask"] = torch.ones(3, own.get_seq_length() + 1, dtype=torch.long)
        logits = [model(**copy.deepcopy(more), **{CACHE: c}).logits for c in (own, cache)]
        assert logits[0].equal(logits[1])
        assert cache.report.to_dict()["tokens"] == last_report(model).to_dict()["tokens"]


def test_a_scorer_the_other_process_does_not_know_is_named():
    register_scorer("test_travels", lambda hidden, *_, **__: hidden.sum(-1))
    with dare(tiny_model("llava"), scorer="test_travels") as model:
        data = pickle.dumps(model)
    del REGISTERED["test_travels"]
    with pytest.raises(DareConfigError, match="test_travels"):
        pickle.loads(data)


CHILD = """
import pickle, sys
from pathlib import Path
model, inputs = pickle.loads(Path(sys.argv[1]).read_bytes())
print(model.generate(**inputs, max_new_tokens=6, do_sample=False).tolist())
"""


@pytest.mark.parametrize("name", ["llava", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_new_process_takes_a_patched_model(name, tmp_path: Path):
    model = apply_dare(tiny_model(name))
    inputs = inputs_of(model)
    (tmp_path / "model").write_bytes(pickle.dumps((model, inputs)))
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(tmp_path / "model")]
    told = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
    expected = model.generate(**copy.deepcopy(inputs), max_new_tokens=6, do_sample=False)
    assert told.stdout.strip() == str(expected.tolist()), told.stderr[-2000:]


def export(model, inputs):
    torch.export.export(model, (), inputs, strict=False)


def export_strictly(model, inputs):
    torch.export.export(model, (), inputs, strict=True)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def trace(model, inputs):
    torch.jit.trace(Logits(model), (inputs["input_ids"],), check_trace=False)


@pytest.mark.filterwarnings("ignore")  # what torch says of transformers' code while it records it
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("record", [export, export_strictly, trace])
def test_an_export_says_what_to_do(name, record):
    model = tiny_model(name)
    ids = torch.randint(10, 90, (1, 12))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with dare(model, DareConfig()):
        with pytest.raises(DareStateError, match="dare_disabled"):
            record(model, inputs)
        with dare_disabled(model):
            record(model, inputs)
        forward(model, inputs)  # nothing was left open
    record(model, inputs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["library", "peft"])
def test_calling_forward_is_calling_the_model(name, method):
    base = tiny_model(name)
    inputs = inputs_of(base, (0, 1))
    labels = inputs["input_ids"].clone()
    labels[:, :-5] = -100
    model = adapted(base).train() if method == "peft" else apply_dare(base, CONFIGS["function"])
    results = []
    for call in (base, base.forward):
        found = call(**copy.deepcopy(inputs), labels=labels)
        gradients = []
        if method == "peft":
            model.zero_grad()
            (found.loss + auxiliary_loss(model)[0]).backward()
            pairs = [(n, p) for n, p in model.named_parameters() if "dare_router" in n]
            gradients = [p.grad.clone() for _, p in pairs]
            assert any(g.abs().max() > 0 for g in gradients)
        results.append((found.loss, found.logits, *gradients))
    for left, right in zip(*results, strict=True):
        assert left.equal(right)
    base.eval()
    found = base.forward(inputs["input_ids"], **{k: inputs[k] for k in inputs if k != "input_ids"})
    with torch.no_grad():
        again = base(**copy.deepcopy(inputs)).logits
    assert found.logits.detach().equal(again)
    handle = base.lm_head.register_forward_pre_hook(broken)
    with dare_disabled(model), pytest.raises(KeyError, match="broken"):
        base.forward(**copy.deepcopy(inputs))
    with pytest.raises(KeyError, match="broken"):
        base.forward(**copy.deepcopy(inputs))
    handle.remove()
    assert base.forward(**copy.deepcopy(inputs)).logits.detach().equal(again)


def broken(*args):
    raise KeyError("broken")


def with_forward(model, forward):
    """Return a model of a subclass with this forward, and the same weights."""
    kind = type("Mine", (type(model),), {"forward": forward})
    mine = kind(model.config).eval()
    mine.load_state_dict(model.state_dict())
    return mine


@pytest.mark.parametrize("name", [*NAMES, "qwen2_5_vl"])
def test_a_forward_may_take_its_arguments_by_star(name):
    plain = tiny_model(name)
    kind = type(plain)

    def both(self, *args, **kwargs):
        return kind.forward(self, *args, **kwargs)

    def positions(self, *args):
        return kind.forward(self, *args)

    def first(self, input_ids, *args, **kwargs):
        return kind.forward(self, input_ids, *args, **kwargs)

    def more(self, temperature=2.0, *args, **kwargs):
        return kind.forward(self, *args, **kwargs)

    inputs = inputs_of(plain, (0, 1))
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for forward_of in (both, positions, first, more):
        mine = with_forward(plain, forward_of)
        config = CONFIGS["function"]
        with dare(plain, config), dare(mine, config), torch.no_grad():
            if forward_of is not positions:
                found = mine(**copy.deepcopy(inputs)).logits
                assert found.equal(plain(**copy.deepcopy(inputs)).logits)
            text = torch.randint(10, 90, (2, 12))
            if forward_of is more:
                with pytest.raises(DareInputError, match="by keyword"):
                    mine(2.0, text)
                continue
            assert mine(text).logits.equal(plain(text).logits)
            assert last_report(mine).flops == last_report(plain).flops
    with dare(plain, CONFIGS["function"]), torch.no_grad():
        assert plain(ids[:1, -4:], None, mask[:1, -4:]).logits.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_mixed_peft_model(name):
    base = tiny_model(name)
    inputs = inputs_of(base)
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(base, lora, mixed=True).eval()
    plain = tokens(model, inputs)
    assert apply_dare(model, CONFIGS["function"]) is model
    pruned = tokens(model, inputs)
    assert pruned != plain
    assert last_report(model).kv_bytes < last_report(model).kv_bytes_baseline
    with dare_disabled(model):
        assert tokens(model, inputs) == plain
    remove_dare(model)
    assert tokens(model, inputs) == plain


@pytest.mark.parametrize("name", ["llava", "chameleon"])
def test_a_router_put_on_is_no_part_of_the_checkpoint(name, tmp_path):
    plain = tiny_model(name)
    model = apply_dare(tiny_model(name), saved(tmp_path, name))
    inputs = inputs_of(model)
    expected = tokens(model, inputs)
    assert list(model.state_dict()) == list(plain.state_dict())
    assert any("dare_router" in key for key, _ in model.named_parameters())
    plain.load_state_dict(model.state_dict())
    for assign in (False, True):
        model.load_state_dict(plain.state_dict(), assign=assign)
        assert tokens(model, inputs) == expected
    model.save_pretrained(tmp_path / "whole")
    _, told = type(model).from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not told["unexpected_keys"]
    assert not told["missing_keys"]
    model.to(torch.float64).to(torch.float32)
    assert tokens(model, inputs) == expected
    missing = dict(plain.state_dict())
    missing.pop(next(iter(missing)))
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(missing)
    wrapped = PeftModel.from_pretrained(tiny_model(name), saved(tmp_path, name))
    assert any("dare_router" in key for key in wrapped.state_dict()), "peft's are as they were"


@pytest.mark.parametrize("name", NAMES)
def test_mixed_precision_wraps_and_unwraps_the_forward(name):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    model = apply_dare(tiny_model(name), CONFIGS["function"])
    inputs, shown = inputs_of(model), inspect.signature(model.forward)
    assert "input_ids" in shown.parameters
    expected = forward(model, inputs).logits
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(model)
    assert inspect.signature(prepared.forward) == shown
    assert not forward(prepared, inputs).logits.equal(expected), "bf16"
    report = last_report(model)
    again = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert forward(again, inputs).logits.equal(expected)
    assert last_report(again).flops == report.flops
    remove_dare(again)
    AcceleratorState._reset_state()
    assert not forward(again, inputs).logits.equal(expected)
