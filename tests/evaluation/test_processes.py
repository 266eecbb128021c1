"""Rows shared by processes: each row once, one file, the result of one process."""

import json
import time

import pytest
from in_threads import in_threads
from row_models import llama_folder, llava_folder, written_rows
from suite_files import FILES
from typer.testing import CliRunner

from dare_hf.cli import app
from dare_hf.errors import DareInputError, DareStateError
from dare_hf.evaluation.processes import ALONE, OtherProcessError, Processes, together
from dare_hf.suites import evaluate_suite
from dare_hf.tuning import check, evaluate_rows, fidelity, machine, row_eval, tune

OF_TIME = {"seconds", "peak_memory_bytes"}
MORE = {"config": "safe", "max_new_tokens": 4}


def timeless(found):
    return {name: value for name, value in found.items() if name not in OF_TIME}


def timeless_bytes(file):
    """The file as it would be had every row taken no time."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[1:]:
        line["value"]["seconds"] = 0
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A model, seven rows, and the file one process makes of them."""
    folder = tmp_path_factory.mktemp("seen")
    model = str(llava_folder(folder / "model"))
    rows = written_rows(folder, 7, answer="a cat")
    found = evaluate_rows(model, rows, "exact", out=folder / "one.jsonl", **MORE)
    return model, rows, found, timeless_bytes(folder / "one.jsonl")


@pytest.mark.parametrize(("count", "items"), [(1, 5), (2, 5), (3, 2), (3, 0), (4, 9)])
def test_each_item_is_worked_on_once_and_all_know_every_value(count, items):
    worked = []

    def run(processes):
        told = {}

        def work(item):
            worked.append(item)
            time.sleep(0.003 * (item % 3))
            return [item, processes.rank, 0.1 + item]

        made = processes.mapped(range(items), work, told.__setitem__)
        assert told == dict(enumerate(made))
        ranks = processes.gathered(processes.rank)
        return made, ranks, processes.from_first(lambda: processes.rank)

    for made, ranks, first in in_threads(count, run):
        assert made == [[item, item % count, 0.1 + item] for item in range(items)]
        assert ranks == list(range(count))
        assert first == 0
    assert sorted(worked) == list(range(items))


def test_the_first_process_keeps_a_value_when_it_is_there():
    """So that a run that is killed has lost no more than what was under way."""
    kept = []

    def run(processes):
        def work(item):
            if item == 6:
                deadline = time.monotonic() + 20
                while 5 not in kept and time.monotonic() < deadline:
                    time.sleep(0.002)
            elif item == 4:
                time.sleep(0.2)
            return item

        keep = (lambda place, _: kept.append(place)) if processes.first else None
        processes.mapped(range(7), work, keep)

    def slow_first(processes):
        before = time.monotonic()
        run(processes)
        return time.monotonic() - before

    assert all(seconds < 15 for seconds in in_threads(2, slow_first))
    assert sorted(kept) == list(range(7))


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_failure_ends_all_with_its_message(failing):
    def run(processes):
        def work(item):
            if item == failing:
                raise DareInputError("data: line 7: expected better")
            return item

        processes.mapped(range(30), work)

    for rank, error in enumerate(in_threads(3, run)):
        expected = DareInputError if rank == failing else OtherProcessError
        assert type(error) is expected
        assert "line 7: expected better" in str(error)
        assert rank == failing or f"process {failing} of 3" in str(error)


def test_what_all_refuse_alike_is_told_once():
    def run(processes):
        processes.gathered(None)
        raise DareInputError("data: none")

    errors = in_threads(3, run)
    assert all(str(error) == "data: none" for error in errors)
    assert sum(type(error) is DareInputError for error in errors) == 1
    assert all(getattr(error, "told", True) for error in errors)


@pytest.mark.parametrize("count", [2, 3])
def test_eval_in_processes_is_eval_in_one(seen, tmp_path, count):
    model, rows, one, file = seen
    out = tmp_path / "out.jsonl"

    def run(processes):
        mine = out if processes.first else tmp_path / "elsewhere" / "out.jsonl"
        return evaluate_rows(model, rows, "exact", out=mine, processes=processes, **MORE)

    for found in in_threads(count, run):
        assert timeless(found) == timeless(one)
    assert timeless_bytes(out) == file
    assert not (tmp_path / "elsewhere").exists(), "the first process writes"


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (3, 2)])
def test_a_killed_run_goes_on_with_another_number_of_processes(
    seen, tmp_path, monkeypatch, first, then
):
    model, rows, one, file = seen
    out, answered, calls = tmp_path / "out.jsonl", row_eval.answer, []

    def run(processes):
        return evaluate_rows(model, rows, "exact", out=out, processes=processes, **MORE)

    def dies(model, prompts, row, *rest):
        calls.append(row.line)
        if row.line == 4:
            time.sleep(0.3)
            raise KeyboardInterrupt
        return answered(model, prompts, row, *rest)

    monkeypatch.setattr(row_eval, "answer", dies)
    assert any(isinstance(error, KeyboardInterrupt) for error in in_threads(first, run))
    before = {json.loads(line)["key"] for line in out.read_text().splitlines()[1:]}
    assert before
    assert "4" not in before
    calls.clear()
    monkeypatch.setattr(row_eval, "answer", lambda *a: calls.append(a[2].line) or answered(*a))
    for found in in_threads(then, run):
        assert timeless(found) == timeless(one)
    assert timeless_bytes(out) == file
    assert sorted(calls) == sorted({1, 2, 3, 4, 5, 6, 7} - {int(key) for key in before})


