"""higher_order_ablation.py end to end on small inputs: numbers, files, resume, and a user's mistakes."""

import json
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import higher_order_ablation as script
import make_figures
import reference_combinations as slow
from cellcircuits import combination_run, joint
from cellcircuits.additivity_summary import fractions
from cellcircuits.cells import CellSelection, load_cells
from cellcircuits.edge_fdr import unpacked
from cellcircuits.geneformer import load_model
from cellcircuits.sae_store import find_sae, open_sae
from cellcircuits.vocabulary import load_vocabulary
from conftest import Study, random_sae, write_sae

TRIPLETS = [((1, 7), (2, 30), (4, 12)), ((1, 0), (1, 21), (4, 5)), ((4, 8), (2, 9), (1, 33))]
PAIRS = [((1, 7), (2, 30)), ((2, 9), (2, 11))]
TRIPLET_KEYS = {
    "triplet_id", "feature_A", "feature_B", "feature_C", "pathway", "triplet_type", "target_layer", "n_cells",
    "n_active", "n_significant", "pairwise_ratios", "threeway_ratio", "n_subadditive_3way", "n_additive_3way",
    "n_superadditive_3way", "higher_order_interaction_median", "marginal_C_given_AB_median", "mean_abs_d",
    "elapsed_seconds",
}  # fmt: skip


def listed(path: Path, combinations: list) -> Path:
    """A user's file of combinations."""
    path.write_text("".join(",".join(f"{layer}:{i}" for layer, i in features) + "\n" for features in combinations))
    return path


def flags(study: Study, out_dir: Path, order: int = 3) -> list[str]:
    chosen = listed(study.root / f"order{order}.txt", TRIPLETS if order == 3 else PAIRS)
    return [
        "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
        "--cells", "all", "--n-cells", "8", "--min-median-tokens", "5", "--target-layer", "5", "--device", "cpu",
        "--order", str(order), "--triplets" if order == 3 else "--pairs", str(chosen), "--out-dir", str(out_dir),
    ]  # fmt: skip


