"""Every architecture of transformers that generates keeps the laws, or is refused."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dare_hf import compat
from dare_hf.architectures.locate import REFUSALS, SPECS, find_spec
from dare_hf.architectures.supported import SUPPORTED
from dare_hf.architectures.text_models import TEXT_SUPPORTED
from dare_hf.cache import DareLayer
from dare_hf.cli import app
from dare_hf.conformance import Kind, architectures, run_row, runner
from dare_hf.conformance.laws import LawBroken, identity, oracle
from dare_hf.conformance.page import PAGES, expected, renewed
from dare_hf.conformance.subject import Subject
from dare_hf.engine import gathering, masks, routed_layer
from dare_hf.engine.gathering import Turn
from dare_hf.errors import DareInputError, UnsupportedModelError

FAST = {"qwen3_vl", "idefics3", "mllama", "qwen3_5", "kimi_k25", "blip-2", "paligemma", "udop"}
"""One of each kind: deepstack, stacked tiles, cross-attention, linear attention, latents, generate
of the inner model, two-way prompts, refused."""
FAST_TEXT = {"llama", "gpt_oss", "cohere2", "deepseek_v3", "granitemoehybrid", "mamba"}
"""Plain, sinks, parallel blocks with windows, latents, a hybrid with multipliers, refused."""
SUPPORT = {Kind.vision: SUPPORTED, Kind.text: TEXT_SUPPORTED}
FEWEST_PASSES = {Kind.vision: 80, Kind.text: 95}
KNOWN = architectures() | architectures(Kind.text)
MISSING = {*SPECS, *REFUSALS} - set(KNOWN)
"""Architectures of newer versions of transformers than the one that runs."""


def cases():
    for name in sorted({*KNOWN, *SPECS, *REFUSALS}):
        yield pytest.param(name, marks=() if name in FAST | FAST_TEXT else pytest.mark.slow)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("model_type", list(cases()))
def test_an_architecture_keeps_the_laws_or_is_refused(model_type):
    if model_type in MISSING:
        pytest.skip("not in this transformers")
    row = run_row(model_type)
    assert (row.status, row.reason if row.status == "fail" else "") == (expected(model_type), "")
    if row.status == "refused":
        assert (REFUSALS.get(model_type) or compat.broken(model_type)) in row.reason


@pytest.mark.filterwarnings("ignore:Casting complex values:UserWarning")
@pytest.mark.parametrize("model_type", sorted(n for n in SPECS if compat.broken(n)))
def test_what_transformers_cannot_run_fails_without_dare_too(model_type):
    with pytest.raises(AttributeError, match="image_outputs"):
        Subject.of(model_type)


@pytest.mark.parametrize("kind", Kind)
def test_every_architecture_is_one_or_the_other(kind):
    names = set(architectures(kind))
    assert names <= set(SPECS) | set(REFUSALS)
    assert not set(SPECS) & set(REFUSALS)
    assert len(SUPPORT[kind]) >= FEWEST_PASSES[kind]


def test_no_name_is_of_both_kinds():
    assert not set(architectures()) & set(architectures(Kind.text))


def test_what_is_missing_came_later():
    since = {name: compat.minor(spec.since) for name, spec in SPECS.items()}
    assert MISSING & set(SPECS) == {n for n, version in since.items() if version > compat.VERSION}


@pytest.mark.parametrize("model_type", sorted(REFUSALS))
def test_a_refusal_says_why(model_type):
    with pytest.raises(UnsupportedModelError, match=r"cannot be routed: .* See docs/"):
        find_spec(model_type)


@pytest.mark.skipif(bool(MISSING), reason="the page lists what a newer transformers has")
@pytest.mark.parametrize(("kind", "name"), PAGES.items())
def test_the_page_lists_what_the_code_knows(kind, name):
    text = (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8")
    assert renewed(text, kind) == text, "run scripts/supported_models.py"


def test_the_command_prints_one_json_line():
    result = CliRunner().invoke(app, ["conformance", "--json", "--only", "udop", "--only", "pi0"])
    assert result.exit_code == 0
    (line,) = result.stdout.splitlines()
    rows = json.loads(line)["rows"]
    assert [set(row) for row in rows] == [{"model_type", "class", "status", "reason"}] * 2
    assert [(row["model_type"], row["status"]) for row in rows] == [
        ("udop", "refused"),
        ("pi0", "refused"),
    ]


def test_the_command_takes_language_models(monkeypatch):
    names = {"mamba": "MambaForCausalLM", "bert": "BertLMHeadModel"}
    monkeypatch.setitem(runner.MAPPINGS, Kind.text, names)
    result = CliRunner().invoke(app, ["conformance", "--kind", "text", "--json"])
    assert result.exit_code == 0
    rows = json.loads(result.stdout)["rows"]
    assert [(row["model_type"], row["class"], row["status"]) for row in rows] == [
        ("mamba", "MambaForCausalLM", "refused"),
        ("bert", "BertLMHeadModel", "refused"),
    ]


def test_an_unknown_name_is_refused_with_those_near_to_it():
    with pytest.raises(UnsupportedModelError, match=r"got 'mistrall' \(near to it: mistral"):
        find_spec("mistrall")
    with pytest.raises(DareInputError, match="no_such_model"):
        run_row("no_such_model")
    result = CliRunner().invoke(app, ["conformance", "--only", "no_such_model"])
    assert result.exit_code == 2


def reversed_tokens(found):
    return found.flip(1)


def shifted(found):
    return found.roll(1, dims=-1)


def shifted_positions(found):
    return tuple(part.roll(1, dims=-2) for part in found) if isinstance(found, tuple) else found


@pytest.mark.parametrize(
    ("where", "name", "mutation"),
    [
        ([Turn], "_columns", shifted),
        ([gathering, routed_layer], "take_tokens", reversed_tokens),
        ([Turn], "_remembered", shifted_positions),
        ([masks], "_take", shifted),
    ],
    ids=["mask columns", "tokens", "positions", "mask rows"],
)
def test_a_wrong_gather_is_found(monkeypatch, where, name, mutation):
    """The laws can fail: mutate what gathers, and the row breaks."""
    subject, right = Subject.of("llava"), getattr(where[0], name)
    identity(subject)
    for module in where:
        monkeypatch.setattr(module, name, lambda *a, **kw: mutation(right(*a, **kw)))
    with pytest.raises((LawBroken, RuntimeError, IndexError)):
        oracle(subject)


def test_rows_that_are_not_reordered_are_found(monkeypatch):
    """Beams take other rows at every step: a cache that keeps its own writes other tokens."""
    subject = Subject.of("llava")
    batch = subject.batches["padded"]
    options = {"num_beams": 3, "max_new_tokens": 12}
    plain = subject.generate(batch, **options).sequences.tolist()
    with subject.dare(vision_retention=1.0, text_retention=1.0):
        assert subject.generate(batch, **options).sequences.tolist() == plain
        monkeypatch.setattr(DareLayer, "reorder_cache", lambda self, beams, order=None: None)
        # with one row a beam, a layer that never widens breaks as well
        try:
            found = subject.generate(batch, **options).sequences.tolist()
        except RuntimeError:
            return
    assert found != plain


def test_a_model_that_repeats_itself_proves_nothing():
    subject = Subject.of("llava")
    with torch.no_grad():
        subject.model.get_output_embeddings().weight.zero_()
    with pytest.raises(LawBroken, match="writes only"):
        identity(subject)
