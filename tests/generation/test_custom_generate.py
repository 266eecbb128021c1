"""examples/custom_generate is what transformers takes as a folder of custom generation code."""

from pathlib import Path

import pytest
import torch

from dare_hf import DareConfig, apply_dare, dare_applied, remove_dare
from dare_hf.compat import cache_of
from dare_hf.errors import DareStateError
from dare_hf.testing import tiny_inputs, tiny_model

FOLDER = str(Path(__file__).parents[2] / "examples" / "custom_generate")
FIELDS = {"vision_retention": 0.4, "schedule": "constant"}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """generate through the folder; transformers copies its code into a cache first."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    model = tiny_model("llava")
    inputs = tiny_inputs(model, batch=2)
    settings = {"max_new_tokens": 6, "do_sample": False}

    def generate(**more):
        return model.generate(**inputs, **settings, **more)

    return model, generate


def test_the_folder_prunes_for_one_call(run):
    model, generate = run
    plain = generate()
    with dare_applied(model, DareConfig.preset("safe", **FIELDS)):
        expected = generate()
    folder = {"custom_generate": FOLDER, "trust_remote_code": True}
    found = generate(**folder, dare_fields=FIELDS)
    assert torch.equal(found, expected)
    whole = generate(**folder, dare_fields=FIELDS, return_dict_in_generate=True)
    report = cache_of(whole).report
    assert torch.equal(whole.sequences, found)
    assert report.kv_bytes < report.kv_bytes_baseline
    assert not torch.equal(found, plain), "this model answers otherwise when it is pruned so"
    assert torch.equal(generate(), plain), "nothing is left on the model"
    by_name = generate(**folder, dare="fastv")
    with dare_applied(model, "fastv"):
        assert torch.equal(by_name, generate())


def test_code_of_a_folder_needs_trust(run):
    _, generate = run
    with pytest.raises(ValueError, match="trust_remote_code"):
        generate(custom_generate=FOLDER, trust_remote_code=False)


def test_a_model_that_has_dare_is_refused(run):
    model, generate = run
    apply_dare(model)
    with pytest.raises(DareStateError):
        generate(custom_generate=FOLDER, trust_remote_code=True)
    remove_dare(model)
