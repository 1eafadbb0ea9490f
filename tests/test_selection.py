"""selection.py: pairs within pathways and their controls, against plain counting."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from cellcircuits.combinations import Combination, choose_triplets
from cellcircuits.errors import UserError
from cellcircuits.selection import N_NEAREST, choose_pairs, read_selective_summary

TABLE = {name: {"any": [name], "none": []} for name in ("ddr", "mitosis", "rna")}


def feature(layer: int, idx: int, pathway: str | None, n_edges: int = 5, freq: float = 0.02) -> dict:
    return {
        "layer": layer, "idx": idx, "label": f"term {idx}", "pathway": pathway, "n_edges": n_edges,
        "activation_freq": freq,
    }  # fmt: skip


def random_summary(seed: int, n_per_layer: int = 24, layers: tuple[int, ...] = (0, 5, 11)) -> dict:
    rng = np.random.default_rng(seed)
    names = [None, None, None, "rna", "mitosis", "ddr", "own"]
    features = [
        feature(layer, i, names[rng.integers(len(names))], int(rng.integers(6)), float(rng.uniform(0.01, 0.5)))
        for layer in layers
        for i in range(n_per_layer)
    ]
    return {"features": features, "pathways": TABLE}


def of_kind(pairs: list[Combination], kind: str) -> list[Combination]:
    return [pair for pair in pairs if pair.kind == kind]


def strongest(summary: dict, target: int, n: int = 3) -> dict[tuple, list[dict]]:
    """(pathway, layer) -> its features with most edges."""
    groups: dict[tuple, list[dict]] = {}
    for one in summary["features"]:
        if one["pathway"] is not None and one["layer"] < target:
            groups.setdefault((one["pathway"], one["layer"]), []).append(one)
    return {key: sorted(of, key=lambda f: (-f["n_edges"], f["idx"]))[:n] for key, of in groups.items()}


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("target", [17, 11])
def test_same_pathway_pairs_are_all_of_the_strongest(seed: int, target: int):
    summary = random_summary(seed)
    pairs, _ = choose_pairs(summary, target, seed=0)
    kept = strongest(summary, target)
    expected = {
        (pathway, (layer, f["idx"]), (later, g["idx"]))
        for (pathway, layer), features in kept.items()
        for (other, later), others in kept.items()
        if pathway == other and layer < later
        for f in features
        for g in others
    }
    same = of_kind(pairs, "same_pathway")
    assert {(p.pathway, *((f.layer, f.index) for f in p.features)) for p in same} == expected
    assert len(same) == len(expected) and pairs[: len(same)] == same
    order = ["ddr", "mitosis", "rna", "own"]  # the table's, then what it lacks
    ranks = [(order.index(p.pathway), -p.n_edges) for p in same]
    assert ranks == sorted(ranks)
    by_name = {(f["layer"], f["idx"]): f for f in summary["features"]}
    for f in (f for p in pairs for f in p.features):
        assert (f.label, f.n_edges) == (by_name[f.layer, f.index]["label"], by_name[f.layer, f.index]["n_edges"])


@pytest.mark.parametrize("seed", range(5))
def test_the_first_feature_of_a_pathway_and_layer_is_its_strongest(seed: int):
    summary = random_summary(seed)
    pairs, _ = choose_pairs(summary, 17, seed=0)
    first: dict[tuple, int] = {}
    for pair in of_kind(pairs, "same_pathway"):
        for f in pair.features:
            first.setdefault((pair.pathway, f.layer), f.n_edges)
    kept = strongest(summary, 17)
    assert first == {key: kept[key][0]["n_edges"] for key in first}


@pytest.mark.parametrize("seed", range(5))
def test_cross_pathway_pairs_join_two_pathways_and_layers(seed: int):
    summary = random_summary(seed)
    pairs, notes = choose_pairs(summary, 17, seed=seed)
    cross = of_kind(pairs, "cross_pathway")
    assert len(cross) == len(of_kind(pairs, "same_pathway")) and not [note for note in notes if "cross" in note]
    assert len({pair.name for pair in cross}) == len(cross)
    where = {
        (layer, f["idx"]): pathway for (pathway, layer), features in strongest(summary, 17).items() for f in features
    }
    for pair in cross:
        a, b = pair.features
        names = (where[a.layer, a.index], where[b.layer, b.index])
        assert a.layer < b.layer and names[0] != names[1] and pair.pathway == "_x_".join(names)


@pytest.mark.parametrize("seed", range(3))
def test_random_pairs_match_in_layer_and_frequency(seed: int):
    summary = random_summary(seed, n_per_layer=30)
    pairs, notes = choose_pairs(summary, 17, seed=seed)
    same, random = of_kind(pairs, "same_pathway"), of_kind(pairs, "random")
    assert len(random) == len(same) and not notes
    assert {pair.pathway for pair in random} == {"random"}
    log_frequency = {(f["layer"], f["idx"]): math.log(f["activation_freq"]) for f in summary["features"]}
    pathway = {(f["layer"], f["idx"]): f["pathway"] for f in summary["features"]}
    taken = {(layer, f["idx"]) for (_, layer), features in strongest(summary, 17).items() for f in features}
    free = [key for key in log_frequency if key not in taken]
    used = set()

    def distance(one, other) -> float:
        return sum(abs(log_frequency[x] - log_frequency[y]) for x, y in zip(one, other, strict=True))

    for wanted, control in zip(same, random, strict=True):
        goal, found = (tuple((f.layer, f.index) for f in pair.features) for pair in (wanted, control))
        possible = [
            pair
            for pair in combinations(free, 2)
            if [key[0] for key in pair] == [key[0] for key in goal]
            and pair not in used
            and (pathway[pair[0]] is None or pathway[pair[0]] != pathway[pair[1]])
        ]
        assert found in possible
        nearer = sum(distance(pair, goal) < distance(found, goal) for pair in possible)
        assert nearer < N_NEAREST
        used.add(found)


def test_the_seed_decides_the_draws_only():
    summary = random_summary(1)
    first, again, other = (choose_pairs(summary, 17, seed)[0] for seed in (0, 0, 1))
    assert first == again != other
    assert of_kind(first, "same_pathway") == of_kind(other, "same_pathway")


def test_fewer_features_per_layer():
    summary = random_summary(1)
    pairs, _ = choose_pairs(summary, 17, 0, features_per_layer=1)
    per_pathway = [sum(p.pathway == name for p in of_kind(pairs, "same_pathway")) for name in ("ddr", "rna")]
    assert per_pathway == [3, 3]


def test_too_few_controls_are_said():
    features = [feature(layer, i, "rna") for layer in (0, 5) for i in range(2)]
    features += [feature(0, 9, "ddr"), feature(0, 8, None), feature(5, 8, None), feature(5, 7, "mitosis")]
    pairs, notes = choose_pairs({"features": features, "pathways": TABLE}, 17, 0)
    assert [len(of_kind(pairs, kind)) for kind in ("same_pathway", "cross_pathway", "random")] == [4, 4, 1]
    assert len(notes) == 1 and notes[0].startswith("1 random pairs for 4 same-pathway ones")


def test_features_of_one_pathway_make_no_control():
    features = [feature(layer, i, "rna", n_edges=9 - i) for layer in (0, 5) for i in range(4)]
    pairs, notes = choose_pairs({"features": features}, 17, 0)  # the fourth of each layer is free
    assert not of_kind(pairs, "random") and not of_kind(pairs, "cross_pathway") and len(notes) == 2


def test_pairs_lead_to_triplets():
    pairs, _ = choose_pairs(random_summary(2), 17, 0)
    chosen, _ = choose_triplets([pair for pair in pairs if pair.kind != "random"], 10)
    assert len(chosen) == 9  # no signaling here, so one of the two cross-pathway triplets
    assert [one.kind for one in chosen].count("cross_pathway") == 1


class TestMistakes:
    def test_no_pathway_at_two_layers(self):
        features = [feature(0, 1, "rna"), feature(5, 1, "ddr"), feature(17, 2, "rna")]
        with pytest.raises(UserError, match=r"no pair.*rna at layer 0; ddr at layer 5.*--n-features.*--pairs FILE"):
            choose_pairs({"features": features}, 17, 0)
        with pytest.raises(UserError, match="there are: none"):
            choose_pairs({"features": [feature(0, 1, None)]}, 17, 0)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("layer", -1), ("layer", None), ("idx", "1"), ("idx", True), ("n_edges", None), ("n_edges", 2.0),
            ("label", None), ("pathway", 3), ("activation_freq", 0.0), ("activation_freq", float("nan")),
            ("activation_freq", "0.1"),
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_named(self, tmp_path: Path, key: str, value: object):
        path = tmp_path / "selective_summary.json"
        path.write_text(json.dumps({"features": [feature(0, 1, "rna"), feature(5, 1, "rna") | {key: value}]}))
        with pytest.raises(UserError, match=rf"selective_summary\.json: feature entry 2: `{key}`"):
            read_selective_summary(path)
        with pytest.raises(UserError, match=f"feature entry 2: `{key}`"):
            choose_pairs(json.loads(path.read_text()), 17, 0)

    def test_other_files(self, tmp_path: Path):
        path = tmp_path / "selective_summary.json"
        with pytest.raises(UserError, match=r"selective_feature_tracing\.py.*--pairs FILE"):
            read_selective_summary(path)
        for text in ("[]", "{}", '{"features": {}}'):
            path.write_text(text)
            with pytest.raises(UserError, match="no list `features`"):
                read_selective_summary(path)
        path.write_text('{"features": [3]}')
        with pytest.raises(UserError, match="entry 1"):
            read_selective_summary(path)

    def test_a_sound_file_is_read(self, tmp_path: Path):
        path = tmp_path / "selective_summary.json"
        path.write_text(json.dumps(random_summary(0)))
        assert read_selective_summary(path) == random_summary(0)
