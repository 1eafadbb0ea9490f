"""additivity_summary.py: q over the folder against scipy, disjoint choices, the class effect, lines and the figure."""

import json
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib.collections import PathCollection
from scipy.stats import false_discovery_control

from cellcircuits.additivity import combination_additivity
from cellcircuits.additivity_figures import combination_figure
from cellcircuits.additivity_summary import (
    CLASSES,
    additivity_lines,
    additivity_summary,
    class_test,
    disjoint,
    fractions,
)
from cellcircuits.combination_results import summarise
from cellcircuits.combination_stats import (
    AdditivitySettings,
    CombinationEffects,
    combination_statistics,
    condition_name,
    conditions,
)
from cellcircuits.stats import EdgeRule

CPU = torch.device("cpu")
SETTINGS = AdditivitySettings(n_draws=400, n_resamples=200, n_refined=2_000)
CONFIG = {"n_cells": 14, "target_layer": 9, "additivity": SETTINGS.record()}


def record(order: int, features: tuple, kind: str, lost: float, n_cells: int = 14) -> dict:
    """A record as a run writes it, of a joint effect that lacks a share of the sum in half of the targets."""
    rng = np.random.default_rng([order, *(index for _, index in features)])
    subsets = conditions(order)
    singles = rng.normal(1.0, 0.5, (n_cells, order, 30)) * (rng.random(30) < 0.8)
    share = np.where(np.arange(30) < 15, 1 - lost, 1.0)
    effects = np.stack([singles[:, list(s)].sum(axis=1) * (share if len(s) > 1 else 1) for s in subsets], axis=1)
    effects += 0.05 * rng.standard_normal(effects.shape) * (effects != 0)
    table = CombinationEffects(np.ones((n_cells, len(subsets)), dtype=bool), effects, effects, effects)
    name = "_x_".join(f"L{layer}_F{index}" for layer, index in features)
    what = {2: "pair", 3: "triplet"}[order]
    return {
        f"{what}_id": name,
        **{f"feature_{x}": {"layer": f[0], "idx": f[1]} for x, f in zip("ABC", features, strict=False)},
        f"{what}_type": kind, "pathway": "rna", "target_layer": 9, "n_cells": n_cells, "elapsed_seconds": 1.0,
        **combination_statistics(table, order, EdgeRule()),
        "additivity": combination_additivity(table, np.full((n_cells, 30), 1e-6), features, SETTINGS, CPU),
    }  # fmt: skip


def pairs(per_class: int, lost: tuple[float, ...] = (0.5, 0.2, 0.0)) -> list[dict]:
    return [
        record(2, ((0, 10 * c + i), (5, 10 * c + i)), kind, lost[c])
        for c, kind in enumerate(CLASSES)
        for i in range(per_class)
    ]


@pytest.fixture(scope="module")
def four_each() -> list[dict]:
    return pairs(4)


def test_the_family_is_every_live_target_of_every_condition(four_each: list[dict]) -> None:
    triplets = [record(3, ((0, i), (5, i), (7, i)), "same_pathway", 0.4, n_cells=9 + 3 * i) for i in range(3)]
    for order, records in ((2, four_each), (3, triplets)):
        content = additivity_summary(order, records, CONFIG)
        p = np.concatenate(
            [np.divide(*fractions(of_one)) for r in records for of_one in r["additivity"]["conditions"].values()]
        )
        q, strict = (false_discovery_control(p, method=method) for method in ("bh", "by"))
        family = content["family"]
        assert family["n_tests"] == len(p) and family["n_interactions"] == (q < 0.05).sum() > 0
        assert family["n_interactions_by"] == (strict < 0.05).sum()
        assert family["n_synergy"] + family["n_redundancy"] == family["n_interactions"]
        assert family["share"] == pytest.approx((q < 0.05).mean())
        assert family["share_low"] <= family["share"] <= family["share_high"]
        counted = iter(q < 0.05)
        for entry in content["combinations"]:
            for condition in entry["conditions"].values():
                called = [next(counted) for _ in range(condition["n_tests"])]
                assert condition["n_interactions"] == sum(called)
            assert entry["n_interactions"] == sum(c["n_interactions"] for c in entry["conditions"].values())
        names = [condition_name(s) for s in conditions(order) if len(s) > 1]
        assert list(content["combinations"][0]["conditions"]) == names
        json.dumps(content, allow_nan=False)
    assert family["smallest_p"] == 1 / 2_401  # of the triplet with 15 cells, whose vectors are drawn
    assert family["n_needed_at_smallest_p"] == int(np.ceil(len(p) / 2_401 / 0.05))


