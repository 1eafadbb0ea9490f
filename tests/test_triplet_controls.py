"""triplet_controls.py and `disjoint`: matched, apart from everything, and the same whatever else is drawn."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import higher_order_ablation as script
from cellcircuits.combinations import Combination, ComboFeature, choose_triplets
from cellcircuits.selection import N_NEAREST, choose_pairs
from cellcircuits.triplet_controls import Candidate, random_triplets
from conftest import Study
from test_higher_order_script import flags, listed, refusal

LAYERS = (0, 5, 11)


def catalogs(n: int = 60, seed: int = 0) -> dict[int, dict[int, Candidate]]:
    rng = np.random.default_rng(seed)
    pathways = [None, "rna", "ddr", "vesicle"]
    return {
        layer: {
            i: Candidate(
                ComboFeature(layer, i), float(np.exp(rng.uniform(-5, -1))), float(rng.uniform(0.5, 4)),
                pathways[rng.integers(4)],
            )
            for i in range(n)
        }
        for layer in LAYERS
    }  # fmt: skip


def triplet(*indices: int) -> Combination:
    features = tuple(ComboFeature(layer, i) for layer, i in zip(LAYERS, indices, strict=True))
    return Combination(features, "rna", "same_pathway")


CHOSEN = [triplet(1, 2, 3), triplet(1, 4, 3), triplet(7, 8, 9)]


def names(combinations: list[Combination]) -> list[str]:
    return [feature.name for one in combinations for feature in one.features]


class TestRandomTriplets:
    def test_share_no_feature_and_no_pathway(self) -> None:
        known = catalogs()
        controls, notes = random_triplets(CHOSEN, CHOSEN, known, 3, 0)
        assert len(controls) == 3 and not notes
        assert len(set(names(controls))) == 9 and not set(names(controls)) & set(names(CHOSEN))
        for control in controls:
            assert control.kind == "random" and [f.layer for f in control.features] == list(LAYERS)
            found = [known[f.layer][f.index].pathway for f in control.features]
            assert len([p for p in found if p]) == len({p for p in found if p})

    def test_are_among_the_nearest_in_frequency_and_norm(self) -> None:
        known = catalogs()
        (control,), _ = random_triplets(CHOSEN[:1], CHOSEN, known, 1, 0)
        for feature, original in zip(control.features, CHOSEN[0].features, strict=True):
            model = known[feature.layer][original.index]

            def off(x: Candidate, model: Candidate = model) -> float:
                return abs(math.log(x.activation_freq / model.activation_freq)) + abs(
                    math.log(x.ablated_norm / model.ablated_norm)
                )

            free = [x for x in known[feature.layer].values() if x.feature.name not in names(CHOSEN)]
            nearer = sum(off(x) < off(known[feature.layer][feature.index]) for x in free)
            taken_out = sum(x.pathway is not None for x in free)  # a pathway may be taken by the other features
            assert nearer < N_NEAREST + taken_out
        lone = known[0][1]
        assert lone.distance(Candidate(lone.feature, lone.activation_freq, None, None)) == 0

    def test_are_the_same_again_and_other_with_another_seed(self) -> None:
        known = catalogs()
        one, again, other = (random_triplets(CHOSEN, CHOSEN, known, 3, seed)[0] for seed in (0, 0, 1))
        assert one == again != other
        fewer, _ = random_triplets(CHOSEN, CHOSEN, known, 1, 0)
        assert fewer == one[:1]

    def test_several_rounds_and_what_cannot_be_drawn(self) -> None:
        controls, notes = random_triplets(CHOSEN[:1], CHOSEN, catalogs(), 5, 0)
        assert len({control.name for control in controls}) == 5 and not notes
        controls, notes = random_triplets(CHOSEN, CHOSEN, catalogs(n=12), 30, 0)
        assert len(controls) <= 8 and "of 30 wanted" in notes[0]
        assert random_triplets(CHOSEN, CHOSEN, {}, 2, 0)[0] == []
        assert random_triplets([], CHOSEN, catalogs(), 2, 0)[0] == []

    def test_features_that_hardly_fire_are_left_out(self) -> None:
        known = catalogs(n=30)
        quiet = {i: Candidate(x.feature, 1e-5, x.ablated_norm, x.pathway) for i, x in known[5].items() if i > 8}
        controls, _ = random_triplets(CHOSEN, CHOSEN, known | {5: known[5] | quiet}, 3, 0)
        assert controls and all(control.features[1].index <= 8 for control in controls)


def pair_list() -> list[Combination]:
    """Pathways with three features a layer, each in every pair within its pathway."""
    found = []
    for number, pathway in enumerate(("ddr", "mitosis", "vesicle", "signaling")):
        features = [ComboFeature(layer, 10 * number + i, n_edges=9 - i) for layer in LAYERS for i in range(3)]
        found += [Combination((a, b), pathway, "same_pathway") for a in features for b in features if a.layer < b.layer]
    return found


def test_disjoint_triplets_share_no_feature() -> None:
    published, _ = choose_triplets(pair_list(), 14)
    assert len(set(names(published))) < len(names(published))
    chosen, _ = choose_triplets(pair_list(), 14, disjoint=True)
    assert len(set(names(chosen))) == len(names(chosen)) == 3 * len(chosen)
    assert len(chosen) == 12  # three of each pathway, which leaves none for cross-pathway ones
    fewer, _ = choose_triplets(pair_list(), 6, disjoint=True)
    assert [one.kind for one in fewer].count("cross_pathway") == 2 and len(set(names(fewer))) == 18
    assert chosen[0] == published[0]


@pytest.mark.parametrize("seed", [0, 1])
def test_disjoint_pairs_share_no_feature(seed: int) -> None:
    features = [
        {"layer": layer, "idx": i, "label": "x", "n_edges": i, "activation_freq": 0.01 * (1 + i),
         "pathway": ["ddr", "rna", "vesicle", None][i % 4]}
        for layer in LAYERS for i in range(24)
    ]  # fmt: skip
    summary = {"features": features, "pathways": {}}
    published, _ = choose_pairs(summary, 17, seed, 2)
    assert len(set(names(published))) < len(names(published))
    chosen, _ = choose_pairs(summary, 17, seed, 2, disjoint=True)
    assert len(set(names(chosen))) == len(names(chosen))
    kinds = [one.kind for one in chosen]
    assert kinds.count("same_pathway") >= 6 and kinds.count("cross_pathway") >= 3 and kinds.count("random") >= 3


class TestScript:
    """Controls beside the chosen triplets of a run, listed apart."""

    @pytest.fixture
    def arguments(self, study: Study, tmp_path: Path) -> list[str]:
        """Triplets of two pathways, chosen from a summary of pairs."""
        features = [{"layer": layer, "idx": i, "label": "x", "n_edges": 9 - i} for i in (1, 2) for layer in (1, 2, 4)]
        pairs = [
            {"pathway": ["rna", "ddr"][i], "pair_type": "same_pathway", "feature_A": a, "feature_B": b}
            for i in range(2)
            for a, b in (features[3 * i : 3 * i + 2], features[3 * i + 1 : 3 * i + 3])
        ]
        (tmp_path / "summary.json").write_text(json.dumps({"per_pair_results": pairs}))
        bare = [a for a in flags(study, tmp_path / "out") if a != "--triplets" and not a.endswith("order3.txt")]
        return [*bare, "--n-cells", "3", "--pair-dir", str(tmp_path), "--triplet-layers", "1,2,4"]

    @pytest.mark.parametrize(("more", "n_controls"), [([], 2), (["--n-random-triplets", "3"], 3)])
    def test_are_listed_apart(self, arguments: list[str], tmp_path: Path, more: list[str], n_controls: int) -> None:
        assert script.main([*arguments, *more]) == 0
        summary, additivity = (
            json.loads((tmp_path / "out" / f"{x}.json").read_text()) for x in ("summary", "additivity")
        )
        assert summary["n_triplets"] == 2 == summary["n_same_pathway"] == len(summary["per_triplet_results"])
        controls = summary["control_triplet_results"]
        assert len(controls) == n_controls and {entry["triplet_type"] for entry in controls} == {"random"}
        assert additivity["classes"]["random"]["n_disjoint"] == n_controls
        entries = additivity["combinations"]
        assert [entry["kind"] for entry in entries] == ["same_pathway"] * 2 + ["random"] * n_controls
        used = [feature for entry in entries for feature in entry["features"]]
        assert len(set(used)) == len(used)
        before = (tmp_path / "out" / "additivity.json").read_bytes()
        assert script.main(["--analysis-only", "--out-dir", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / "additivity.json").read_bytes() == before

    def test_a_list_has_none_unless_they_are_asked_for(self, study: Study, tmp_path: Path) -> None:
        out = tmp_path / "out"
        named = [
            *flags(study, out),
            "--n-cells",
            "3",
            "--triplets",
            str(listed(tmp_path / "x", [((1, 1), (2, 2), (4, 5))])),
        ]
        for more, n_controls in (([], 0), (["--n-random-triplets", "2"], 2)):
            assert script.main([*named, *more]) == 0
            summary = json.loads((out / "summary.json").read_text())
            assert len(summary["control_triplet_results"]) == n_controls and summary["n_triplets"] == 1

    def test_need_catalogs_where_they_are_asked_for(
        self, arguments: list[str], study: Study, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        for path in study.data_root.glob("sae_models/layer02*/feature_catalog.json"):
            path.unlink()
        sentence = refusal(capsys, script.main([*arguments, "--n-random-triplets", "1"]))
        assert "layer02" in sentence and "feature_catalog.json is missing" in sentence
        assert script.main([*arguments, "--check"]) == 0 and "no random triplets" in caplog.text

    def test_go_with_order_3(self, study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        sentence = refusal(capsys, script.main([*flags(study, tmp_path / "out", 2), "--n-random-triplets", "1"]))
        assert "--n-random-triplets goes with --order 3" in sentence
