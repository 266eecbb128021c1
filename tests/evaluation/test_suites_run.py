"""A model on a benchmark: batches, a killed run, the command."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from row_models import llava_folder
from suite_files import FILES, WORDS
from typer.testing import CliRunner

from dare_hf.cli import app, on_rows
from dare_hf.errors import DareStateError
from dare_hf.suites import SUITES, evaluate, evaluate_suite
from dare_hf.tuning import Row, row_eval

CASES = [(name, str(scoring)) for name, suite in SUITES.items() for scoring in suite.scorings]
OF_TIME = {"seconds", "peak_memory_bytes"}
# Sums of float32 log-probabilities; a batch of another width is computed in another order.
NEAR = 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return llava_folder(tmp_path_factory.mktemp("model"))


def _timeless(found):
    return {name: value for name, value in found.items() if name not in OF_TIME}


def _lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def _untimed_lines(file):
    first, *lines = _lines(file)
    for line in lines:
        del line["value"]["seconds"]
    return [first, *lines]


@pytest.mark.parametrize(("name", "scoring"), CASES)
def test_a_killed_run_goes_on_to_the_same_file(name, scoring, model, tmp_path, monkeypatch):
    FILES[name](tmp_path / "data")
    more = {"scoring": scoring, "config": "safe", "max_new_tokens": 4, "batch_size": 8}
    data, whole, killed = tmp_path / "data", tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    found = evaluate_suite(str(model), name, data, out=whole, **more)
    assert found["n"] == 12
    assert 0 < found["kv_ratio"] < 1
    assert len(found["right"]) == len(found["scores"]) == 12
    assert sum(found["scores"]) / 12 == found["accuracy"]
    assert found["peak_memory_bytes"] > 2**20
    lines = _lines(whole)
    assert [line["key"] for line in lines[1:]] == [str(k) for k in range(1, 13)]
    # Cut off inside the second batch, in the middle of a line.
    text = whole.read_text().splitlines(keepends=True)
    killed.write_text("".join(text[:10]) + text[10][:20])
    asked = []
    step = evaluate._chosen if scoring == "likelihood" else evaluate._read

    def counted(suite, model, prompts, items, *rest):
        asked.append(len(items))
        return step(suite, model, prompts, items, *rest)

    monkeypatch.setattr(evaluate, step.__name__, counted)
    resumed = evaluate_suite(str(model), name, data, out=killed, **more)
    assert _timeless(resumed) == _timeless(found)
    assert _untimed_lines(killed) == _untimed_lines(whole)
    assert 0 < sum(asked) < 12, "only what was not there is asked"
    with pytest.raises(DareStateError, match="batch_size"):
        evaluate_suite(str(model), name, data, out=killed, **more | {"batch_size": 4})


@pytest.mark.parametrize(("name", "scoring"), [("vsr", "generation"), ("embspatial", "likelihood")])
def test_a_batch_answers_as_its_rows_do(name, scoring, model, tmp_path):
    FILES[name](tmp_path)
    more = {"scoring": scoring, "max_new_tokens": 4}
    outs = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    for size, out in zip((1, 12), outs, strict=True):
        evaluate_suite(str(model), name, tmp_path, batch_size=size, out=out, **more)
    said = [[line["value"] for line in _lines(out)[1:]] for out in outs]
    assert len({one["said"] for one in said[0]}) > 1, "the model tells items apart"
    for one, many in zip(*said, strict=True):
        assert one["said"] == many["said"]
        assert one["costs"] is None
        if scoring == "likelihood":
            assert one["sums"] == pytest.approx(many["sums"], abs=NEAR)
            assert one["tokens"] == many["tokens"] == [1, 1, 1, 1]


def test_batches_hold_so_many_sequences_and_one_row_at_least():
    rows = [Row(k, (), choices=("a",) * k) for k in (0, 2, 3, 9, 1, 1)]
    sizes = [[len(row.choices) for row in batch] for batch in evaluate.batches(rows, 4)]
    assert sizes == [[0, 2], [3], [9], [1, 1]]


def test_costs_of_a_batch_are_divided_among_its_items(model, tmp_path, monkeypatch):
    """So that their sums are the reports', and ratios those of all calls together."""
    FILES["vsr"](tmp_path)
    calls = []

    def report(_model):
        calls.append(len(calls) + 1)
        made = {"prefill": 12 * len(calls), "decode": 8}
        baseline = {"prefill": 24, "decode": 8}
        return SimpleNamespace(
            kv_bytes=4, kv_bytes_baseline=16, flops=made, flops_baseline=baseline
        )

    monkeypatch.setattr(row_eval, "last_report", report)
    out = tmp_path / "out.jsonl"
    found = evaluate_suite(str(model), "vsr", tmp_path, config="safe", out=out, max_new_tokens=2)
    costs = [line["value"]["costs"] for line in _lines(out)[1:]]
    assert [one["kv"]["got"] for one in costs] == [4 / 8] * 8 + [4 / 4] * 4
    assert [one["prefill"]["got"] for one in costs] == [12 / 8] * 8 + [24 / 4] * 4
    assert found["kv_ratio"] == 8 / 32
    assert found["flops_ratio"] == {"prefill": 36 / 48, "decode": 1.0, "all": 52 / 64}


def test_the_command(model, tmp_path):
    FILES["vstar"](tmp_path)
    run = ["eval", "--model", str(model), "--benchmark", "vstar", "--data", str(tmp_path), "--json"]
    run += ["--max-new-tokens", "3", "--batch-size", "5", "--config", "safe"]
    done = CliRunner().invoke(app, [*run, "--out", str(tmp_path / "out.jsonl")])
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout)
    assert (line["n"], line["benchmark"], line["metric"]) == (12, "vstar", "generation")
    assert Path(line["model"]) == model
    assert line["totals"]["categories"]["direct_attributes"]["n"] == 8
    assert line["batch_size"] == 5
    assert "direct_attributes" in done.stderr
    assert "peak memory" in done.stderr
    assert len(_lines(tmp_path / "out.jsonl")) == 1 + 12
    done = CliRunner().invoke(app, [*run, "--metric", "likelihood"])
    assert done.exit_code == 0, done.output
    assert {"sum", "mean"} < set(json.loads(done.stdout)["totals"])


def test_the_command_refuses_in_one_line_before_weights_load(tmp_path):
    file = FILES["vsr"](tmp_path)
    file.write_text(file.read_text().replace('"label": 1', '"label": 7', 1))
    run = ["eval", "--model", str(tmp_path / "nowhere"), "--data", str(tmp_path)]
    for more, word in (
        (["--benchmark", "vsr"], "test.jsonl: line 1: label"),
        (["--benchmark", "mmmu"], "expected one of vsr"),
        (["--benchmark", "vsr", "--metric", "exact"], "generation or likelihood for vsr"),
        (["--benchmark", "vsr", "--task", "maze"], "--task"),
        (["--batch-size", "3"], "--batch-size"),
    ):
        done = CliRunner().invoke(app, [*run, *more])
        assert done.exit_code == 2, more
        assert word in done.stderr
        assert done.stderr.strip().count("\n") == 0
    assert CliRunner().invoke(app, ["eval", "--benchmark", "vsr"]).exit_code == 2
    assert ", ".join(SUITES) == on_rows.BENCHMARKS


def test_words_of_the_files_are_words_of_the_model(model):
    """So that likelihoods of choices differ."""
    from dare_hf.tuning.loading import load_processor

    ids = [load_processor(str(model)).tokenizer.encode(word) for word in WORDS]
    assert len({tuple(one) for one in ids}) == len(WORDS)
