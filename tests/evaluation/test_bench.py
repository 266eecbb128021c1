"""The benchmarks: their fields, that systems take turns, and that wrong runs get no time."""

import json
import threading
import time
from dataclasses import replace

import pytest
import torch
from row_models import llava_folder
from typer.testing import CliRunner

from dare_hf import cli
from dare_hf.benchmark import batch, checked, kvpress_peer, memory, picture, race, runner, systems
from dare_hf.benchmark.random_llava import CLOCKS, Setting, build_inputs, linear_scorer
from dare_hf.errors import DareConfigError, DareStateError

SMALL = Setting(
    tokens=60, pairs=2, layers=3, hidden=64, intermediate=96, vocab=300, new_tokens=4, hops=3
)
RAGGED = replace(SMALL, batch=3, ragged=True)
TIMES = ["seconds", "seconds_ratio", "seconds_range", "seconds_ratio_range"]
FIELDS = {
    "prefill": [*TIMES, "kv_ratio"],
    "decode": [*TIMES, "kv_ratio"],
    "generate": [*TIMES, "first_token", "first_token_ratio", "kv_ratio"],
    "hops": [*TIMES, "hop", "closing_seconds"],
    "batch": [*TIMES, "tokens_per_second", "kv_ratio"],
}


@pytest.fixture(scope="module")
def subject():
    return systems.random_subject(SMALL)


@pytest.mark.parametrize("setting", [SMALL, RAGGED], ids=["alone", "ragged"])
@pytest.mark.parametrize("series", FIELDS)
def test_a_series_has_its_fields_for_each_system(series, setting, subject):
    batches = (1, 2) if series == "batch" else ()
    result = runner.bench(series, setting, batches=batches, subject=subject)
    assert json.loads(json.dumps(result)) == result
    rows, names = result["rows"], runner.SERIES[series].NAMES
    times = {"hops": SMALL.hops, "batch": 2}.get(series, 1)
    assert [row["system"] for row in rows] == [*names] * times
    for row in rows:
        assert all(row[name] is not None for name in FIELDS[series])
        assert row["checked"].startswith("oracle")
        assert row["system"] != "plain" or row["seconds_ratio"] == 1
    written = runner.text(result)
    assert all(f"| {name} |" in written for name in names)


def test_prefill_counts_what_its_formula_says(subject):
    rows = {row["system"]: row for row in runner.bench("prefill", SMALL, subject=subject)["rows"]}
    # 0.4 of 54 and 0.7 of 6, rounded up: 22 + 5 of 60 tokens in every layer.
    linear, pairs, head = 3 * (4 * 64**2 + 3 * 64 * 96), 3 * 2 * 64, 64 * 300
    flops = [2 * (n * linear + n * n * pairs + head) for n in (27, 60)]
    scorer = 3 * 60 * 2 * 64 * 2
    pruned, whole = rows["dare_0.4_0.7"], rows["dare_1.0"]
    assert pruned["gflops_unpruned"] == flops[1] / 1e9
    assert flops[0] <= pruned["gflops"] * 1e9 <= flops[0] + scorer
    assert whole["flops_ratio"] == pytest.approx(1, abs=scorer / flops[1])
    assert "flops_ratio" not in rows["plain"]


def test_ragged_rows_end_at_other_lengths():
    assert RAGGED.lengths == [60, 45, 30]
    mask = build_inputs(RAGGED)["attention_mask"]
    assert mask.sum(1).tolist() == [60, 45, 30]
    assert mask[:, -1].all()


def test_systems_take_turns_and_who_begins_moves_on(subject, monkeypatch):
    order, inner = [], race._Lane.turn

    def turn(lane):
        order.append(lane)
        inner(lane)

    monkeypatch.setattr(race._Lane, "turn", turn)
    with systems.on_systems(subject, (systems.PLAIN, systems.STATIC, systems.PRUNED)) as raced:
        inputs = subject.inputs(SMALL)
        outcomes = race.race(raced, inputs, 4, **subject.options)
    lanes = order[:3]
    numbers = [lanes.index(lane) for lane in order]
    assert numbers == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2, 1, 2, 0]
    assert [len(one.seconds) for one in outcomes] == [4, 4, 4]


