"""`dare-hf eval --data`: each metric, and that a killed run goes on to the same result."""

import json
from pathlib import Path

import pytest
import torch
from row_models import llama_folder, llava_folder, written_rows
from typer.testing import CliRunner

from dare_hf.cli import app
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.tuning import Metric, Row, evaluate_rows, row_eval
from dare_hf.tuning.answers import checker, metric_of, read_choice, right

TIMED = "seconds"


def _row(answer, *choices):
    return Row(1, (), answer=answer, choices=choices)


@pytest.mark.parametrize(
    ("metric", "said", "row", "expected"),
    [
        ("exact", " A  red\ncat.", _row("a red cat"), True),
        ("exact", "a red cat sits", _row("a red cat"), False),
        ("regex", "The answer is B.", _row(r"answer is B\b"), True),
        ("regex", "The answer is Bob.", _row(r"answer is B\b"), False),
        ("choice", "It is a Dog.", _row("dog", "cat", "dog"), True),
        ("choice", "cat or dog", _row("dog", "cat", "dog"), False),
        ("choice", "(b) because", _row("dog", "cat", "dog"), True),
        ("choice", "hotdogs", _row("dog", "cat", "dog"), False),
        ("choice", "The answer is B.", _row("B", "A", "B"), True),
        ("choice", "this is a B", _row("B", "A", "B"), True),
    ],
)
def test_metrics_read_texts(metric, said, row, expected):
    assert right(said, row, Metric(metric)) is expected


def test_choices_that_cannot_be_told_are_wrong():
    assert read_choice("", ["cat", "dog"]) is None
    assert read_choice("D", ["cat", "dog"]) is None


def test_rows_a_metric_cannot_score_are_refused():
    for metric, row, match in (
        ("exact", _row(None), "answer"),
        ("choice", _row("x"), "choices"),
        ("regex", _row("("), "regular expression"),
    ):
        with pytest.raises(DareInputError, match=rf"line 1.*{match}"):
            checker(Metric(metric))([row])
    assert metric_of([_row(None)]) is None
    assert metric_of([_row("a", "a", "b")]) is Metric.likelihood
    assert metric_of([_row("a")]) is Metric.exact
    with pytest.raises(DareInputError, match="line 1"):
        metric_of([_row("a"), _row(None)])


def _without_time(found):
    return {name: value for name, value in found.items() if name != TIMED}


def test_a_killed_run_goes_on_to_the_same_result(tmp_path, monkeypatch):
    model, file = llava_folder(tmp_path / "model"), written_rows(tmp_path, 6, answer="a cat")
    more = {"config": "safe", "max_new_tokens": 4}
    whole = evaluate_rows(str(model), file, "exact", out=tmp_path / "whole.jsonl", **more)
    answered = row_eval.answer

    def dies(*given):
        dies.calls += 1
        if dies.calls == 4:
            raise KeyboardInterrupt
        return answered(*given)

    dies.calls = 0
    monkeypatch.setattr(row_eval, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate_rows(str(model), file, "exact", out=tmp_path / "out.jsonl", **more)
    with (tmp_path / "out.jsonl").open("a") as opened:
        opened.write('{"key": "4", "val')  # cut off while it was written
    resumed = evaluate_rows(str(model), file, "exact", out=tmp_path / "out.jsonl", **more)
    assert _without_time(resumed) == _without_time(whole)
    assert dies.calls == 4 + 3
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 1 + 6
    assert whole["n"] == 6
    assert whole["kv_ratio"] < 1
    with pytest.raises(DareStateError, match="metric"):
        evaluate_rows(str(model), file, "regex", out=tmp_path / "out.jsonl", **more)


@torch.no_grad()
def test_likelihood_takes_the_choice_of_the_highest(tmp_path):
    from dare_hf.tuning.loading import load_model, load_processor
    from dare_hf.tuning.prompts import Prompts
    from dare_hf.tuning.rows import read_rows

    choices = ["a red cat", "blue", "dog on the picture"]
    file = written_rows(tmp_path, 3, images=False, answer="blue", choices=choices)
    folder = llama_folder(tmp_path / "model")
    found = evaluate_rows(str(folder), file, "likelihood")
    model, prompts = load_model(str(folder)), Prompts(load_processor(str(folder)))
    for row, score in zip(read_rows(file), found["scores"], strict=True):
        sums = []
        for choice in choices:
            prompt, ids = prompts.encode([row])["input_ids"], torch.tensor([prompts.ids(choice)])
            logits = model(input_ids=torch.cat([prompt, ids], 1)).logits[0].log_softmax(-1)
            places = logits[prompt.shape[1] - 1 : -1]
            sums.append(float(places.gather(-1, ids[0][:, None]).sum()))
        assert score == float(choices[sums.index(max(sums))] == "blue")
    assert found["flops_ratio"] is None
    file.write_text('{"prompt": "a cat", "answer": "blue dog"}')
    share = evaluate_rows(str(folder), file, "likelihood")
    assert 0 < share["accuracy"] < 1
    assert share["right"] is None


def test_the_command(tmp_path):
    model, file = (
        llama_folder(tmp_path / "model"),
        written_rows(tmp_path, 2, images=False, answer="w"),
    )
    run = ["eval", "--model", str(model), "--data", str(file), "--json"]
    found = CliRunner().invoke(app, [*run, "--metric", "regex", "--config", "safe"])
    assert found.exit_code == 0, found.output
    line = json.loads(found.stdout)
    assert (line["n"], line["metric"], Path(line["model"])) == (2, "regex", model)
    assert set(line["flops_ratio"]) == {"prefill", "decode", "all"}
    for more in (["--metric", "bleu"], ["--metric", "choice"], ["--task", "maze"]):
        refused = CliRunner().invoke(app, [*run, *more])
        assert refused.exit_code == 2, more
        assert "dare-hf:" in refused.stderr
    assert CliRunner().invoke(app, ["eval", "--metric", "exact"]).exit_code == 2
