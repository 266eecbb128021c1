"""Bad input gets a DareError that names what was expected and got, and harms nothing."""

import math

import pytest
import torch
from laws import SCORER, TINY_MODELS, dare, forward, generate, inputs_of, shared_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    StaticCache,
)

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
from dare_hf.errors import (
    DareConfigError,
    DareError,
    DareInputError,
    DareStateError,
    UnsupportedModelError,
)
from dare_hf.testing import tiny_model

PRUNED = {"vision_retention": 0.4, "text_retention": 0.7}
NAN, INF = math.nan, math.inf

BAD_FIELDS = [
    ("vision_retention", 0),
    ("vision_retention", -0.1),
    ("vision_retention", 1.01),
    ("vision_retention", NAN),
    ("vision_retention", INF),
    ("vision_retention", True),
    ("vision_retention", "0.5"),
    ("vision_retention", None),
    ("text_retention", 0.0),
    ("text_retention", 2),
    ("text_retention", NAN),
    ("schedule", "every_layer"),
    ("schedule", []),
    ("schedule", [(0.5,)]),
    ("schedule", [(0.5, 0.0)] * 4),
    ("schedule", [(NAN, 0.5)] * 4),
    ("plan_every", 0),
    ("plan_every", 1.5),
    ("batch_budget", "largest"),
    ("uniform_share", -0.1),
    ("uniform_share", 1.1),
    ("cut_layer", -1),
    ("cut_layer", 1.5),
    ("cut_layer", "middle"),
    ("prefix_tokens", -1),
    ("prefix_tokens", 1.0),
    ("pruned", "skip"),
    ("scorer", ""),
    ("scorer", None),
    ("hop_decay", 0.0),
    ("max_hops", 0),
    ("max_kv_tokens", 0),
    ("decode_window", 0),
    ("always_keep_token_ids", (-1,)),
    ("image_token_ids", ("<image>",)),
    ("seed", 0.5),
]


def leaves(value):
    """Yield what a refusal may show of a value: itself, or the entry that is wrong."""
    yield repr(value)
    for entry in value if isinstance(value, list | tuple) else ():
        yield from leaves(entry)


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS, ids=str)
def test_a_bad_field_is_refused_by_name_and_value(field, value):
    with pytest.raises(DareConfigError) as caught:
        DareConfig(**{field: value})
    text = str(caught.value)
    assert field in text
    assert any(f"got {leaf}" in text for leaf in leaves(value))
    assert isinstance(caught.value, ValueError)


