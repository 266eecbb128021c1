"""The range of transformers versions: declared once, branched on in one file, run on the oldest."""

import ast
import os
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers

from dare_hf import DareCache, apply_dare, compat, remove_dare
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
    model.generate(**inputs, past_key_values=cache, max_new_tokens=2, do_sample=False)
    length = cache.get_seq_length()
    with pytest.raises(DareInputError, match=r"past_key_values: expected transformers"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=2)
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
