"""Measuring: arms leave the model plain, totals are the reports', the command says what it ran."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from typer.testing import CliRunner

from dare_hf import DareConfig, assets, cli
from dare_hf.demo.arms import choose_arm
from dare_hf.demo.embedded import load_runner
from dare_hf.errors import (
    AdapterMismatchError,
    DareConfigError,
    DareInputError,
    DareStateError,
)
from dare_hf.evaluation import Arm, measure, trained_arm
from dare_hf.evaluation.costs import ReportTotals, by_hop
from dare_hf.evaluation.measurement import default_batch_size
from dare_hf.evaluation.suite import TASKS, no_end, task_of
from dare_hf.recipes import load_recipe
from dare_hf.report import DareReport
from dare_hf.tasks import teaching, vocot
from dare_hf.testing import tiny_model
from dare_hf.training import add_adapter

SCENE = TASKS["scene"]
EVAL_KEYS = {"model", "task", "split", "seed", "arm", "parts", "n", "accuracy", "accuracy_interval"}
EVAL_KEYS |= {"unparsed", "detail", "flops_ratio", "kv_ratio", "retention", "seconds", "right"}
EVAL_KEYS |= {"phase_seconds", "peak_bytes", "kinds", "control"}
EVAL_KEYS |= {"device", "dtype", "threads", "torch", "transformers", "dare_hf"}


def _run(*arguments: str) -> object:
    return CliRunner().invoke(cli.app, arguments)


@pytest.fixture(scope="module")
def runner():
    return load_runner("volcano")


@pytest.fixture(scope="module")
def ends(runner):
    return SCENE.ends(runner.processor)


def _tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _assert_plain(model, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    assert not {"_dare", "peft_config"} & set(vars(model))


# -- arms


def test_an_arm_is_put_on_a_copy(runner, ends, trained_volcano) -> None:
    before = _tensors(runner.model)
    arm = trained_arm("two steps", trained_volcano, ends=ends)
    armed = arm.on(runner.model)
    _assert_plain(runner.model, before)
    names = [name for name in armed.state_dict() if "lora" in name]
    assert not names, "a merged LoRA leaves no modules"
    kernel = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(armed.state_dict()[kernel], before[kernel])
    assert armed._dare.controller.config.scorer == "router"
    assert "LoRA" in arm.parts
    assert "routers" in arm.parts


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_merged_pair_writes_what_the_pair_of_adapters_writes(
    runner, ends, trained_volcano
) -> None:
    items = runner.sample(2, "easy", seed=5)
    merged = trained_arm("pair", trained_volcano, ends=ends).on(runner.model)
    pair = load_runner("volcano").model
    pair.load_adapter(str(trained_volcano / "lora"), "lora")
    pair.load_adapter(str(trained_volcano / "dare"), "dare")
    pair.set_adapter(["lora", "dare"])
    models = (merged, pair.eval(), runner.model)
    found, wanted, plain = (
        [s.ids for s in vocot.solve(model, runner.processor, items, max_new_tokens=12)]
        for model in models
    )
    assert found == wanted
    assert plain != wanted, "the LoRA says something else"


def test_a_folder_of_routers_comes_without_the_lora_beside_it(trained_volcano) -> None:
    assert trained_arm("pair", trained_volcano).lora == trained_volcano / "lora"
    assert trained_arm("alone", trained_volcano / "dare").lora is None
    other = trained_volcano / "lora"
    assert trained_arm("given", trained_volcano / "dare", lora=other).lora == other


def test_hops_end_where_the_adapter_learned_it_if_the_task_can_use_that(
    trained_volcano, ends
) -> None:
    own = trained_arm("x", trained_volcano).config.hop_delimiters
    assert own == ends
    assert trained_arm("x", trained_volcano, ends=(3, *own)).config.hop_delimiters == own
    added = trained_arm("x", trained_volcano, ends=(3, 4)).config.hop_delimiters
    assert added == (*own, 3)


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.ends is not no_end])
def test_the_first_end_of_a_task_is_one_its_responses_hold(name: str) -> None:
    task = TASKS[name]
    runner = load_runner(task.model.removeprefix("dare-tiny-"))
    item = task.sample(1, "easy", 0)[0]
    batch = teaching.batch(runner.model, runner.processor, [item])
    learned = batch["labels"][0][batch["labels"][0] != -100].tolist()
    for end in task.ends(runner.processor):
        assert end in learned


def test_what_is_no_adapter_is_refused(tmp_path, trained_volcano) -> None:
    with pytest.raises(DareInputError, match=r"dare/adapter_config\.json"):
        trained_arm("none", tmp_path)
    with pytest.raises(DareInputError, match="DARE_ROUTER"):
        trained_arm("x", trained_volcano, lora=trained_volcano / "dare")
    with pytest.raises(DareInputError, match="no such folder"):
        trained_arm("x", trained_volcano, lora=tmp_path / "nowhere")
    with pytest.raises(DareInputError, match="lora"):
        trained_arm("x", trained_volcano, lora=tmp_path)


def test_an_adapter_of_another_model_is_refused(runner, tmp_path, trained_volcano) -> None:
    before = _tensors(runner.model)
    other = tiny_model("llava")
    with pytest.raises(AdapterMismatchError):
        trained_arm("x", trained_volcano / "dare").on(other)
    deeper = tiny_model("llava", num_hidden_layers=12)
    for name, model in (("wide", other), ("deep", deeper)):
        add_adapter(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tiny model has no name on the hub
            model.save_pretrained(tmp_path / name)
        with pytest.raises(AdapterMismatchError, match="lora: expected a LoRA made for"):
            Arm("x", lora=tmp_path / name).on(runner.model)
    _assert_plain(runner.model, before)


def test_an_arm_wants_a_plain_model(runner, ends) -> None:
    armed = Arm("x", DareConfig.preset("safe", hop_delimiters=ends)).on(runner.model)
    with pytest.raises(DareStateError, match="without DARE"):
        Arm("y").on(armed)


# -- shipped adapters


def test_shipped_adapters_are_found_by_name(shipped) -> None:
    assert assets.adapter_names("dare-tiny-volcano") == ["dare-l", "dare-lh"]
    folder = assets.adapter_path("dare-tiny-volcano", "dare-lh")
    assert (folder / "dare" / "adapter_config.json").is_file()
    with pytest.raises(DareInputError, match=r"\(dare-l, dare-lh\), got 'dare-x'"):
        assets.adapter_path("dare-tiny-volcano", "dare-x")
    with pytest.raises(DareInputError, match="there is none"):
        assets.adapter_path("dare-tiny-anole", "dare-lh")
    with pytest.raises(DareInputError, match="dare-tiny-anole"):
        assets.adapter_path("dare-huge", "dare-lh")


def _assert_says_how_it_was_made(folder: Path) -> None:
    for file in ("recipe.yaml", "training_log.jsonl", "dare/adapter_model.safetensors"):
        assert (folder / file).is_file(), f"{file} is missing beside the weights"
    for file in folder.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".yaml", ".md"):
            text = file.read_text(encoding="utf-8")
            rooted = [word for word in text.split() if word.strip("\"'`,:").startswith("/")]
            assert not rooted, f"{file.name} names a path of the machine it was made on"
    assert load_recipe(folder / "recipe.yaml").task


@pytest.mark.parametrize("name", ["dare-l", "dare-lh"])
@pytest.mark.parametrize("model", ["dare-tiny-anole", "dare-tiny-volcano"])
def test_what_is_shipped_says_how_it_was_made_and_fits(model: str, name: str) -> None:
    folder = assets.adapter_path(model, name)
    _assert_says_how_it_was_made(folder)
    arm = trained_arm(name, folder)
    armed = arm.on(load_runner(model.removeprefix("dare-tiny-")).model)
    assert armed._dare.controller.config.hop_aware == (name == "dare-lh")


def test_the_script_ships_an_adapter_without_paths(shipped, monkeypatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    from ship_adapter import ship

    folder = ship(shipped, "volcano", "dare-new")
    assert folder == assets.adapter_path("dare-tiny-volcano", "dare-new")
    _assert_says_how_it_was_made(folder)
    arm, trained = trained_arm("new", folder), trained_arm("source", shipped)
    assert arm.config.hop_delimiters == trained.config.hop_delimiters
    routers, lora = (f"{part}/adapter_model.safetensors" for part in ("dare", "lora"))
    for part in (routers, lora):
        made, source = load_file(folder / part), load_file(shipped / part)
        assert set(made) == set(source)
        for name, tensor in source.items():  # weights are halves; rates and the like stay exact
            wanted = tensor.half() if name.endswith(".weight") else tensor
            assert made[name].dtype == wanted.dtype
            assert torch.equal(made[name], wanted), name
    assert any(not name.endswith(".weight") for name in load_file(folder / routers))


# -- which arm is asked for


def test_options_choose_the_arm(shipped, runner, ends) -> None:
    def choose(**options) -> Arm:
        return choose_arm("volcano", runner.processor, ends, **options)

    assert choose() == Arm("full")
    assert choose().parts == "the plain model"
    assert choose(safe=True).config == DareConfig.preset("safe", hop_delimiters=ends)
    assert choose(training_free=True).config.scorer == "attention"
    arm = choose(adapter="dare-l")
    assert arm.name == "dare-l"
    assert arm.lora == arm.routers.parent / "lora"
    assert choose(adapter=str(shipped)).routers == shipped / "dare"
    assert choose(lora=shipped / "lora").name == "full with LoRA"
    assert choose(safe=True, lora=shipped / "lora").lora == shipped / "lora"
    with pytest.raises(DareConfigError, match="got --training-free and --safe"):
        choose(safe=True, training_free=True)
    with pytest.raises(DareInputError, match=r"\(dare-l, dare-lh\) or a folder"):
        choose(adapter="dare-x")


def test_a_task_belongs_to_the_model_that_learned_it() -> None:
    assert task_of(None, "dare-tiny-anole").name == "maze"
    assert task_of(None, "dare-tiny-volcano") is SCENE
    assert task_of("ghost", "dare-tiny-anole").detail is None
    with pytest.raises(DareInputError, match=r"\(maze, frozen_lake, ghost\), got 'scene'"):
        task_of("scene", "dare-tiny-anole")


# -- what is measured


def _report(vision: float, text: float | None, flops: int) -> DareReport:
    return DareReport(
        flops={"prefill": flops, "decode": 10},
        flops_baseline={"prefill": 100, "decode": 20},
        kv_bytes=flops,
        kv_bytes_baseline=200,
        retention=[[{"vision": vision, "text": text}, {"vision": 1.0, "text": 1.0}]],
    )


def test_totals_are_sums_and_means_weighted_by_items() -> None:
    totals = ReportTotals(SimpleNamespace())
    totals.add(_report(0.5, None, 40), rows=3)
    totals.add(_report(0.1, 0.6, 60), rows=1)
    two_hops = _report(0.2, 0.6, 50)
    two_hops.retention *= 2
    totals.add(two_hops, rows=4)
    assert totals.flops_ratios() == pytest.approx({"prefill": 0.5, "decode": 0.5, "all": 180 / 360})
    assert totals.kv_ratio == pytest.approx(150 / 600)
    assert totals.retention[0][0]["vision"] == pytest.approx((1.5 + 0.1 + 0.8) / 8)
    assert totals.retention[0][0]["text"] == pytest.approx(0.6)
    assert totals.retention[1][0]["vision"] == pytest.approx(0.2)
    assert by_hop(totals.retention)["vision"] == pytest.approx([(0.3 + 1) / 2, 0.6])
    assert by_hop([[{"vision": None, "text": 0.0}]]) == {"vision": [None], "text": [0.0]}


def test_an_arm_that_keeps_everything_answers_as_the_plain_model(runner) -> None:
    items = runner.sample(3, "easy", seed=2)  # right answers: short ones
    keep = Arm("keep", vocot.unpruned_config(runner.processor))
    kept = measure(runner.model, runner.processor, SCENE, keep, items, batch_size=2)
    full = measure(runner.model, runner.processor, SCENE, Arm("full"), items)
    solved = vocot.solve(runner.model, runner.processor, items)
    assert kept.right == full.right == tuple(s.correct for s in solved)
    assert kept.flops_ratio == {"prefill": 1.0, "decode": 1.0, "all": 1.0}
    assert kept.kv_ratio == 1.0
    assert {x for shares in by_hop(kept.retention).values() for x in shares} <= {1.0, None}
    assert full.flops_ratio is full.kv_ratio is full.retention is None
    assert full.detail == vocot.score(solved).boxes_right


def test_an_adapter_prunes_and_leaves_the_model_plain(runner, ends, trained_volcano) -> None:
    before = _tensors(runner.model)
    arm = trained_arm("two steps", trained_volcano, ends=ends)
    items = runner.sample(1, "easy", seed=2)
    found = measure(runner.model, runner.processor, SCENE, arm, items)
    _assert_plain(runner.model, before)
    assert 0 < found.kv_ratio < 1
    assert 0 < found.flops_ratio["all"] < 1
    shares = by_hop(found.retention)
    assert 0 < shares["vision"][0] < 1
    assert len(found.right) == found.n == 1


@pytest.mark.parametrize(("n", "rows"), [(0, 1), (3, 3), (60, 60), (1000, 100)])
def test_the_default_batch_is_all_items_up_to_a_bound(n: int, rows: int) -> None:
    assert default_batch_size(n) == rows


# -- the command


@pytest.mark.usefixtures("shipped")
def test_eval_prints_one_json_line_alone_on_stdout() -> None:
    done = _run("eval", "--model", "volcano", "--n", "1", "--adapter", "dare-lh", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert set(result) == EVAL_KEYS
    assert (result["n"], result["task"], result["arm"]) == (1, "scene", "dare-lh")
    assert set(result["flops_ratio"]) == {"prefill", "decode", "all"}
    assert result["right"] in ("0", "1")
    assert "accuracy" in done.stderr


def test_eval_of_the_plain_model_says_that_nothing_is_pruned() -> None:
    done = _run("eval", "--model", "volcano", "--n", "2", "--split", "hard")
    assert done.exit_code == 0, done.stderr
    assert "nothing is pruned" in done.stdout
    assert "boxes right" in done.stdout
    assert "hard split" in done.stdout


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("--task", "scene"), "maze, frozen_lake, ghost"),
        (("--adapter", "dare-none"), "dare-none"),
        (("--safe", "--training-free"), "--safe"),
        (("--lora", "nowhere"), "nowhere"),
        (("--n", "0"), "--n"),
    ],
)
def test_eval_refuses_what_it_cannot_run(options: tuple[str, ...], word: str) -> None:
    done = _run("eval", *options)
    assert done.exit_code == cli.REFUSED
    assert word in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("task", ["maze", "frozen_lake", "ghost"])
def test_each_task_of_anole_runs_pruned(task: str) -> None:
    options = ("--task", task, "--n", "1", "--training-free", "--json")
    done = _run("eval", *options)
    assert done.exit_code == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["kv_ratio"] < 1
    assert (result["detail"] is None) == (task == "ghost")
    assert len(result["retention"]["vision"]) > 1, "the task ends hops"


def test_folder_of_the_fixture_is_what_train_writes(trained_volcano: Path) -> None:
    names = {path.name for path in trained_volcano.iterdir()}
    assert {"dare", "lora", "training_log.jsonl"} <= names