def test_a_race_writes_what_each_would_write_alone(subject):
    inputs = subject.inputs(RAGGED)
    with systems.on_systems(subject, runner.SERIES["decode"].NAMES) as raced:
        together = race.race(raced, inputs, 6, **subject.options)
        alone = [race.run_once(one, inputs, 6, **subject.options) for one in raced]
    assert len(together) == 4
    for ours, own in zip(together, alone, strict=True):
        assert ours.ids.tolist() == own.ids.tolist()


def test_the_clock_of_the_thread_does_not_run_while_it_waits(monkeypatch):
    setting = replace(SMALL, clock="cpu")
    subject = systems.random_subject(setting)
    inner = subject.model.forward

    def slow(*args, **kwargs):
        time.sleep(0.5)
        return inner(*args, **kwargs)

    monkeypatch.setattr(subject.model, "forward", slow)
    for clock, waits in ((setting, False), (SMALL, True)):
        told = replace(subject, clock=CLOCKS[clock.clock])
        with systems.on_systems(told, (systems.PLAIN,)) as raced:
            (outcome,) = race.race(raced, told.inputs(setting), 3, **told.options)
        assert (min(outcome.seconds) >= 0.5) == waits


def test_an_error_in_a_lane_ends_the_race(subject):
    before = threading.active_count()

    def force(step, scores):
        if step == 2:
            raise ZeroDivisionError
        return scores

    with systems.on_systems(subject, (systems.PLAIN, systems.STATIC)) as raced:
        inputs = subject.inputs(SMALL)
        with pytest.raises(ZeroDivisionError):
            race.race(raced, inputs, 5, force=force, **subject.options)
    assert threading.active_count() == before


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def typed(request):
    name = str(request.param).removeprefix("torch.")
    return systems.random_subject(replace(SMALL, dtype=name)), replace(SMALL, dtype=name)


def outcome_of(subject, setting, system):
    inputs = subject.inputs(setting)
    return inputs, race.run_once(system, inputs, 5, **subject.options)


def test_other_tokens_than_the_scores_ask_for_are_refused(typed):
    subject, setting = typed
    told = replace(subject, score=linear_scorer(replace(setting, seed=7)))
    with systems.on_systems(subject, (systems.PRUNED,)) as (system,):
        inputs, outcome = outcome_of(subject, setting, system)
        assert checked.verify(subject, system, inputs, outcome) == "oracle"
        with pytest.raises(DareStateError, match="no token left out whose score"):
            checked.verify(told, system, inputs, outcome)


def test_fewer_tokens_than_asked_for_are_refused(typed):
    subject, setting = typed
    with systems.on_systems(subject, (systems.PRUNED,)) as (system,):
        inputs, outcome = outcome_of(subject, setting, system)
        more = replace(system, rates=(0.5, 0.7))
        with pytest.raises(DareStateError, match=r"to keep 27 vision tokens.*got 22"):
            checked.verify(subject, more, inputs, outcome)


@pytest.mark.parametrize("name", [systems.PLAIN, systems.WHOLE, systems.PRUNED])
def test_logits_of_another_computation_are_refused(typed, name):
    subject, setting = typed
    with systems.on_systems(subject, (name,)) as (system,):
        model = systems.twin(system.model) if name == systems.PLAIN else system.model
        system = replace(system, model=model)
        attention = model.model.language_model.layers[1].self_attn
        hook = attention.register_forward_hook(lambda module, args, out: (2 * out[0], *out[1:]))
        inputs, outcome = outcome_of(subject, setting, system)
        hook.remove()
        with pytest.raises(DareStateError, match="logits of token 0"):
            checked.verify(subject, system, inputs, outcome)


def test_a_token_that_is_not_the_oracles_is_refused(typed):
    subject, setting = typed
    with systems.on_systems(subject, (systems.PRUNED,)) as (system,):
        inputs, outcome = outcome_of(subject, setting, system)
        outcome.ids[0, -1] = outcome.logits[-1][0].argmin()
        outcome.logits.clear()
        with pytest.raises(DareStateError, match="token 4"):
            checked.verify(subject, system, inputs, outcome)


