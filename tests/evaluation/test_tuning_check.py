"""`dare-hf check`: the number, the exit code, and refusals before any weight is loaded."""

import json

import pytest
from row_models import llama_folder, llava_folder, written_rows
from typer.testing import CliRunner

from dare_hf import DareConfig
from dare_hf.cli import app
from dare_hf.errors import DareConfigError, DareInputError
from dare_hf.tuning import check, loading

KEYS = ["agreement", "kl", "floor", "passed", "rows"]
HARSH = DareConfig(vision_retention=0.05, schedule="constant", max_kv_tokens=4)


def _run(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_check_passes_and_fails_by_its_exit_code(tmp_path):
    model, file = llava_folder(tmp_path / "model"), written_rows(tmp_path, 3)
    HARSH.save_pretrained(str(tmp_path / "harsh"))
    everything = DareConfig(vision_retention=1.0, text_retention=1.0, schedule="constant")
    everything.save_pretrained(str(tmp_path / "all"))
    passed = _run(model, "--config", tmp_path / "all", "--data", file, "--json")
    assert passed.exit_code == 0, passed.output
    line = json.loads(passed.stdout)
    assert list(line) == KEYS
    assert (line["agreement"], line["passed"], line["rows"]) == (1.0, True, 3)
    failed = _run(model, "--config", tmp_path / "harsh", "--data", file, "--json")
    assert failed.exit_code == 1, failed.output
    line = json.loads(failed.stdout)
    assert line["agreement"] < 0.98
    assert line["kl"] > 0
    lenient = _run(
        model, "--config", tmp_path / "harsh", "--data", file, "--floor", line["agreement"]
    )
    assert lenient.exit_code == 0, lenient.output


def test_a_preset_on_a_text_model(tmp_path):
    model, file = llama_folder(tmp_path / "model"), written_rows(tmp_path, 2, images=False)
    found = check(str(model), "safe", file)
    assert found.passed
    assert found.agreement == 1.0


def test_what_is_refused_is_refused_before_weights_load(tmp_path, monkeypatch):
    model, file = llama_folder(tmp_path / "model"), written_rows(tmp_path, 2)

    def load(*rest, **more):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", load)
    refused = _run(model, "--config", "safe", "--data", file)
    assert refused.exit_code == 2
    assert "line 1" in refused.stderr
    file.write_text('{"prompt": "a"}\n{"prompt": "a", "image": "../x.png"}')
    refused = _run(model, "--config", "safe", "--data", file)
    assert refused.exit_code == 2
    assert "line 2" in refused.stderr
    assert _run(model, "--config", "safe", "--data", tmp_path / "no").exit_code == 2
    assert _run(tmp_path / "no", "--config", "safe", "--data", file).exit_code == 2
    assert _run(model, "--config", "safe", "--data", file, "--floor", 2).exit_code == 2


def test_unusable_configurations_are_refused(tmp_path):
    model, file = llama_folder(tmp_path / "model"), written_rows(tmp_path, 1, images=False)
    with pytest.raises(DareConfigError):
        check(str(model), str(tmp_path / "nothing"), file)
    DareConfig(scorer="router").save_pretrained(str(tmp_path / "router"))
    with pytest.raises(DareConfigError, match="safetensors"):
        check(str(model), str(tmp_path / "router"), file)
    with pytest.raises(DareInputError, match="processor"):
        check(loading.load_model(str(model)).__class__(_config(model)), "safe", file)


def _config(folder):
    from transformers import LlamaConfig

    config = LlamaConfig.from_pretrained(folder)
    config._name_or_path = ""
    return config
