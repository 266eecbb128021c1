"""The reduced form of `make fuzz`: mutated files with a fixed seed."""

import random
from pathlib import Path

import pytest
import torch
from peft_runs import adapted, saved

from dare_hf.errors import DareError
from dare_hf.testing import tiny_model


@pytest.fixture
def fuzz(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return pytest.importorskip("fuzz", reason="the scripts are not in this tree")


@pytest.mark.filterwarnings("ignore")  # peft warns of second adapters, and of much that is spoiled
@pytest.mark.parametrize("kind", ["adapter", "config", "recipe", "rows", "info"])
def test_mutated_files_are_refused_or_load(kind, fuzz, tmp_path):
    with fuzz.silence():
        tally = fuzz.Fuzzer(tmp_path, seed=7).run(60 if kind == "adapter" else 40, kind)
    assert not tally.wrong, dict(tally.wrong)
    assert tally.counts["refused"] > 10
    assert tally.counts["foreign"] == tally.counts["changed"] == 0


@pytest.mark.filterwarnings("ignore")
def test_the_fuzzer_sees_what_it_looks_for(fuzz, tmp_path):
    """A model left patched, logits that changed, and an error that is no refusal."""

    def patch(model, _):
        adapted(model)
        raise DareError("a refusal that left the model patched")

    def nudge(model, _):
        with torch.no_grad():
            model.lm_head.weight.add_(1)
        raise KeyError("foreign")

    loads = fuzz.Loads(saved(tmp_path))
    (tmp_path / "case").mkdir()
    good = Path(saved(tmp_path))
    good.rename(tmp_path / "good")
    for load, found in ((patch, {"changed": 1}), (nudge, {"changed": 1, "foreign": 1})):
        tally = fuzz.Tally()
        loads.ways["apply_dare"] = (tiny_model("llava"), load, lambda *_: None)
        loads.plain["apply_dare"] = loads.logits(loads.ways["apply_dare"][0])
        fuzz.adapter_case(loads, tmp_path / "case", "apply_dare", tally)
        assert dict(tally.counts) == found


def test_the_same_seed_makes_the_same_inputs(fuzz):
    import fuzz_mutations

    made = [fuzz_mutations.recipe("a: 1\nb: 2\n", random.Random(3), ["a", "c"]) for _ in range(2)]
    assert made[0] == made[1]