BAD_CONFIGS = {
    "unknown scorer": ({"scorer": "no_such_scorer"}, r"no_such_scorer"),
    "router without adapter": ({"scorer": "router"}, r"adapter"),
    "learned without adapter": ({"schedule": "learned"}, r"adapter"),
    "short list": ({"schedule": [(0.5, 0.5)] * 3}, r"4.*3"),
    "long list": ({"schedule": [(0.5, 0.5)] * 5}, r"4.*5"),
    "cut layer past the end": ({"cut_layer": 4, "schedule": "two_stage"}, r"cut_layer.*3.*4"),
    "image ids outside": ({"image_token_ids": (5000,)}, r"image_token_ids.*5000"),
    "kept ids outside": ({"always_keep_token_ids": (5000,)}, r"always_keep_token_ids.*5000"),
    "delimiter outside": ({"hop_delimiters": (5000,)}, r"hop_delimiters.*5000"),
    "string delimiter": ({"hop_delimiters": ("</x>",)}, r"processor"),
    "routed decode": ({"decode": "routed"}, r"adapter"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_a_config_that_does_not_fit_the_model_is_refused(case):
    fields, text = BAD_CONFIGS[case]
    model = shared_model("llava")
    inputs = inputs_of(model)
    plain = forward(model, inputs).logits
    with pytest.raises(DareConfigError, match=rf"(?s){text}"):
        apply_dare(model, DareConfig(**{"scorer": SCORER, **fields}))
    assert torch.equal(forward(model, inputs).logits, plain)
    with pytest.raises(DareStateError):
        remove_dare(model)


@pytest.mark.parametrize("config", [0.4, {"vision_retention": 0.4}, DareConfig])
def test_a_config_of_another_type_is_refused(config):
    with pytest.raises(DareConfigError, match="DareConfig"):
        apply_dare(shared_model("llava"), config)


def unsupported_model():
    return GPTNeoXForCausalLM(
        GPTNeoXConfig(
            vocab_size=50,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            eos_token_id=None,
        )
    )


def test_an_unsupported_model_is_refused_by_name():
    model = unsupported_model()
    attributes = set(vars(model))
    with pytest.raises(UnsupportedModelError, match=r"'gpt_neox' cannot be routed: its layers"):
        apply_dare(model)
    assert set(vars(model)) == attributes
    assert model.generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)


@pytest.mark.parametrize("thing", [torch.nn.Linear(2, 2), None, "llava"], ids=str)
def test_what_is_no_model_is_refused(thing):
    with pytest.raises(UnsupportedModelError):
        apply_dare(thing)


def test_a_model_without_generate_is_refused():
    with pytest.raises(UnsupportedModelError):
        apply_dare(tiny_model("llava").model)


BAD_CACHES = {
    "static": lambda config: StaticCache(config=config, max_cache_len=64),
    "dynamic": lambda config: DynamicCache(config=config),
    "offloaded": lambda config: DynamicCache(config=config, offloading=True),
    "tuple": lambda config: ((),),
}


@pytest.fixture(params=TINY_MODELS)
def patched(request):
    """Give a pruned model, its inputs, and a check that it still runs as it did."""
    model = shared_model(request.param)
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, **PRUNED):
        expected = generate(model, inputs, max_new_tokens=3)
        yield model, inputs
        again = generate(model, inputs, max_new_tokens=3)
        assert again.sequences.tolist() == expected.sequences.tolist()
        for ours, theirs in zip(again.logits, expected.logits, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("call", [generate, forward])
def test_a_foreign_cache_is_refused_by_type(patched, call):
    model, inputs = patched
    for make in BAD_CACHES.values():
        cache = make(model.config.get_text_config())
        with pytest.raises(DareInputError, match=rf"(?s)DareCache.*{type(cache).__name__}"):
            call(model, inputs, **{CACHE: cache})


def test_a_cache_implementation_of_the_callers_is_refused(patched):
    model, inputs = patched
    for kind in ("static", "dynamic", "offloaded", "quantized"):
        with pytest.raises(DareInputError, match=rf"cache_implementation.*{kind}"):
            generate(model, inputs, cache_implementation=kind)
        config = GenerationConfig(cache_implementation=kind, max_new_tokens=2, pad_token_id=0)
        with pytest.raises(DareInputError, match=rf"cache_implementation.*{kind}"):
            model.generate(**inputs, generation_config=config)


def test_one_of_the_checkpoint_is_overridden():
    model = tiny_model("llava")
    inputs = inputs_of(model)
    with dare(model, **PRUNED):
        expected = generate(model, inputs)
    model.generation_config.cache_implementation = "static"
    with dare(model, **PRUNED):
        out = generate(model, inputs)
    assert isinstance(cache_of(out), DareCache)
    assert out.sequences.tolist() == expected.sequences.tolist()
    assert model.generation_config.cache_implementation == "static"


def embedded(model, inputs):
    """Return the inputs with embeddings in the place of ids, and the true modality mask."""
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    mask = (inputs["input_ids"] == model.config.image_token_id).long()
    return {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}, mask


@pytest.mark.parametrize("call", [generate, forward])
def test_embeddings_need_a_modality_mask(call):
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1, 2))
    with dare(model, **PRUNED):
        expected = generate(model, inputs).sequences
        bare, mask = embedded(model, inputs)
        with pytest.raises(DareInputError, match=r"(?s)modality_mask.*inputs_embeds"):
            call(model, bare)
        call(model, {**bare, "modality_mask": mask})
        assert generate(model, inputs).sequences.tolist() == expected.tolist()


@pytest.mark.parametrize("call", [generate, forward])
def test_embeddings_with_a_mask_are_routed_as_ids_are(call):
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1, 2), pixels=True)
    del inputs["pixel_values"]  # the placeholders' own embeddings stand for the images
    bare, mask = embedded(model, inputs)
    with dare(model, **PRUNED):
        ids, embeds = call(model, inputs), call(model, {**bare, "modality_mask": mask})
    if call is generate:
        assert torch.equal(cache_of(ids).kept_lengths(), cache_of(embeds).kept_lengths())
    ours, theirs = (
        torch.stack(run.logits) if call is generate else run.logits for run in (embeds, ids)
    )
    assert torch.allclose(ours, theirs, atol=1e-4)


