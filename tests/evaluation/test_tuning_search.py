"""The search over budgets, on a model whose drops are known."""

from types import SimpleNamespace

import pytest

from dare_hf import DareConfig
from dare_hf.tuning.bench import Measured
from dare_hf.tuning.candidates import Family
from dare_hf.tuning.search import TEXT_RATES, VISION_RATES, Search, Target, choose


def _bench(drop):
    """A bench where a configuration costs its rates and drops as `drop(family, config)` says."""

    def measure(family, config, router):
        vision, text = config.vision_retention, config.text_retention
        lost, cost = drop(family, config), (vision + text) / 2
        return Measured(family, config, "x", 1 - lost / 100, lost, cost, cost, lost, (0.0, lost))

    return SimpleNamespace(measure=measure)


def _families(*scorers):
    return [Family(scorer, "constant", {}) for scorer in scorers]


def _search(drop, images, *, max_drop=1.0, target=None, kinds=("attention", "random")):
    search = Search(_bench(drop), images, None, max_drop, target, lambda one: None)
    search.run(_families(*kinds))
    return search


@pytest.mark.parametrize("bound", [0.01, *VISION_RATES])
def test_bisection_ends_at_the_lowest_rate_that_holds(bound):
    def drop(family, config):
        return 0.5 if config.vision_retention >= bound and config.text_retention == 1 else 2.0

    search = _search(drop, images=True)
    best, _ = choose(search, lambda family, config: search.bench.measure(family, config, None))
    assert best.config.vision_retention == min(rate for rate in VISION_RATES if rate >= bound)
    assert len(search.found) <= search.expected(2)


def test_text_alone_lowers_the_text_rate():
    search = _search(lambda family, config: 3 * (1 - config.text_retention), images=False)
    best, _ = choose(search, lambda family, config: search.bench.measure(family, config, None))
    assert best.config.text_retention == 0.7
    assert best.config.vision_retention == 1.0
    assert {one.config.text_retention for one in search.found.values()} <= set(TEXT_RATES)


def test_where_the_held_out_rows_disagree_milder_budgets_are_looked_at():
    search = _search(lambda family, config: 2 * (1 - config.vision_retention), images=True)
    held = _bench(lambda family, config: 5 * (1 - config.vision_retention))
    best, seen = choose(search, lambda family, config: held.measure(family, config, None))
    assert best.config.vision_retention == 0.85
    assert best.drop <= 1.0
    assert max(one.drop for one in seen) > 1.0
    never = _bench(lambda family, config: 9.0)
    none, seen = choose(search, lambda family, config: never.measure(family, config, None))
    assert none is None
    assert seen


def test_a_target_leaves_what_keeps_to_it():
    target = Target("kv", 0.6)
    search = _search(lambda family, config: 0.1, images=True, target=target)
    best, _ = choose(search, lambda family, config: search.bench.measure(family, config, None))
    assert best.kv_ratio <= 0.6
    tight = _search(lambda family, config: 0.1, images=True, target=Target("kv", 0.05))
    assert (
        choose(tight, lambda family, config: tight.bench.measure(family, config, None))[0] is None
    )


def test_the_nearest_families_are_kept():
    far = {"attention": 0.2, "random": 0.9, "key_norm": 0.1}
    search = _search(
        lambda family, config: far[config.scorer] * (2 - config.vision_retention),
        images=True,
        kinds=tuple(far),
    )
    beyond_probes = {
        one.config.scorer for one in search.found.values() if one.config.vision_retention != 0.4
    }
    assert beyond_probes == {"attention", "key_norm"}
    best, _ = choose(search, lambda family, config: search.bench.measure(family, config, None))
    assert isinstance(best.config, DareConfig)


def _frozen_search(gain, takes=None):
    def drop(family, config):
        far = {"attention": 1.0, "random": 1.5, "key_norm": 1.7}[config.scorer]
        near = gain if config.pruned == "freeze" else far
        return near * (2 - config.vision_retention)

    search = Search(_bench(drop), True, None, 9.0, None, lambda one: None, takes)
    adds = Family("attention", "constant", {"mean_update": True})
    search.run([adds, Family("random", "constant", {}), Family("key_norm", "constant", {})])
    return search


def test_frozen_forms_of_the_nearest_are_tried_where_the_model_takes_them():
    better = _frozen_search(0.5)
    assert {one.config.pruned for one in better.found.values()} == {"bypass", "freeze"}
    assert better._paths[0][0].name == "attention with mean updates, constant, frozen"
    worse = _frozen_search(2.0)
    assert not any(family.name.endswith("frozen") for family, _, _ in worse._paths)
    asked = []
    refused = _frozen_search(0.5, lambda config: asked.append(config.pruned))
    assert {one.config.pruned for one in refused.found.values()} == {"bypass"}
    assert set(asked) == {"freeze"}
