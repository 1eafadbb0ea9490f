"""higher_order_ablation.py on folders that something happened to: damaged, copied, renamed, named by another list."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import higher_order_ablation as script
from cellcircuits import combination_run
from conftest import Study, random_sae, write_sae
from test_higher_order_script import TRIPLETS, flags, refusal, results_of


@pytest.fixture(scope="module")
def finished_triplets(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of triplets with its effects kept, that no test may change."""
    out_dir = tmp_path_factory.mktemp("triplets")
    assert script.main([*flags(study_template, out_dir), "--save-effects"]) == 0
    return out_dir


def edited(out_dir: Path, pattern: str, **changes: Any) -> None:
    """Change keys of JSON files of a folder; `...` removes one."""
    for path in out_dir.glob(pattern):
        content = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}, default=str))


DAMAGES = [
    {"n_active": ...}, {"elapsed_seconds": ...}, {"elapsed_seconds": "1"}, {"n_significant": 4}, {"n_significant": {}},
    {"threeway_ratio": "0.5"}, {"threeway_ratio": None}, {"threeway_ratio": float("nan")},
    {"higher_order_interaction_median": float("inf")}, {"triplet_id": ["L1_F0"]}, {"triplet_id": "L1_F0"},
    {"pathway": ...}, {"triplet_type": ...}, {"fingerprint": ...}, {"additivity": ...}, {"additivity": []},
    {"feature_B": {}}, {"pairwise_ratios_if_additive": {}},
    {"additivity": {"n_cells": 8, "n_live_targets": 3, "conditions": {}}},
]  # fmt: skip


def said_of_additivity(out_dir: Path) -> dict:
    """What the record that is damaged below says about additivity."""
    return json.loads(next(out_dir.glob("triplet_L1_F0_*.json")).read_text())["additivity"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("p", {"denominator": 128, "numerators": "no base64"}), ("p", {"denominator": 128, "numerators": "AAAA"}),
     ("p", {"denominator": 0}), ("p", {"denominator": 10**30}), ("direction", None),
     ("projection", ...), ("reason", ...), ("p_refined", ...), ("redundancy_index", "0.1"),
     ("p_refined", {"numerators": "eJxjYGBgAAAABAAB"}), ("strongest", [{}]), ("p", "swap")],
)  # fmt: skip
def test_damaged_tests_are_not_counted(
    finished_triplets: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str, value: Any
):
    out_dir = shutil.copytree(finished_triplets, tmp_path / "out")
    tested = said_of_additivity(out_dir)
    if value == "swap":  # whole, but of another number of targets
        tested["n_live_targets"] -= 1
    elif isinstance(value, dict) and len(value) == 1:
        tested["conditions"]["AB"][key] |= value
    elif value is ...:
        del tested["conditions"]["AB"][key]
    else:
        tested["conditions"]["AB"][key] = value
    edited(out_dir, "triplet_L1_F0_*.json", additivity=tested)
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    content = json.loads((out_dir / "additivity.json").read_text())
    assert len(content["combinations"]) == 2 and "not counted" in caplog.text


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_damaged_record_is_not_counted_and_measured_again(
    finished_triplets: Path, study_template: Study, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: dict
):
    out_dir = shutil.copytree(finished_triplets, tmp_path / "out")
    edited(out_dir, "triplet_L1_F0_*.json", **damage)
    assert script.main(["--analysis-only", "--out-dir", str(out_dir)]) == 0
    assert json.loads((out_dir / "summary.json").read_text())["n_triplets"] == 2 and "not counted" in caplog.text
    assert script.main([*flags(study_template, out_dir), "--save-effects"]) == 0
    assert results_of(out_dir) == results_of(finished_triplets)


def test_a_copy_is_not_counted_twice_and_damaged_effects_are_made_again(
    finished_triplets: Path, study_template: Study, tmp_path: Path
):
    out_dir = shutil.copytree(finished_triplets, tmp_path / "out")
    copy = out_dir / "triplet_L1_F7_x_L2_F30_x_L4_F12 (1).json"
    shutil.copy(out_dir / "triplet_L1_F7_x_L2_F30_x_L4_F12.json", copy)
    effects = out_dir / "effects" / "L1_F7_x_L2_F30_x_L4_F12.npz"
    effects.write_bytes(effects.read_bytes()[:200])
    edited(out_dir, "summary.json", per_triplet_results=[{"triplet_id": ["no name"]}])
    assert script.main([*flags(study_template, out_dir), "--save-effects"]) == 0
    copy.unlink()
    (out_dir / "partial").mkdir(exist_ok=True)
    (out_dir / "partial" / "L1_F0_x_L1_F21_x_L4_F5.npz").write_bytes(b"left by a kill after the record was written")
    assert script.main([*flags(study_template, out_dir), "--save-effects"]) == 0
    assert not list(out_dir.glob("partial/*"))
    assert results_of(out_dir) == results_of(finished_triplets)


