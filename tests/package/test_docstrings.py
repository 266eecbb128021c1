"""The examples in docstrings run, and the public names used most have one."""

import doctest
import importlib
import io
from contextlib import redirect_stdout

import pytest
import torch

WITH_EXAMPLE = (
    "dare_hf.apply_dare",
    "dare_hf.remove_dare",
    "dare_hf.dare_applied",
    "dare_hf.dare_disabled",
    "dare_hf.last_report",
    "dare_hf.compress_context",
    "dare_hf.expected_kv_bytes",
    "dare_hf.DareConfig",
    "dare_hf.DareConfig.preset",
    "dare_hf.HopTokens",
    "dare_hf.expected.match_budget",
    "dare_hf.generation.HopLoop",
    "dare_hf.generation.HopInput",
    "dare_hf.generation.crop_pixels",
    "dare_hf.training.auxiliary_loss",
    "dare_hf.training.cosine_temperature",
    "dare_hf.visualize.plot_rates",
    "dare_hf.assets.model_path",
    "dare_hf.testing.tiny_model",
    "dare_hf.testing.tiny_inputs",
    "dare_hf.testing.collate",
    "dare_hf.tasks.maze.sample",
    "dare_hf.tasks.scene.sample",
)


def _named(path: str):
    parts = path.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise ModuleNotFoundError(path)


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_an_example_runs(name):
    text = _named(name).__doc__
    example = doctest.DocTestParser().get_doctest(text, {"torch": torch}, name, None, 0)
    assert example.examples, f"{name}: expected >>> lines in its docstring"
    said = io.StringIO()
    with redirect_stdout(said):
        failed, _ = doctest.DocTestRunner().run(example)
    assert not failed, said.getvalue()