def test_processes_of_different_runs_are_refused(seen, tmp_path):
    model, rows, _, _ = seen
    other = written_rows(tmp_path, 7, answer="a dog")

    def run(processes):
        data = rows if processes.first else other
        return evaluate_rows(model, data, "exact", processes=processes, **MORE)

    errors = in_threads(2, run)
    assert all(isinstance(error, DareStateError) for error in errors)
    assert any("other rows in process" in str(error) for error in errors)


def test_a_benchmark_in_processes_is_a_benchmark_in_one(seen, tmp_path):
    model = seen[0]
    FILES["vstar"](tmp_path / "data")

    def run(processes):
        out = tmp_path / f"{processes.count}.jsonl"
        more = MORE | {"batch_size": 5, "out": out, "processes": processes}
        return evaluate_suite(model, "vstar", tmp_path / "data", **more)

    one = run(ALONE)
    for found in in_threads(2, run):
        assert timeless(found) == timeless(one)
        assert found["peak_memory_bytes"] > 2**20
    assert timeless_bytes(tmp_path / "2.jsonl") == timeless_bytes(tmp_path / "1.jsonl")


def test_tune_and_check_choose_as_in_one_process(seen, tmp_path, monkeypatch):
    model = seen[0]
    monkeypatch.setattr(fidelity, "OWN_ANSWER", 6)
    monkeypatch.setattr(machine, "PAIRS", 1)
    rows = written_rows(tmp_path, 8)
    timed = []
    monkeypatch.setattr(
        "dare_hf.tuning.tuner.measure_machine",
        lambda *given: timed.append(1) or machine.measure_machine(*given),
    )
    fields = {"plan_every": 1}

    def run(processes):
        out = tmp_path / f"{processes.count}" if processes.first else None
        more = {"max_drop": 100.0, "fields": fields, "batch_size": 2, "processes": processes}
        return tune(model, rows, out=out, **more)

    one = run(ALONE)
    timed.clear()
    for found in in_threads(2, run):
        assert found.table == one.table
        assert found.chosen == one.chosen
        assert found.config.to_dict() == one.config.to_dict()
        assert (found.adapter is None) == (one.adapter is None)
        for name, tensor in (found.adapter or {}).items():
            assert tensor.equal(one.adapter[name])
    assert timed == [1], "one process takes the times"
    assert any(row["family"].startswith("router") for row in one.table)
    journals = [(tmp_path / name / "tune.jsonl").read_bytes() for name in ("1", "2")]
    assert journals[0] == journals[1]
    one = check(model, "safe", rows, batch_size=2)
    for found in in_threads(2, lambda p: check(model, "safe", rows, batch_size=2, processes=p)):
        assert found == one


@pytest.mark.parametrize("metric", ["likelihood", "exact"])
def test_scores_are_those_of_one_process(tmp_path, metric):
    model = str(llama_folder(tmp_path / "model"))
    choices = ["a red cat", "blue"]
    rows = written_rows(tmp_path, 8, images=False, answer="blue", choices=choices)
    fields = {"schedule": "constant", "scorer": "attention"}

    def run(processes):
        more = {"metric": metric, "max_new_tokens": 3, "max_drop": 100.0, "batch_size": 3}
        return tune(model, rows, fields=fields, processes=processes, **more)

    one = run(ALONE)
    for found in in_threads(2, run):
        assert found.table == one.table


def test_a_launch_without_its_meeting_place_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(DareStateError, match="torchrun"), together():
        pass
    done = CliRunner().invoke(app, ["eval", "--model", "volcano", "--n", "1"])
    assert done.exit_code == 2
    assert "expected one for items of a task; got 2" in done.stderr


def test_one_process_needs_no_launch(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together() as processes:
        assert processes is ALONE
    assert Processes().mapped([1, 2], lambda item: {item}) == [{1}, {2}]
