"""The command line: what it prints where, and that refusals are one line with exit code 2."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import GPTNeoXConfig, LlamaConfig
from typer.testing import CliRunner

from dare_hf import DareConfig, HopTokens, cli, expected_kv_bytes
from dare_hf.testing import tiny_model

WORDS_OF_HELP = ("demo", "eval", "info", "bench")
JSON_KEYS = [
    "n",
    "accuracy_full",
    "accuracy_dare",
    "flops_ratio",
    "kv_ratio",
    "seconds_full",
    "seconds_dare",
]


def _run(*arguments: str) -> object:
    return CliRunner().invoke(cli.app, arguments)


def _comparison(n: int) -> object:
    from dare_hf.demo.comparison import Comparison, Side
    from dare_hf.evaluation.phases import Watch
    from dare_hf.tasks.mvot import Score

    score = Score(n, 0.96, (0.9, 0.99), 0.0, 0.98, 3 * n)
    return Comparison(
        Side(
            score, 10**10, 2_000_000, 500, 2.0, 0.98, Watch({"prefill": 1.5, "decode": 0.4}, 10**8)
        ),
        Side(
            score,
            4 * 10**9,
            10**6,
            500,
            1.0,
            0.98,
            Watch({"prefill": 0.3, "decode": 0.4}, 4 * 10**7),
        ),
        [[{"vision": 0.4, "text": 0.7}]],
    )


@pytest.fixture
def fake_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo without its models."""
    from dare_hf.demo import comparison, embedded, picture
    from dare_hf.visualize import plot_retention

    def compare(runner, items, arm, *, progress, **rest):
        progress("full", len(items), len(items))
        return _comparison(len(items))

    figure = plot_retention([Image.new("RGB", (56, 56))], [np.ones((3, 1, 7, 7), dtype=bool)])
    tokenizer = SimpleNamespace(convert_tokens_to_ids=lambda token: 8, sep_token_id=9)
    processor = SimpleNamespace(image_end_token_id=7, tokenizer=tokenizer)
    monkeypatch.setattr(embedded, "load_embedded", lambda name: (None, processor))
    monkeypatch.setattr(comparison, "compare", compare)
    monkeypatch.setattr(picture, "solve_one", lambda *rest: SimpleNamespace(images=(), title=""))
    monkeypatch.setattr(picture, "draw", lambda *rest: figure)


def test_help_names_every_command() -> None:
    text = _run("--help").stdout
    assert all(word in text for word in WORDS_OF_HELP)
    for word in WORDS_OF_HELP:
        assert _run(word, "--help").exit_code == 0


def test_start_loads_neither_tasks_nor_pictures() -> None:
    program = "import sys, dare_hf.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    heavy = {"matplotlib", "dare_hf.demo.comparison", "dare_hf.tasks.mvot", "dare_hf.visualize"}
    assert not heavy & set(loaded)


@pytest.mark.usefixtures("fake_demo")
def test_demo_json_is_one_line_alone_on_stdout(tmp_path: Path) -> None:
    done = _run("demo", "--training-free", "--n", "4", "--json", "--out", str(tmp_path / "new"))
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("\n") == 1
    result = json.loads(done.stdout)
    assert list(result) == JSON_KEYS
    assert (result["n"], result["flops_ratio"], result["kv_ratio"]) == (4, 0.4, 0.5)
    assert "accuracy" in done.stderr
    assert len(list((tmp_path / "new").glob("*.png"))) == 2


