"""The reduced form of `make soak`: random runs with a fixed seed, and checks that can fail."""

from pathlib import Path

import pytest
import torch

from dare_hf.cache import DareCache
from dare_hf.compat import VERSION
from dare_hf.conformance.laws import LawBroken

pytestmark = pytest.mark.skipif(VERSION < (5, 23), reason="prefill chunks are refused before 5.23")


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "scripts")
    return pytest.importorskip("soak", reason="the scripts are not in this tree")


@pytest.mark.parametrize("first", range(0, 32, 4))
def test_random_runs_keep_the_laws(soak, first):
    tally = soak.soak(range(first, first + 4), seed=9)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert len(tally.architectures) == 4
    assert len(tally.undecided) <= 1
    assert tally.laws.total() >= 12


def test_the_same_seed_and_number_make_the_same_case(soak):
    assert soak.draw(3, 17) == soak.draw(3, 17)
    assert soak.draw(3, 17) != soak.draw(4, 17)


def test_a_wrong_run_is_told_with_what_repeats_it(soak, monkeypatch, capsys):
    import soak_laws

    def broken(run):
        raise LawBroken("one is off")

    monkeypatch.setattr(soak_laws, "again", broken)
    monkeypatch.setattr(DareCache, "kv_bytes", lambda cache: 1)
    tally = soak.soak([0], seed=1)
    assert [text.split(": ")[1] for text in tally.wrong] == ["law bytes", "law again"]
    assert "python scripts/soak.py --seed 1 --only 0" in tally.wrong[0]
    assert tally.wrong[0] in capsys.readouterr().err
    assert "wrong 2" in soak.line(tally, 1, 0.0)


def test_noise_decides_where_two_scores_are_one_rounding_apart(soak, monkeypatch):
    import soak_cases
    import soak_run

    case = next(
        case
        for case in (soak.draw(1, number) for number in range(200))
        if case.mode == "greedy"
        and case.fields["scorer"] == soak_cases.SCORER
        and case.fields["text_retention"] < 1
        and case.dtype == "wide"
    )
    assert not soak_run.undecided(case)

    def near_ties(hidden, modality, *, layer, hop, positions):
        wide = hidden.double()
        return 0.5 + 1e-6 * torch.sin(1e9 * wide.sum(-1))

    from dare_hf import register_scorer

    register_scorer(soak_cases.SCORER, near_ties)
    try:
        assert soak_run.undecided(case)
    finally:
        register_scorer(soak_cases.SCORER, soak_cases.content_scores)