def test_ratios_of_a_condition_are_the_study_s(four_each: list[dict]) -> None:
    triplet = record(3, ((0, 1), (5, 1), (7, 1)), "random", 0.4)
    (entry,) = additivity_summary(3, [triplet], CONFIG)["combinations"]
    assert entry["published_ratio"] == triplet["threeway_ratio"]
    assert entry["conditions"]["AC"]["published_ratio"] == triplet["pairwise_ratios"]["AC"]
    assert entry["conditions"]["BC"]["published_ratio_if_additive"] == triplet["pairwise_ratios_if_additive"]["BC"]
    assert entry["redundancy_index"] == entry["conditions"]["ABC"]["redundancy_index"] > 0.1
    (pair, *_) = additivity_summary(2, four_each, CONFIG)["combinations"]
    assert pair["published_ratio_if_additive"] == four_each[0]["ratio_median_if_additive"]


def test_numbers_do_not_depend_on_the_order_of_the_records(four_each: list[dict]) -> None:
    one, other = (additivity_summary(2, records, CONFIG) for records in (four_each, four_each[::-1]))
    assert one["combinations"] == other["combinations"][::-1]
    assert {**one, "combinations": 0} == {**other, "combinations": 0}


def test_the_class_effect_has_the_combination_as_its_unit(four_each: list[dict]) -> None:
    content = additivity_summary(2, four_each, CONFIG)
    effect = content["class_effect"]
    means = {
        kind: np.mean([e["redundancy_index"] for e in content["combinations"] if e["kind"] == kind]) for kind in CLASSES
    }
    assert effect["statistic"] == pytest.approx(means["same_pathway"] - means["random"]) and effect["reason"] is None
    assert effect["p"] == pytest.approx(2 / 70)  # the most extreme of all choices of 4 of 8, two-sided
    assert (effect["n_same_pathway"], effect["n_cross_pathway"], effect["n_random"]) == (4, 4, 4)
    assert [contrast["q"] for contrast in content["contrasts"]] == pytest.approx([2 / 70] * 3)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_with_too_few_of_a_class_nothing_is_said(n: int) -> None:
    records = pairs(3)[: 6 + n]
    content = additivity_summary(2, records, CONFIG)
    effect = content["class_effect"]
    assert effect["p"] is None and effect["statistic"] is None and f"{n} random" in effect["reason"]
    assert content["contrasts"][1]["p"] == pytest.approx(0.1) == content["contrasts"][1]["q"]
    assert effect["reason"] in "\n".join(additivity_lines(content))


def test_combinations_that_share_a_feature_count_once() -> None:
    shared = [record(2, ((0, 1), (5, i)), "same_pathway", 0.3) for i in range(4)]
    apart = [record(2, ((0, 10 + i), (5, 10 + i)), "random", 0.3) for i in range(4)]
    content = additivity_summary(2, [*shared, *apart], CONFIG)
    assert content["classes"]["same_pathway"]["n_combinations"] == 4
    assert content["classes"]["same_pathway"]["n_disjoint"] == 1 == content["class_effect"]["n_same_pathway"]
    assert content["class_effect"]["p"] is None


