"""prepare_inputs.py end to end on a small random model and a few cells."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

import prepare_inputs
from cellcircuits import preparation, preparation_passes, sae_store
from cellcircuits.catalog import load_catalog
from cellcircuits.sae_store import find_sae, open_sae

SOURCE = Path(prepare_inputs.__file__).parent


@pytest.fixture(scope="module")
def gmt(tmp_path_factory):
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("sets") / "terms.gmt"
    lines = [
        "\t".join([f"Term {number}", "", *(f"GENE{gene}" for gene in rng.choice(60, 12, replace=False))])
        for number in range(25)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def flags(study_template, gmt, tmp_path):
    return [
        "--model", str(study_template.model), "--data-path", str(study_template.cells), "--cells", "all",
        "--min-median-tokens", "5", "--data-root", str(tmp_path / "made"), "--layers", "1,4", "--expansion", "2",
        "--k", "4", "--epochs", "6", "--batch-size", "32", "--min-firings", "2", "--gmt", f"GO_BP={gmt}",
        "--device", "cpu",
    ]  # fmt: skip


def read(path):
    return json.loads(path.read_text(), parse_constant=lambda token: pytest.fail(f"{path} holds {token}"))


def contents(folder):
    """Every file but the lock."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_the_experiments_read_is_made(flags, tmp_path, capsys):
    assert prepare_inputs.main(flags) == 0
    for layer in (1, 4):
        files = find_sae(tmp_path / "made", layer)
        sae = open_sae(files)
        assert files.checkpoint.parent.name == f"layer{layer:02d}_x2_k4"
        assert (sae.d_model, sae.n_features, sae.k) == (24, 48, 4)
        assert torch.allclose(sae.decoder_directions.norm(dim=1), torch.ones(48), atol=1e-5)
        catalog = load_catalog(files.catalog, files.annotations, sae.n_features)
        assert sorted(catalog) == list(range(48))
        raw = read(files.catalog)
        assert (raw["summary"]["layer"], raw["summary"]["k"]) == (layer, 4)
        assert raw["summary"]["n_alive"] > 30
        annotations = read(files.annotations)
        assert set(annotations["labels"]) == {str(f["feature_idx"]) for f in raw["features"] if f["top_genes"]}
        for index, entries in annotations["feature_annotations"].items():
            assert catalog[int(index)].label == entries[0]["term"] == annotations["labels"][index]["label"]
        quality = read(files.checkpoint.parent / "results.json")["quality"]
        assert 0 < quality["fvu"] < 1 and 0 < quality["pca_fvu"] < 1 and 0 < quality["l0"] <= 4
        assert quality["loss_original"] > 0 and quality["n_loss_cells"] == 1
    assert not list((tmp_path / "made").rglob("*.tmp"))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["layer", "1", "4"]


def test_no_held_out_cell_is_trained_on(flags, study_template, monkeypatch):
    seen = {}
    real = preparation_passes.collect_rows

    def spy(model, cells, *rest):
        seen["train"] = {cell.row for cell in cells}
        return real(model, cells, *rest)

    monkeypatch.setattr(preparation_passes, "collect_rows", spy)
    assert prepare_inputs.main([*flags, "--split-column", "gene", "--held-out-value", "TP53"]) == 0
    assert seen["train"] == {row for row in range(14) if row % 2}


def test_a_second_run_keeps_everything_and_other_settings_are_refused(flags, tmp_path, capsys):
    assert prepare_inputs.main([*flags, "--epochs", "1"]) == 0
    before = contents(tmp_path / "made")
    table = capsys.readouterr().out
    assert prepare_inputs.main([*flags, "--epochs", "1"]) == 0
    assert capsys.readouterr().out == table and contents(tmp_path / "made") == before
    assert prepare_inputs.main([*flags, "--epochs", "2", "--sae-seed", "3"]) == 2
    message = capsys.readouterr().err
    assert "epochs is 1 there and 2 here" in message and "seed is 42 there and 3 here" in message
    assert "another --data-root" in message and contents(tmp_path / "made") == before