def test_a_folder_of_a_version_without_tests_is_refused(
    finished_triplets: Path, study_template: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out_dir = shutil.copytree(finished_triplets, tmp_path / "out")
    settings = json.loads((out_dir / "manifest.json").read_text())["settings"]
    del settings["additivity"]
    edited(out_dir, "manifest.json", settings=settings)
    sentence = refusal(capsys, script.main(["--analysis-only", "--out-dir", str(out_dir)]))
    assert "does not say how additivity is tested" in sentence
    assert "additivity is null there" in refusal(capsys, script.main(flags(study_template, out_dir)))


@pytest.mark.parametrize("change", [{"order": 7}, {"target_layer": ...}, {"n_cells": ...}, {"additivity": [3]}])
def test_a_damaged_manifest_is_one_sentence(
    finished_triplets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict
):
    out_dir = shutil.copytree(finished_triplets, tmp_path / "out")
    settings = json.loads((out_dir / "manifest.json").read_text())["settings"] | change
    edited(out_dir, "manifest.json", settings={key: value for key, value in settings.items() if value is not ...})
    assert "manifest.json" in refusal(capsys, script.main(["--analysis-only", "--out-dir", str(out_dir)]))


def test_a_plain_list_does_not_rename_what_was_chosen_by_pathway(study: Study, tmp_path: Path):
    out_dir, arguments = tmp_path / "out", flags(study, tmp_path / "out")
    named = study.root / "named.json"
    entries = [{"features": features, "pathway": "rna", "type": "same_pathway"} for features in TRIPLETS[:1]]
    named.write_text(json.dumps(entries))
    assert script.main([*arguments, "--triplets", str(named)]) == 0
    before = results_of(out_dir)["triplet_L1_F7_x_L2_F30_x_L4_F12.json"]
    assert script.main(arguments) == 0
    assert results_of(out_dir)["triplet_L1_F7_x_L2_F30_x_L4_F12.json"] == before and before["pathway"] == "rna"


def test_a_triplet_of_two_pathways_is_measured_once(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    features = [{"layer": layer, "idx": 1, "label": "x", "n_edges": 1} for layer in (1, 2, 4)]
    pairs = [
        {"pathway": pathway, "pair_type": "same_pathway", "feature_A": a, "feature_B": b}
        for pathway in ("rna", "ddr")
        for a, b in (features[:2], features[1:])
    ]
    (tmp_path / "summary.json").write_text(json.dumps({"per_pair_results": pairs}))
    arguments = [a for a in flags(study, tmp_path / "out") if a != "--triplets" and not a.endswith("order3.txt")]
    measured = []
    honest = combination_run.CombinationRun.measure_one
    monkeypatch.setattr(
        combination_run.CombinationRun,
        "measure_one",
        lambda self, combination, *rest: (measured.append(combination), honest(self, combination, *rest)),
    )
    for _ in range(2):
        more = ["--pair-dir", str(tmp_path), "--triplet-layers", "1,2,4", "--n-random-triplets", "0"]
        assert script.main([*arguments, *more]) == 0
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        assert [entry["pathway"] for entry in summary["per_triplet_results"]] == ["ddr"]
    assert len(measured) == 1 and "two pathways" in caplog.text


def test_names_that_a_terminal_cannot_show_do_not_end_a_run(finished_triplets: Path, tmp_path: Path):
    out_dir = shutil.copytree(finished_triplets, tmp_path / "out")
    edited(out_dir, "triplet_L1_F0_*.json", pathway="Zellzyklus \udc80 \u7d30\u80de")
    command = [sys.executable, script.__file__, "--analysis-only", "--out-dir", str(out_dir)]
    ended = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert ended.returncode == 0 and b"(Zellzyklus ? ??, listed)" in ended.stdout


@pytest.mark.parametrize("order", [2, 3])
def test_features_of_other_saes_are_refused(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], order: int
):
    """An index out of an earlier run means another feature in another SAE, and nothing else would tell."""
    features = [
        {"layer": layer, "idx": 1, "label": "x", "n_edges": 1, "pathway": "rna", "activation_freq": 0.1}
        for layer in (1, 2, 4)
    ]
    same = {"pathway": "rna", "pair_type": "same_pathway"}
    pairs = [same | {"feature_A": a, "feature_B": b} for a, b in (features[:2], features[1:])]
    source = tmp_path / "source"
    made = source / "layer02" if order == 2 else source
    made.mkdir(parents=True)
    (source / "summary.json").write_text(json.dumps({"per_pair_results": pairs}))
    (source / "selective_summary.json").write_text(json.dumps({"features": features, "pathways": {}}))
    listed = "--triplets" if order == 3 else "--pairs"
    arguments = flags(study, tmp_path / "out", order)
    assert script.main(arguments) == 0
    shutil.copy(tmp_path / "out" / "manifest.json", made / "manifest.json")
    arguments = [a for i, a in enumerate(arguments) if listed not in (a, arguments[max(i - 1, 0)])]
    arguments += ["--pair-dir", str(source), "--selective-dir", str(source), "--triplet-layers", "1,2,4"]
    assert script.main([*arguments, "--out-dir", str(tmp_path / "same")]) == 0
    capsys.readouterr()
    write_sae(study.data_root, 2, random_sae(99, 24, 40, 4))
    sentence = refusal(capsys, script.main([*arguments, "--out-dir", str(tmp_path / "other")]))
    assert str(made) in sentence and "saes.2" in sentence
    assert not (tmp_path / "other").exists()
