"""tune: what it chooses, what it writes, what it promises, and that a killed run goes on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from row_models import llama_folder, llava_folder, written_rows
from typer.testing import CliRunner

from dare_hf import DareConfig, apply_dare
from dare_hf.cli import app
from dare_hf.errors import DareConfigError, DareInputError, DareStateError
from dare_hf.tuning import bench, check, fidelity, machine, read_rows, tune
from dare_hf.tuning.loading import load_model
from dare_hf.tuning.search import read_target
from dare_hf.tuning.tuner import _split

CHOSEN = [
    "vision_retention",
    "text_retention",
    "flops_ratio",
    "kv_ratio",
    "agreement",
    "kl",
    "drop",
    "interval",
]
ONE_FAMILY = {"schedule": "constant", "scorer": "attention"}


@pytest.fixture(scope="module", autouse=True)
def short():
    """Short answers and one timed pair: what is tested does not depend on them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "OWN_ANSWER", 6)
        patch.setattr(machine, "PAIRS", 1)
        yield


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """A LLaVA, rows, and what the command made of them where everything is within the bound."""
    folder = tmp_path_factory.mktemp("tune")
    model, file = llava_folder(folder / "model"), written_rows(folder, 8)
    run = ["tune", str(model), "--data", str(file), "--out", str(folder / "out")]
    found = CliRunner().invoke(app, [*run, "--max-drop", "100", "--json"])
    assert found.exit_code == 0, found.output
    return model, file, folder / "out", json.loads(found.stdout)


def test_the_cheapest_within_the_bound_is_chosen(seen):
    _, _, out, line = seen
    assert list(line) == ["chosen", "rows", "reason"]
    assert list(line["chosen"]) == CHOSEN
    assert line["rows"] == 8
    table = json.loads((out / "tune.json").read_text())["table"]
    # everything is within 100 points: nothing on the fit share was cheaper than the choice there
    fit = [row for row in table if row["share"] == "fit"]
    key = lambda row: (row["flops_ratio"] + row["kv_ratio"]) / 2  # noqa: E731
    cheapest = min(fit, key=key)
    for name in ("vision_retention", "text_retention"):
        assert line["chosen"][name] == cheapest[name]
    low, high = line["chosen"]["interval"]
    assert low <= line["chosen"]["drop"] <= high
    assert {row["family"].split(",")[0] for row in fit} >= {"attention", "router"}


@torch.no_grad()
def test_the_folder_is_what_apply_dare_takes(seen):
    model, file, out, line = seen
    held_out = _split(read_rows(file), 0)[1]
    found = check(str(model), str(out), held_out)
    assert found.agreement == pytest.approx(line["chosen"]["agreement"])
    assert found.kl == pytest.approx(line["chosen"]["kl"], rel=1e-4)
    assert apply_dare(load_model(str(model)), str(out))._dare is not None


def test_the_page_is_one_file_and_says_what_the_card_says(seen):
    _, _, out, line = seen
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    assert "http" not in page
    assert "<script" not in page
    for word in ("Does it pay", "prefill_seconds", "held-out"):
        assert word in page
    assert f"{line['chosen']['drop']:.1f} points" in card


def test_random_weights_promise_nothing_beyond_the_rows(seen):
    model, file, out, line = seen
    assert "nothing can be promised beyond these rows" in line["reason"]
    assert "nothing beyond these rows" in (out / "README.md").read_text()
    trained = load_model(str(model))
    for name, parameter in trained.named_parameters():
        if "layernorm" in name:
            parameter.data += torch.rand(parameter.shape)
    found = tune(trained, file, max_drop=100, fields=ONE_FAMILY)
    assert "promised" not in found.reason
    assert found.promise["beyond"]
    assert "_dare" not in vars(trained)


def test_where_nothing_pays_there_is_no_configuration(seen, tmp_path):
    model, file, earlier, _ = seen
    out = Path(shutil.copytree(earlier, tmp_path / "out"))
    found = tune(str(model), file, target="flops=0.01", fields=ONE_FAMILY)
    assert found.config is found.promise is found.chosen is None
    assert "Nothing pays" in found.reason
    assert "flops <= 0.01" in found.reason
    apply_dare(load_model(str(model)), str(out))
    found.save(out)  # an earlier choice does not stay
    with pytest.raises(DareConfigError):
        apply_dare(load_model(str(model)), str(out))


def test_a_target_is_kept_to(seen):
    model, file, _, line = seen
    share = (1 + line["chosen"]["kv_ratio"]) / 2
    free = tune(str(model), file, fields=ONE_FAMILY, max_drop=60)
    found = tune(str(model), file, target=f"kv={share}", max_drop=100, fields=ONE_FAMILY)
    assert found.chosen["kv_ratio"] <= share
    assert max(row["kv_ratio"] for row in free.table) > share, "every budget keeps to it: no test"
    with pytest.raises(DareInputError, match="kv=SHARE"):
        read_target("kv")
    with pytest.raises(DareInputError, match="kv=SHARE"):
        read_target("flops=2")