def test_interrupted_and_resumed_equals_uninterrupted(flags, tmp_path, monkeypatch, capsys):
    one_at_a_time = [*flags, "--max-memory-gb", "5e-5"]
    assert prepare_inputs.main([*one_at_a_time, "--data-root", str(tmp_path / "whole")]) == 0
    table = capsys.readouterr().out
    real = sae_store.save_sae

    def stopped_at_layer_4(sae, folder):
        real(sae, folder)
        if "layer04" in folder.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(preparation, "save_sae", stopped_at_layer_4)
    assert prepare_inputs.main(one_at_a_time) == 130
    assert "run the same command again" in capsys.readouterr().err
    monkeypatch.setattr(preparation, "save_sae", real)
    assert prepare_inputs.main(one_at_a_time) == 0
    assert capsys.readouterr().out == table
    whole, made = contents(tmp_path / "whole"), contents(tmp_path / "made")
    assert set(whole) == set(made)
    assert all(whole[name] == made[name] for name in whole if not name.endswith("results.json"))


def test_memory_groups_do_not_change_the_saes(flags, tmp_path):
    together, apart = tmp_path / "together", tmp_path / "apart"
    assert prepare_inputs.main([*flags, "--data-root", str(together), "--epochs", "1"]) == 0
    assert prepare_inputs.main([*flags, "--data-root", str(apart), "--epochs", "1", "--max-memory-gb", "5e-5"]) == 0
    for layer in (1, 4):
        first, second = (open_sae(find_sae(root, layer)) for root in (together, apart))
        assert torch.equal(first.W_enc.weight, second.W_enc.weight)


def test_an_sae_of_someone_else_is_not_overwritten(flags, study_template, tmp_path, capsys):
    folder = tmp_path / "made" / "sae_models" / "layer01_x2_k4"
    folder.mkdir(parents=True)
    (folder / "sae_final.pt").write_bytes(b"precious")
    assert prepare_inputs.main(flags) == 2
    assert "did not make" in capsys.readouterr().err
    (folder / "results.json").write_text('{"config": {}, "results": {}}')
    assert prepare_inputs.main(flags) == 2
    assert "not written by this script" in capsys.readouterr().err
    assert (folder / "sae_final.pt").read_bytes() == b"precious"


def test_a_dictionary_without_mask_skips_the_loss(flags, tmp_path, monkeypatch):
    prepare = preparation.prepare

    def without_mask(work):
        inputs = replace(work.inputs, vocabulary=replace(work.inputs.vocabulary, mask=None))
        return prepare(replace(work, inputs=inputs))

    monkeypatch.setattr(preparation, "prepare", without_mask)
    assert prepare_inputs.main([*flags, "--layers", "1", "--epochs", "1"]) == 0
    quality = read(tmp_path / "made" / "sae_models" / "layer01_x2_k4" / "results.json")["quality"]
    assert quality["loss_skipped"] == "the dictionary has no <mask>" and "loss_original" not in quality


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--layers", "6"], "6 blocks, 0 to 5"),
        (["--k", "24"], "width of the residual stream, 24"),
        (["--gmt", "GO_BP=nowhere.gmt"], "nowhere.gmt"),
        (["--data-path", "nowhere.h5ad"], "nowhere.h5ad"),
        (["--split-column", "splits"], "no column 'splits'"),
        (["--split-column", "gene", "--held-out-value", "x"], "one part is empty"),
        (["--held-out", "1"], "leaves none to train on"),
        (["--max-memory-gb", "1e-9"], "--max-memory-gb"),
    ],
)
def test_mistakes_end_in_one_sentence(flags, capsys, changed, message):
    assert prepare_inputs.main([*flags, *changed]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]


def test_without_gene_sets_no_labels_are_made(flags, tmp_path, capsys):
    bare = [flag for flag in flags if not flag.startswith(("--gmt", "GO_BP="))]
    assert prepare_inputs.main([*bare, "--layers", "1", "--epochs", "1", "--loss-cells", "0"]) == 0
    folder = tmp_path / "made" / "sae_models" / "layer01_x2_k4"
    assert not (folder / "feature_annotations.json").exists()
    assert capsys.readouterr().out.splitlines()[-1].split()[-2:] == ["-", "-"]