@pytest.mark.usefixtures("fake_demo")
def test_demo_prints_a_table_with_ratios(tmp_path: Path) -> None:
    done = _run("demo", "--safe", "--n", "4", "--hard", "--out", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    ratios = {"accuracy ": "1.00", "GFLOPs": "0.40", "KV cache": "0.50", "seconds": "0.50"}
    ratios |= {"of prefill": "0.20", "of decode": "1.00", "peak memory": "0.40"}
    for name, ratio in ratios.items():
        assert any(name in line and ratio in line for line in lines), done.stdout
    assert "hard split" in done.stdout
    assert "full: the plain model. DARE: safe, pruning without training" in done.stdout
    assert "{" not in done.stdout


@pytest.mark.usefixtures("fake_demo")
def test_demo_runs_the_model_it_is_asked_for(tmp_path: Path) -> None:
    done = _run("demo", "--model", "volcano", "--safe", "--n", "4", "--out", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert "dare-tiny-volcano: 4 held-out scenes" in done.stdout
    assert "boxes right" in done.stdout


def test_demo_without_a_model_s_files_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dare_hf.demo import embedded

    monkeypatch.setattr(embedded, "ASSETS", tmp_path)
    done = _run("demo", "--model", "volcano")
    assert done.exit_code == cli.REFUSED
    assert len(done.stderr.strip().splitlines()) == 1
    assert "dare-tiny-volcano" in done.stderr


@pytest.mark.usefixtures("fake_demo", "shipped")
def test_demo_has_the_shipped_adapter_unless_told_otherwise(tmp_path: Path) -> None:
    done = _run("demo", "--model", "volcano", "--n", "4", "--out", str(tmp_path))
    assert done.exit_code == 0, done.stderr
    assert "DARE: dare-lh, trained routers and a LoRA, merged" in done.stdout
    done = _run("demo", "--model", "volcano", "--adapter", "dare-l", "--out", str(tmp_path))
    assert "DARE: dare-l, trained routers" in done.stdout
    # The fixture ships nothing for anole: one line that says what to do.
    done = _run("demo", "--out", str(tmp_path))
    assert done.exit_code == cli.REFUSED
    assert len(done.stderr.strip().splitlines()) == 1
    assert "there is none" in done.stderr
    assert "--training-free" in done.stderr


def test_demo_refuses_no_items() -> None:
    assert _run("demo", "--n", "0").exit_code == cli.REFUSED


def test_info_tells_where_the_layers_are(tmp_path: Path) -> None:
    tiny_model("gemma3").config.save_pretrained(tmp_path)
    done = _run("info", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "supported" in done.stdout
    assert "4 x Gemma3DecoderLayer at model.language_model.layers" in done.stdout
    assert "sliding-window layers: 2, window 12" in done.stdout


def _info_json(*arguments: str) -> tuple[int, dict]:
    done = _run("info", *arguments, "--json")
    assert done.stdout.count("\n") == 1, done.stderr
    return done.exit_code, json.loads(done.stdout)


def test_info_says_what_a_configuration_will_cost(tmp_path: Path) -> None:
    model = tiny_model("llava")
    model.config.save_pretrained(tmp_path)
    asked = ("--vision", "20", "--text", "10", "--hops", "2", "--hop-text", "5")
    code, found = _info_json(str(tmp_path), *asked)
    assert (code, found["supported"], found["config"]) == (0, True, "safe")
    costs = found["costs"]
    hops = [HopTokens(20, 10), *[HopTokens(sampled_text=5)] * 2]
    expected = expected_kv_bytes(model, DareConfig.preset("safe"), hops=hops)
    kv = [costs["kv_bytes"]["prefill"], *costs["kv_bytes"]["hops"]]
    assert [hop["end"] for hop in kv] == [sum(layers) for layers in expected.ends]
    assert [hop["begin"] for hop in kv] == [sum(layers) for layers in expected.begins]
    assert kv[-1]["plain"] == expected.baseline > kv[-1]["end"]
    assert costs["flops"]["prefill"]["dare"] < costs["flops"]["prefill"]["plain"]
    text = _run("info", str(tmp_path), *asked).stdout
    for part in ("prefill, FLOP", "first decoded token, FLOP", "KV at the end of hop 2, bytes"):
        assert part in text
    DareConfig(schedule="constant", vision_retention=0.1).save_pretrained(tmp_path / "own")
    _, less = _info_json(str(tmp_path), *asked, "--config", str(tmp_path / "own"))
    assert less["costs"]["kv_bytes"]["prefill"]["end"] < kv[0]["end"]


def test_info_refuses_learned_rates_without_an_adapter(tmp_path: Path) -> None:
    tiny_model("llava").config.save_pretrained(tmp_path)
    fresh = DareConfig(scorer="router", schedule="learned")
    fresh.save_pretrained(tmp_path / "fresh")
    done = _run("info", str(tmp_path), "--text", "9", "--config", str(tmp_path / "fresh"))
    assert done.exit_code == cli.REFUSED
    assert "adapter_model.safetensors" in done.stderr


def test_info_json_tells_why_not(tmp_path: Path) -> None:
    GPTNeoXConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    code, found = _info_json(str(tmp_path))
    assert (code, found["supported"]) == (cli.REFUSED, False)
    assert "'gpt_neox'" in found["reason"]


def test_info_tells_why_not(tmp_path: Path) -> None:
    GPTNeoXConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    done = _run("info", str(tmp_path))
    assert done.exit_code == cli.REFUSED
    assert done.stdout.startswith("not supported: ")
    assert "'gpt_neox'" in done.stdout


def test_info_tells_of_a_language_model(tmp_path: Path) -> None:
    LlamaConfig(num_hidden_layers=3).save_pretrained(tmp_path)
    done = _run("info", str(tmp_path))
    assert done.exit_code == 0, done.output
    assert "class: LlamaForCausalLM, text model LlamaModel" in done.stdout
    assert "3 x LlamaDecoderLayer at model.layers" in done.stdout


def test_info_never_runs_nor_offers_the_code_of_a_folder(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    auto_map = {"AutoConfig": "own.Config", "AutoModelForImageTextToText": "own.Model"}
    for model_type in ("own-model", "llava"):
        config = {"model_type": model_type, "auto_map": auto_map}
        (tmp_path / "config.json").write_text(json.dumps(config))
        done = CliRunner().invoke(cli.app, ["info", str(tmp_path)], input="y\n" * 9)
        assert "[y/N]" not in done.output
        assert not ran.exists()
        if model_type == "own-model":
            assert done.exit_code == cli.REFUSED
            assert "never runs code of a folder" in done.stderr
            assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 10**9},
        {"hidden_size": "x"},
        {"num_attention_heads": None},
        {"x": [[]]},
    ],
)
def test_info_of_an_absurd_config_is_one_line(change: dict, tmp_path: Path) -> None:
    config = tiny_model("llava").config.to_dict()
    config["text_config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = _run("info", str(tmp_path))
    assert done.exit_code == (0 if "x" in change else cli.REFUSED)
    assert "Traceback" not in done.output
    assert done.exception is None or isinstance(done.exception, SystemExit)


def test_info_of_nothing_is_one_line(tmp_path: Path) -> None:
    done = _run("info", str(tmp_path / "nowhere"))
    assert done.exit_code == cli.REFUSED
    assert len(done.stderr.strip().splitlines()) == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("flag", [("--dtype", "int8"), ("--device", "tpu")])
def test_bench_refuses_what_it_cannot_run(flag: tuple[str, str]) -> None:
    done = _run("bench", *flag)
    assert done.exit_code == cli.REFUSED
    assert flag[1] in done.stderr