def test_a_killed_run_goes_on_to_the_same_result(seen, tmp_path, monkeypatch):
    model, file, _, _ = seen
    more = {"max_drop": 100.0, "fields": ONE_FAMILY}
    whole = tune(str(model), file, out=tmp_path / "whole", **more)
    measured = bench.fidelity

    def dies(*given):
        dies.calls += 1
        if dies.calls == 3:
            raise KeyboardInterrupt
        return measured(*given)

    dies.calls = 0
    monkeypatch.setattr(bench, "fidelity", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(str(model), file, out=tmp_path / "out", **more)
    resumed = tune(str(model), file, out=tmp_path / "out", **more)
    assert resumed.table == whole.table
    assert resumed.to_dict()["chosen"] == whole.to_dict()["chosen"]
    keys = (tmp_path / "whole" / "tune.jsonl").read_text().splitlines()
    assert dies.calls == 1 + sum('"hits"' in line for line in keys)
    with pytest.raises(DareStateError, match="seed"):
        tune(str(model), file, out=tmp_path / "out", seed=1, **more)


def test_answers_are_scored_on_a_text_model(tmp_path):
    choices = ["a red cat", "blue"]
    file = written_rows(tmp_path, 8, images=False, answer="blue", choices=choices)
    model = llama_folder(tmp_path / "model")
    fields = {**ONE_FAMILY, "max_kv_tokens": 6}
    found = tune(str(model), file, max_drop=100, fields=fields, processor=None)
    assert found.config.max_kv_tokens == 6
    assert found.about["metric"] == "likelihood"
    by = "score" if "no answer right" not in found.reason else "agreement"
    assert found.promise["by"] == by


def test_what_cannot_be_used_is_refused(seen, tmp_path):
    model, file, _, _ = seen
    few = written_rows(tmp_path, 3)
    for more, match in (
        ({"rows": few}, "at least 8"),
        ({"max_drop": -1.0}, "max_drop"),
        ({"metric": "bleu"}, "metric"),
        ({"metric": "exact"}, "line 1"),
        ({"fields": {"kappa": 3}}, "kappa"),
        ({"fields": {"scorer": "router"}}, "fits a router"),
    ):
        with pytest.raises((DareInputError, DareConfigError), match=match):
            tune(str(model), **({"rows": file} | more))
    wrong = CliRunner().invoke(
        app,
        ["tune", str(model), "--data", str(file), "--out", str(tmp_path / "o"), "--field", "a"],
    )
    assert wrong.exit_code == 2


def test_a_split_is_seeded_and_whole():
    rows = list(range(9))
    one, two = _split(rows, 3)
    assert sorted([*one, *two]) == rows
    assert (len(one), len(two)) == (4, 5)
    assert _split(rows, 3) == (one, two)
    assert _split(rows, 4) != (one, two)


def test_every_family_makes_configurations():
    from dare_hf.tuning.candidates import families

    costs = {"vision": [[0.1, 0.2, 0.3, 0.4]] * 4, "text": [[0.1, 0.2, 0.3]] * 4}
    kinds = families({}, None, costs)
    assert {kind.schedule for kind in kinds} >= {"safe", "two_stage", "constant", "by cost"}
    for kind in kinds:
        config = kind.config(0.5, 0.8)
        assert isinstance(config, DareConfig)
        if kind.costs:
            vision, text = zip(*config.schedule, strict=True)
            assert sum(vision) / 4 == pytest.approx(0.5)
            assert sum(text) / 4 == pytest.approx(0.8)
            assert kind.config(0.01, 1.0) is None


def test_mean_updates_serve_both_scorers(tmp_path):
    from dare_hf.api import last_report
    from dare_hf.calibration import fit_router
    from dare_hf.testing import tiny_inputs, tiny_model
    from dare_hf.tuning.candidates import candidate, families, takes

    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    options = {"scorer": "router", "recent_tokens": 0, "mean_update": True}
    routed = fit_router(model, [inputs], DareConfig(**options), max_new_tokens=4)
    for router in routed.get_base_model()._dare.controller.routers:
        router.mean_update.fill_(0.1)
    routed.save_pretrained(str(tmp_path))
    routed.unload()
    kinds = {kind.name: kind for kind in families({"recent_tokens": 0}, tmp_path, None)}
    for name in ("router, constant", "attention with mean updates, constant"):
        with candidate(model, kinds[name].config(0.5, 0.7), tmp_path) as on:
            first = on.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert last_report(on).kv_bytes < last_report(on).kv_bytes_baseline
            layer = on._dare.controller.anatomy.layers[1]
            assert float(layer.dare_router.active_router.mean_update[0, 0]) == pytest.approx(0.1)
        assert first.shape[1] == inputs["input_ids"].shape[1] + 3
    assert "attention, constant" in kinds
    frozen = kinds["attention with mean updates, constant"].frozen().config(0.5, 0.7)
    assert takes(model, frozen, tmp_path)
    flex = tiny_model("llava", attn_implementation="flex_attention")
    assert not takes(flex, frozen, tmp_path), "freeze wants sdpa or eager"