def test_split_column_may_be_a_category(study_template, flags, tmp_path):
    cells = anndata.read_h5ad(study_template.cells)
    cells.obs["split"] = ["held_out" if row < 3 else "train" for row in range(cells.n_obs)]
    cells.obs["split"] = cells.obs["split"].astype("category")
    cells.write_h5ad(tmp_path / "cells.h5ad")
    changed = ["--data-path", str(tmp_path / "cells.h5ad"), "--split-column", "split", "--layers", "1", "--epochs", "1"]
    assert prepare_inputs.main([*flags, *changed]) == 0


def test_help_comes_without_torch():
    code = (
        "import sys, prepare_inputs\ntry: prepare_inputs.main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert "--gmt" in done.stdout and "example" in done.stdout


def test_masked_genes_are_shown_in_training_only(flags, monkeypatch):
    seen, counted = [], []
    counts = preparation_passes.GeneFeatureCounts
    real_rows, real_add = preparation_passes.collect_rows, counts.add_latents

    def rows(model, cells, *rest):
        seen.extend(cells)
        return real_rows(model, cells, *rest)

    def add(self, cell, *rest):
        counted.append(cell)
        real_add(self, cell, *rest)

    monkeypatch.setattr(preparation_passes, "collect_rows", rows)
    monkeypatch.setattr(counts, "add_latents", add)
    assert prepare_inputs.main([*flags, "--layers", "1", "--mask-share", "0.25"]) == 0
    for cell in seen:
        masked = np.flatnonzero(cell.tokens == 1)
        assert len(masked) == max(1, round(0.25 * len(cell.gene_positions))) and set(masked) <= set(cell.gene_positions)
    assert counted and not any((cell.tokens == 1).any() for cell in counted)


@pytest.mark.parametrize("flat", [False, True])
def test_saes_of_others_get_a_catalog_and_labels_and_stay_as_they_are(study, flags, gmt, capsys, flat):
    root = study.data_root / "sae_models"
    for folder in sorted(root.glob("layer*")):
        (folder / "feature_annotations.json").unlink()
        (folder / "feature_catalog.json").unlink()
        if flat:
            layer = int(folder.name[5:7])
            (folder / "sae_final.pt").rename(root / f"sae_layer{layer}.pt")
            (folder / "activation_mean.npy").rename(root / f"activation_mean_layer{layer}.npy")
    before = contents(study.data_root)
    command = [*flags, "--data-root", str(study.data_root), "--existing-saes", "--k", "32"]
    without_labels = [word for word in command if word != "--gmt" and not word.startswith("GO_BP=")]
    assert prepare_inputs.main(without_labels) == 0
    middle = contents(study.data_root)
    assert {name: middle[name] for name in before} == before and len(middle) == len(before) + 2
    assert prepare_inputs.main(command) == 0
    after = contents(study.data_root)
    assert {name: after[name] for name in middle} == middle and len(after) == len(before) + 4
    files = find_sae(study.data_root, 4)
    catalog, sae = read(files.catalog), open_sae(files)
    assert len(load_catalog(files.catalog, files.annotations, sae.n_features)) == sae.n_features
    assert catalog["summary"]["k"] == sae.k and catalog["summary"]["n_alive"] > 5
    assert prepare_inputs.main(command) == 0
    assert contents(study.data_root) == after
    files.annotations.write_text('{"feature_annotations": {}}')
    assert prepare_inputs.main(command) == 0
    assert files.annotations.read_text() == '{"feature_annotations": {}}'
    assert prepare_inputs.main([*command, "--relabel"]) == 0
    assert contents(study.data_root) == after
    assert prepare_inputs.main([*without_labels, "--relabel"]) == 2
    files.catalog.unlink()
    capsys.readouterr()
    assert prepare_inputs.main(command) == 2
    assert "labels without their catalog" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sae_final.pt", "activation_mean.npy", "feature_catalog.json"])
def test_a_file_that_is_gone_is_made_again(flags, tmp_path, name):
    assert prepare_inputs.main(flags) == 0
    before = contents(tmp_path / "made")
    (tmp_path / "made" / "sae_models" / "layer04_x2_k4" / name).unlink()
    assert prepare_inputs.main(flags) == 0
    after = contents(tmp_path / "made")
    assert {key: after[key] for key in before if "results" not in key} == {
        key: before[key] for key in before if "results" not in key
    }
