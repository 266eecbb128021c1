"""The range of transformers versions: declared once, branched on in one file, run on the oldest."""

import ast
import os
import tomllib
from pathlib import Path

import pytest
import torch
import transformers

from dare_hf import apply_dare, compat, remove_dare
from dare_hf.errors import DareInputError
from dare_hf.testing import tiny_inputs, tiny_model

ROOT = Path(__file__).parents[1]


def test_the_oldest_version_is_declared_and_run():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert f"transformers>={compat.OLDEST}" in project["dependencies"]
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