def test_disjoint_is_disjoint_maximal_and_indifferent_to_order() -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        entries = [
            {"id": f"{i:02d}", "kind": str(rng.choice(CLASSES)), "features": [str(j) for j in rng.choice(12, 3, False)]}
            for i in range(rng.integers(1, 12))
        ]  # fmt: skip
        chosen = disjoint(entries)
        used = [feature for entry in chosen for feature in entry["features"]]
        assert len(used) == len(set(used))
        assert all(set(entry["features"]) & set(used) for entry in entries)
        shuffled = [entries[i] for i in rng.permutation(len(entries))]
        assert [entry["id"] for entry in disjoint(shuffled)] == [entry["id"] for entry in chosen]
    star = [{"id": "a", "kind": "random", "features": ["x", "y", "z"]}] + [
        {"id": name, "kind": "random", "features": [name]} for name in "xyz"
    ]
    assert [entry["id"] for entry in disjoint(star)] == ["x", "y", "z"]


def test_class_test_is_complete_enumeration() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.5, 1, 4), rng.normal(0, 1, 5)
    together = np.concatenate([first, second])
    found = [
        together[list(chosen)].mean() - np.delete(together, list(chosen)).mean() for chosen in combinations(range(9), 4)
    ]
    observed = first.mean() - second.mean()
    statistic, p = class_test(first, second, rng)
    assert statistic == pytest.approx(observed)
    tails = [np.mean(np.array(found) >= observed - 1e-12), np.mean(np.array(found) <= observed + 1e-12)]
    assert p == pytest.approx(min(1, 2 * min(tails)))


def test_lines_say_it_in_words(four_each: list[dict]) -> None:
    content = additivity_summary(2, four_each, CONFIG)
    lines = list(additivity_lines(content))
    assert 4 <= len(lines) <= 6
    text = "\n".join(lines)
    assert "median of 12 pairs" in text and "above 0 (redundancy) for" in text and "same-pathway less" in text
    assert f"{content['family']['n_interactions']} of {content['family']['n_tests']} tests" in text


def test_a_folder_without_combinations_and_one_without_an_index() -> None:
    empty = additivity_summary(2, [], CONFIG)
    assert empty["family"]["share"] is None and empty["family"]["n_tests"] == 0
    single = additivity_summary(2, [record(2, ((0, 1), (5, 1)), "listed", 0.0, n_cells=1)], CONFIG)
    assert single["combinations"][0]["redundancy_index"] is None
    for content in (empty, single):
        json.dumps(content, allow_nan=False)
        assert "no pair has a redundancy index" in "\n".join(additivity_lines(content))


@pytest.mark.parametrize(("n_cells", "said"), [(1, "below 1"), (4, "below 0.12"), (14, "would be needed")])
def test_without_any_interaction_no_interval_is_given_and_it_says_why_there_is_none(n_cells: int, said: str) -> None:
    """Resamples of nothing would say "0.00 to 0.00%"; few cells cannot reach any q, however many tests have that p."""
    records = [record(2, ((0, i), (5, i)), "listed", 0.0, n_cells) for i in range(4)]
    content = additivity_summary(2, records, CONFIG)
    family = content["family"]
    assert family["n_interactions"] == 0 and family["share"] == 0.0
    assert family["share_low"] is None and "no interaction is called" in family["reason"]
    text = "\n".join(additivity_lines(content))
    assert said in text and f"{family['n_tests']} tests (0.00%);" in text
    assert (family["n_needed_at_smallest_p"] > family["n_tests"]) == (n_cells < 14) == ("none could be called" in text)


@pytest.mark.parametrize("n_cells", [1, 14])
def test_the_figure_draws_every_index_with_its_interval(four_each: list[dict], n_cells: int) -> None:
    records = four_each if n_cells > 1 else [record(2, ((0, 1), (5, 1)), "listed", 0.0, n_cells=1)]
    content = additivity_summary(2, records, CONFIG)
    figure = combination_figure(summarise(2, records, CONFIG), content)
    _, right = figure.axes
    known = [entry for entry in content["combinations"] if entry["redundancy_index"] is not None]
    dots = [of_class for of_class in right.collections if isinstance(of_class, PathCollection)]
    assert sum(len(of_class.get_offsets()) for of_class in dots) == len(known)
    names = " ".join(label.get_text() for label in right.get_xticklabels())
    assert all(kind.replace("_", " ") in names for kind in {entry["kind"] for entry in known})
    figure.canvas.draw()