def results_of(out_dir: Path) -> dict[str, Any]:
    """Every JSON file without its times, every archive as arrays."""
    files: dict[str, Any] = {}
    for path in sorted(out_dir.rglob("*")):
        name = str(path.relative_to(out_dir))
        if path.suffix == ".json":
            files[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".npz":
            with np.load(path) as archive:
                files[name] = {key: archive[key].tolist() for key in archive.files}
    return files


def timeless(content: Any) -> Any:
    if isinstance(content, dict):
        hidden = ("elapsed_seconds", "total_elapsed_min", "provenance")
        return {key: timeless(value) for key, value in content.items() if key not in hidden}
    return [timeless(value) for value in content] if isinstance(content, list) else content


def refusal(capsys: pytest.CaptureFixture[str], status: int) -> str:
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.fixture(scope="module", params=[3, 2])
def finished(request: pytest.FixtureRequest, study_template: Study, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run of triplets or pairs with its effects kept, that no test may change."""
    out_dir = tmp_path_factory.mktemp(f"finished{request.param}")
    assert script.main([*flags(study_template, out_dir, request.param), "--save-effects"]) == 0
    return request.param, out_dir


@pytest.fixture(scope="module")
def measured(study_template: Study) -> dict[tuple, slow.Effects]:
    """What the slow implementation says of every combination."""
    model = load_model(str(study_template.model)).model
    saes = {layer: open_sae(find_sae(study_template.data_root, layer)) for layer in (1, 2, 4, 5)}
    vocabulary = load_vocabulary([study_template.model], model.config.vocab_size)
    selection = CellSelection(cells="all", n_cells=8, min_median_tokens=5)
    cells = load_cells(study_template.cells, vocabulary, selection, 48).cells
    return {features: slow.measure(model, saes, cells, features, 5) for features in (*TRIPLETS, *PAIRS)}


def test_records_hold_the_slow_implementation_s_numbers(finished: tuple[int, Path], measured: dict):
    order, out_dir = finished
    for features in TRIPLETS if order == 3 else PAIRS:
        name = "_x_".join(f"L{layer}_F{index}" for layer, index in features)
        record = json.loads((out_dir / f"{'triplet' if order == 3 else 'pair'}_{name}.json").read_text())
        effects = measured[features]
        expected = slow.per_target(effects.published, order)
        surrogate = {
            condition: slow.median_or(ratios, 1.0)
            for condition, ratios in slow.surrogate_ratios(effects, order).items()
        }
        assert record["n_active"] == {name: len(rows) for name, rows in effects.published.items()}
        assert record["n_significant"]["any"] == len(expected.targets)
        for condition, d in expected.d.items():
            assert record["mean_abs_d"][condition] == pytest.approx(np.mean(np.abs(d)), rel=1e-3)
        if order == 3:
            assert record.keys() >= TRIPLET_KEYS
            for key, value in slow.numbers_of_triplet(effects.published).items():
                assert record[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
            assert record["threeway_ratio_if_additive"] == pytest.approx(surrogate.pop("ABC"), rel=1e-3)
            assert record["pairwise_ratios_if_additive"] == pytest.approx(surrogate, rel=1e-3)
        else:
            ratios = slow.ratios_on_targets(expected.d["AB"], expected, "AB")
            assert record["ratio_median"] == pytest.approx(np.median(ratios), rel=1e-3)
            assert record["ratio_median_if_additive"] == pytest.approx(surrogate["AB"], rel=1e-3)
            counts = [record[f"n_{label}"] for label in ("subadditive", "additive", "superadditive")]
            assert counts == list(slow.classes(ratios))


def test_records_hold_the_interactions_of_full_passes(finished: tuple[int, Path], measured: dict):
    """In float32, so a target at the edge of rounding may count on one side only."""
    order, out_dir = finished
    content = json.loads((out_dir / "additivity.json").read_text())
    by_id = {entry["id"]: entry for entry in content["combinations"]}
    for features in TRIPLETS if order == 3 else PAIRS:
        entry = by_id["_x_".join(f"L{layer}_F{index}" for layer, index in features)]
        union = measured[features].union
        means = slow.mean_interactions(union)
        assert entry["n_cells"] == len(measured[features].union_cells) and entry["conditions"].keys() == means.keys()
        n_live = np.any([abs(rows).max(axis=0) > 1e-4 for rows in union.values()], axis=0).sum()
        assert n_live <= entry["n_live_targets"] <= n_live + 3
        for name, condition in entry["conditions"].items():
            assert condition["strongest"] or abs(means[name]).max() < 1e-4
            for strong in condition["strongest"]:
                assert strong["mean_interaction"] == pytest.approx(means[name][strong["target"]], rel=1e-3, abs=5e-5)
                joint = union[name][:, strong["target"]].mean()
                assert strong["mean_joint"] == pytest.approx(joint, rel=1e-3, abs=5e-5)
            summed = np.sum([union[letter] for letter in name], axis=0)
            norms = [np.linalg.norm(rows.mean(axis=0)) for rows in (union[name], summed)]
            assert condition["redundancy_index_plug_in"] == pytest.approx(1 - norms[0] / norms[1], rel=1e-3, abs=1e-4)


def test_saved_effects_are_both_averages(finished: tuple[int, Path], measured: dict):
    order, out_dir = finished
    for features in TRIPLETS if order == 3 else PAIRS:
        name = "_x_".join(f"L{layer}_F{index}" for layer, index in features)
        effects = measured[features]
        with np.load(out_dir / "effects" / f"{name}.npz") as kept:
            assert kept["cells_any"].tolist() == effects.union_cells
            for condition, rows in effects.published.items():
                assert kept[f"cells_{condition}"].tolist() == effects.cells[condition]
                np.testing.assert_allclose(kept[condition], rows, atol=2e-5)
                np.testing.assert_allclose(kept[f"union_{condition}"], effects.union[condition], atol=2e-5)


def test_interactions_follow_from_the_saved_effects(finished: tuple[int, Path]):
    """Live targets, interactions beyond rounding and every p again, from the files alone."""
    order, out_dir = finished
    n_changed = 0
    for features in TRIPLETS if order == 3 else PAIRS:
        name = "_x_".join(f"L{layer}_F{index}" for layer, index in features)
        (path,) = out_dir.glob(f"*_{name}.json")
        tested = json.loads(path.read_text())["additivity"]
        with np.load(out_dir / "effects" / f"{name}.npz") as kept:
            rounding = kept["rounding"].astype(np.float64)
            union = {key[6:]: kept[key].astype(np.float64) for key in kept.files if key.startswith("union_")}
        live = np.flatnonzero(np.any([(abs(x) > 2 * rounding).any(axis=0) for x in union.values()], axis=0))
        assert unpacked(tested["live_targets"])[0].tolist() == live.tolist()
        for of, condition in tested["conditions"].items():
            parts = {key: x for key, x in union.items() if set(key) <= set(of)}
            between = sum((-1) ** (len(of) - len(key)) * x for key, x in parts.items())[:, live]
            between[abs(between) <= 2 ** len(of) * rounding[:, live]] = 0
            assert condition["n_changed"] == np.count_nonzero(between.any(axis=0))
            n_changed += condition["n_changed"]
            signs = np.array(list(product((1, -1), repeat=len(between))))
            as_large = abs(signs @ between) >= abs(between.sum(axis=0)) - 1e-5 * abs(between).sum(axis=0)
            np.testing.assert_allclose(np.divide(*fractions(condition)), as_large.mean(axis=0), rtol=1e-12)
    assert order == 2 or n_changed > 10  # these pairs add exactly


def test_the_summary_lists_what_was_asked_for_in_its_order(finished: tuple[int, Path]):
    order, out_dir = finished
    summary = json.loads((out_dir / "summary.json").read_text())
    kind = "triplet" if order == 3 else "pair"
    names = [entry[f"{kind}_id"] for entry in summary[f"per_{kind}_results"]]
    assert names == [
        "_x_".join(f"L{layer}_F{index}" for layer, index in features)
        for features in (TRIPLETS if order == 3 else PAIRS)
    ]
    assert summary[f"n_{kind}s"] == len(names) and summary["n_same_pathway"] == 0
    assert summary["same_pathway_3way_ratio" if order == 3 else "same_pathway_ratio"] is None
    assert not (out_dir / "partial").exists() or not list((out_dir / "partial").iterdir())


def test_summary_and_figure_need_no_inputs(
    finished: tuple[int, Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
):
    out_dir = finished[1]
    before = results_of(out_dir)
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    printed = capsys.readouterr().out
    assert "additive" in printed and ("L1/F7 x L2/F30" in printed)
    assert results_of(out_dir) == before
    assert make_figures.main(["--out-dir", str(out_dir)]) == 0
    assert (out_dir / "higher_order_ablation.png").read_bytes()[:4] == b"\x89PNG"
    (out_dir / "higher_order_ablation.png").unlink()


@pytest.mark.parametrize("batch", ["1", "2", "16"])
def test_the_batch_size_does_not_matter(study_template: Study, finished: tuple[int, Path], tmp_path: Path, batch: str):
    order, out_dir = finished
    again = tmp_path / "again"
    assert script.main([*flags(study_template, again, order), "--batch-size", batch, "--save-effects"]) == 0
    for path in out_dir.glob("effects/*.npz"):
        with np.load(path) as one, np.load(again / "effects" / path.name) as other:
            for key in (key for key in one.files if key != "cell_names"):
                np.testing.assert_allclose(one[key], other[key], atol=1e-5)


def interrupted_run(monkeypatch: pytest.MonkeyPatch, arguments: list[str], n_cells: int) -> None:
    """Start a run and press Ctrl-C once `n_cells` cells have been measured."""
    counted = iter(range(n_cells))
    honest = joint.JointBench.effects

    def effects(self, *rest, **named):
        if next(counted, None) is None:
            raise KeyboardInterrupt
        return honest(self, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(joint.JointBench, "effects", effects)
        patch.setattr(combination_run, "SAVE_EVERY_SECONDS", 0.0)
        assert script.main(arguments) == 130


@pytest.mark.parametrize("n_cells", [1, 5, 12, 20])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    study_template: Study, finished: tuple[int, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_cells: int
):
    order, out_dir = finished
    if order == 2 and n_cells == 20:
        pytest.skip("a run of two pairs is over by then")
    arguments = [*flags(study_template, tmp_path / "out", order), "--save-effects"]
    interrupted_run(monkeypatch, arguments, n_cells)
    assert script.main(arguments) == 0
    assert results_of(tmp_path / "out") == results_of(out_dir)


def test_finished_combinations_are_not_measured_again(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    out_dir = tmp_path / "out"
    assert script.main(flags(study, out_dir)) == 0
    before = results_of(out_dir)
    damaged = out_dir / "triplet_L1_F7_x_L2_F30_x_L4_F12.json"
    damaged.write_text(damaged.read_text()[:100])
    measured = []
    honest = combination_run.CombinationRun.measure_one
    monkeypatch.setattr(
        combination_run.CombinationRun,
        "measure_one",
        lambda self, combination, *rest: (measured.append(combination.name), honest(self, combination, *rest)),
    )
    assert script.main(flags(study, out_dir)) == 0
    assert measured == ["L1_F7_x_L2_F30_x_L4_F12"] and "damaged" in caplog.text
    assert results_of(out_dir) == before
    (study.data_root / "sae_models/layer01_x1_k4/feature_annotations.json").write_text(
        json.dumps({"feature_annotations": {"7": [{"ontology": "KEGG", "term": "Apoptosis"}]}})
    )
    assert script.main(flags(study, out_dir)) == 0
    assert json.loads(damaged.read_text())["feature_A"]["label"] == "Apoptosis" and len(measured) == 1
    assert script.main([*flags(study, out_dir), "--save-effects"]) == 0
    assert len(measured) == 4 and len(list(out_dir.glob("effects/*.npz"))) == 3


@pytest.mark.parametrize(
    "change, words",
    [
        (["--n-cells", "7"], ["n_cells is 8 there and 7 here"]),
        (["--seed", "1", "--n-cells", "8"], ["cells"]),
        (["--tokenization", "geneformer"], ["tokenization"]),
    ],
)
def test_other_settings_are_refused_and_nothing_is_touched(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: list[str], words: list[str]
):
    out_dir = tmp_path / "out"
    assert script.main(flags(study, out_dir)) == 0
    before = results_of(out_dir)
    capsys.readouterr()
    sentence = refusal(capsys, script.main([*flags(study, out_dir), *change]))
    assert all(word in sentence for word in words), sentence
    assert results_of(out_dir) == before


def test_another_sae_is_refused(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert script.main(flags(study, tmp_path / "out")) == 0
    capsys.readouterr()
    write_sae(study.data_root, 2, random_sae(99, 24, 40, 4))
    assert "saes.2" in refusal(capsys, script.main(flags(study, tmp_path / "out")))


MISTAKES = {
    "negative seed": (["--pairing-seed", "-1"], None, ["--pairing-seed", "at least 0"]),
    "absurd number": (["--triplets"], f"1:1,2:2,4:{'9' * 5000}\n", ["mine.txt", "line 1"]),
    "target not after": (["--target-layer", "4"], None, ["--target-layer 4", "layer 4"]),
    "target not in the model": (["--target-layer", "6"], None, ["--target-layer 6", "6 blocks"]),
    "no SAE": (["--triplets"], "1:1,2:2,3:3\n", ["no SAE of layer 3"]),
    "index out of range": (["--triplets"], "1:1,2:40,4:3\n", ["no feature 40", "0 to 39"]),
    "two features": (["--triplets"], "1:1,2:2\n", ["mine.txt"]),
    "empty file": (["--triplets"], "", ["mine.txt"]),
    "no such file": (["--triplets", "absent.txt"], None, ["absent.txt"]),
    "pairs for triplets": (["--pairs"], "1:1,2:2\n", ["--order 2"]),
    "no cells": (["--data-path", "absent.h5ad"], None, ["absent.h5ad"]),
    "no data root": (["--data-root", "absent"], None, ["absent"]),
    "a list made disjoint": (["--disjoint"], None, ["--disjoint goes without a list"]),
    "two layers": (["--triplet-layers", "1,2"], None, ["three layers"]),
    "too few tokens": (["--min-median-tokens", "100"], None, ["--min-median-tokens"]),
}


@pytest.mark.parametrize("which", MISTAKES)
def test_a_mistake_gives_one_sentence_and_no_results(
    study_template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
):
    change, content, words = MISTAKES[which]
    if content is not None:
        (tmp_path / "mine.txt").write_text(content)
        change = [*change, str(tmp_path / "mine.txt")]
    out_dir = tmp_path / "out"
    sentence = refusal(capsys, script.main([*flags(study_template, out_dir), *change]))
    assert all(word in sentence for word in words), sentence
    assert not list(out_dir.glob("*.json"))


def test_triplets_need_a_source(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = flags(study, tmp_path / "out")
    del arguments[arguments.index("--triplets") :][:2]
    bare = [a for i, a in enumerate(arguments) if a != "--triplets" and arguments[i - 1] != "--triplets"]
    assert "--pair-dir" in refusal(capsys, script.main(bare))
    sentence = refusal(capsys, script.main([*bare, "--pair-dir", str(tmp_path)]))
    assert "summary.json" in sentence and "--order 2" in sentence


def test_triplets_are_chosen_from_pairs(study: Study, tmp_path: Path):
    """The pair run's own summary is what the triplet run reads."""
    entries = [
        {"features": [{"layer": a[0], "idx": a[1], "n_edges": e, "best_term": pathway, "best_term_significant": False},
                      {"layer": b[0], "idx": b[1], "n_edges": e}],
         "pathway": pathway, "type": "same_pathway"}
        for pathway, a, b, e in (
            ("vesicle", (1, 7), (2, 30), 5), ("vesicle", (1, 7), (4, 12), 5), ("rna", (1, 0), (2, 9), 9),
            ("rna", (2, 9), (4, 5), 9),
        )
    ]  # fmt: skip
    pairs = study.root / "pairs.json"
    pairs.write_text(json.dumps(entries))
    arguments = flags(study, tmp_path / "pairs", 2)
    arguments[arguments.index("--pairs") + 1] = str(pairs)
    assert script.main(arguments) == 0
    summary = json.loads((tmp_path / "pairs" / "summary.json").read_text())
    assert summary["n_same_pathway"] == 4 and summary["same_pathway_ratio"] > 0
    arguments = [a for a in flags(study, tmp_path / "triplets") if a != "--triplets" and not a.endswith("order3.txt")]
    more = ["--pair-dir", str(tmp_path / "pairs"), "--triplet-layers", "1,2,4", "--n-triplets", "4"]
    assert script.main([*arguments, *more]) == 0
    summary = json.loads((tmp_path / "triplets" / "summary.json").read_text())
    names = [(entry["triplet_id"], entry["pathway"]) for entry in summary["per_triplet_results"]]
    assert names == [("L1_F0_x_L2_F9_x_L4_F5", "rna"), ("L1_F7_x_L2_F30_x_L4_F12", "vesicle")]
    assert summary["n_same_pathway"] == 2
    for key in ("3way_ratio", "3way_ratio_if_additive"):
        of_two = [entry[f"three{key.removeprefix('3')}"] for entry in summary["per_triplet_results"]]
        assert summary[f"same_pathway_{key}"] == pytest.approx(sum(of_two) / 2) != 0


def test_one_cell_only(study: Study, tmp_path: Path):
    """No effect has a size then: ratios 1, nothing significant, and no NaN in the files."""
    assert script.main([*flags(study, tmp_path / "out"), "--n-cells", "1"]) == 0
    for path in (tmp_path / "out").glob("triplet_*.json"):
        record = json.loads(path.read_text())
        assert record["n_significant"]["any"] == 0 and record["threeway_ratio"] == 1.0
        assert record["higher_order_interaction_median"] == 0.0 == record["mean_abs_d"]["ABC"]