SHAPES = {
    "one column short": lambda b, n: (b, n - 1),
    "one row more": lambda b, n: (b + 1, n),
    "one axis": lambda b, n: (n,),
    "three axes": lambda b, n: (b, n, 1),
    "columns nobody has": lambda b, n: (b, n + 4),
    "a row for all": lambda b, n: (b + 1 if b == 1 else 1, n),
}


@pytest.mark.parametrize("call", [generate, forward])
def test_a_modality_mask_of_another_shape_is_refused(patched, call):
    model, inputs = patched
    rows, columns = inputs["input_ids"].shape
    for shape in SHAPES.values():
        wrong = shape(rows, columns)
        mask = torch.zeros(wrong, dtype=torch.long)
        with pytest.raises(DareInputError, match=rf"(?s)modality_mask.*{rows}, {columns}") as got:
            call(model, {**inputs, "modality_mask": mask})
        assert str(list(wrong)) in str(got.value)


def test_an_explicit_mask_overrides_the_ids():
    model = shared_model("llava")
    inputs = inputs_of(model)
    with dare(model, vision_retention=0.1, text_retention=1.0, prefix_tokens=0):
        usual = cache_of(generate(model, inputs)).kept_lengths()
        nothing = torch.zeros_like(inputs["input_ids"])
        as_text = generate(model, {**inputs, "modality_mask": nothing})
    length = inputs["input_ids"].shape[1] + len(as_text.logits) - 1
    assert (cache_of(as_text).kept_lengths() == length).all()
    assert (usual == length - 8).all()  # 1 of 9 image tokens


def test_apply_twice_is_refused(patched):
    model, _ = patched
    with pytest.raises(DareStateError, match="remove_dare"):
        apply_dare(model)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_calls_on_a_model_without_dare_are_refused(name):
    model = shared_model(name)
    inputs = inputs_of(model)
    plain = generate(model, inputs).sequences
    for call in (remove_dare, last_report, lambda m: dare_disabled(m).__enter__()):
        with pytest.raises(DareStateError, match="apply_dare"):
            call(model)
    assert generate(model, inputs).sequences.tolist() == plain.tolist()


def test_a_report_before_any_run_is_refused():
    with dare(shared_model("llava")) as model, pytest.raises(DareStateError, match="run"):
        last_report(model)


@pytest.mark.parametrize("name", ["attention", "random", "key_norm", "position", "router", "", 3])
def test_a_scorer_must_have_a_name_of_its_own(name):
    with pytest.raises(DareConfigError, match="register_scorer"):
        register_scorer(name, lambda *args, **kwargs: None)


def test_a_scorer_must_be_callable():
    with pytest.raises(DareConfigError, match="register_scorer"):
        register_scorer("test_uncallable", 3)


BAD_SCORES = {
    "shape": lambda hidden, modality, **_: hidden,
    "one row": lambda hidden, modality, **_: hidden[:1, :, 0],
    "nothing": lambda hidden, modality, **_: None,
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_scores_of_another_shape_are_refused(case):
    model = shared_model("llava")
    inputs = inputs_of(model, (0, 1))
    register_scorer("test_bad_scores", BAD_SCORES[case])
    with dare(model, scorer="test_bad_scores"), pytest.raises(DareInputError, match="test_bad_sc"):
        generate(model, inputs)


def test_every_error_is_one_family():
    kinds = (DareConfigError, DareInputError, DareStateError, UnsupportedModelError)
    assert all(issubclass(kind, DareError) for kind in kinds)
    bases = (ValueError, ValueError, RuntimeError, TypeError)
    assert all(issubclass(kind, base) for kind, base in zip(kinds, bases, strict=True))


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_pruned_cache_is_refused_where_dare_is_disabled(name):
    """The plain model would read a cache with holes as if it were whole."""
    model = shared_model(name)
    inputs = inputs_of(model)
    with dare(model, **PRUNED):
        out = generate(model, inputs)
        turn = {"input_ids": torch.cat([out.sequences, out.sequences[:, -1:]], dim=1)}
        turn["attention_mask"] = torch.ones_like(turn["input_ids"])
        with dare_disabled(model), pytest.raises(DareStateError, match="pruned"):
            generate(model, turn, **{CACHE: cache_of(out)})
        assert generate(model, inputs).sequences.tolist() == out.sequences.tolist()