@pytest.mark.parametrize("series", ["prefill", "decode", "generate", "hops", "batch"])
def test_no_series_tells_the_time_of_a_wrong_run(series, subject):
    """A layer that is broken while DARE runs, and whole for the oracle."""
    inner = systems.apply_dare

    def broken(model, config):
        inner(model, config)
        attention = model.model.language_model.layers[0].self_attn
        attention.register_forward_hook(lambda module, args, out: (2 * out[0], *out[1:]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(systems, "apply_dare", broken)
        with pytest.raises(DareStateError, match="No time is told"):
            runner.bench(series, SMALL, subject=subject)


def test_long_runs_are_checked_at_fewer_tokens(subject):
    long = replace(SMALL, batch=3, check_tokens=100)
    rows = runner.bench("decode", long, subject=subject)["rows"]
    assert {row["checked"] for row in rows} == {"oracle at 25 tokens"}


def test_memory_asks_the_allocator(subject, monkeypatch):
    monkeypatch.setattr(memory, "_rss", lambda *args: None)
    rows = {row["system"]: row for row in runner.bench("memory", SMALL, subject=subject)["rows"]}
    assert rows["plain"]["peak_ratio"] == 1
    assert rows["dare_0.4_0.7"]["peak_bytes"] < rows["dare_1.0"]["peak_bytes"]
    assert "rss_bytes" not in rows["plain"]


@pytest.mark.skipif(not memory._CLEAR.exists(), reason="only Linux tells a high-water mark")
def test_a_process_grows_by_what_it_holds():
    wide = replace(SMALL, tokens=4000, batch=2)
    names = (systems.WHOLE, systems.PRUNED)
    whole, pruned = (memory.rss_growth(wide, name) for name in names)
    held = 2 * 4000 * 3 * 64 * 2 * 4  # keys and values, without which there is no step
    assert whole > held
    assert pruned < whole


@pytest.mark.parametrize(("limit", "most"), [(0, 9), (1, 9), (5, 9), (8, 64), (37, 64), (99, 64)])
def test_the_largest_batch_is_found(limit, most):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= limit

    assert batch.largest_batch(fits, most) == min(limit, most)
    assert len(tried) == len(set(tried)), "none is tried twice"


def test_a_peer_that_is_not_installed_is_refused_with_its_install_line(subject, monkeypatch):
    monkeypatch.setattr(kvpress_peer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DareConfigError, match="make bench-peers"):
        runner.bench("decode", SMALL, peer="kvpress", subject=subject)
    with pytest.raises(DareConfigError, match="expected 'kvpress'"):
        runner.bench("decode", SMALL, peer="another", subject=subject)


def test_a_picture_has_a_line_for_each_system(subject, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.axes.Axes.plot", lambda self, *a, **k: drawn.append(k["label"]))
    monkeypatch.setattr("matplotlib.axes.Axes.legend", lambda self, **k: None)
    result = runner.bench("prefill", SMALL, lengths=(40, 60), subject=subject)
    assert runner.axis(result["rows"]) == "tokens"
    picture.draw(result, tmp_path / "prefill.png")
    assert drawn == list(runner.SERIES["prefill"].NAMES)
    assert (tmp_path / "prefill.png").stat().st_size > 1000


def test_a_checkpoint_is_timed_with_its_tower(tmp_path):
    from PIL import Image

    from dare_hf.testing import tiny_model

    folder = llava_folder(tmp_path / "model")
    Image.new("RGB", (12, 12)).save(tmp_path / "one.png")
    seen, inner = [], type(tiny_model("llava").model.vision_tower).forward
    tower = type(tiny_model("llava").model.vision_tower)

    def forward(self, *args, **kwargs):
        seen.append(args)
        return inner(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tower, "forward", forward)
        given = ["--model", str(folder), "--image", str(tmp_path / "one.png")]
        few = ["--series", "generate", "--pairs", "1", "--new-tokens", "3"]
        done = CliRunner().invoke(cli.app, ["bench", *few, *given, "--json"])
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    checks = {row["system"]: row["checked"] for row in result["rows"]}
    assert checks["plain"] == "oracle"
    assert checks["dare_0.4_0.7"] == "oracle of what is kept"
    assert result["hidden"] == 32
    assert len(seen) >= 2 * len(checks), "in every run, the first one included"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--model", "volcano"], "--image"),
        (["--image", "one.png"], "--model"),
        (["--model", "volcano", "--image", "one.png", "--tokens", "100"], "--tokens"),
        (["--model", "volcano", "--image", "one.png", "--series", "hops"], "--series hops"),
        (["--width", "100"], "multiple of 64"),
        (["--peer", "another"], "kvpress"),
        (["--clock", "sun"], "'sun'"),
        (["--clock", "cpu", "--threads", "2"], "several threads"),
    ],
)
def test_bench_refuses_in_one_line(options, word):
    done = CliRunner().invoke(cli.app, ["bench", *options])
    assert done.exit_code == cli.REFUSED
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
