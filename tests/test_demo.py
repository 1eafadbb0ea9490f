"""The committed demo folder is whole, consistent and good enough, and build_demo.py answers a user's mistakes."""

import json
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from cellcircuits.catalog import MIN_ACTIVATION_FREQ
from cellcircuits.gene_sets import read_gmt
from cellcircuits.geneformer import load_model
from cellcircuits.inputs import LayerSAE, open_saes
from cellcircuits.vocabulary import load_vocabulary

DEMO = Path(__file__).parents[1] / "demo"
LAYERS = (0, 5, 6, 11, 17)
QUALITY = json.loads((DEMO / "quality.json").read_text())


@pytest.fixture
def build_demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DEMO)
    monkeypatch.delitem(sys.modules, "build_demo", raising=False)
    return import_module("build_demo")


class TestBuildDemo:
    def test_help_names_every_step(self, build_demo: ModuleType, capsys: pytest.CaptureFixture[str]):
        with pytest.raises(SystemExit, match="0"):
            build_demo.main(["--help"])
        text = capsys.readouterr().out
        assert all(f"\n  {step} " in text for step in build_demo.STEPS) and "examples:" in text

    @pytest.mark.parametrize("steps, named", [("cells,modle", "modle"), ("", "(none)")])
    def test_an_unknown_step_is_named(self, build_demo: ModuleType, capsys, steps: str, named: str):
        with pytest.raises(SystemExit, match="2"):
            build_demo.main(["--steps", steps])
        assert f"unknown step {named}; choose from cells, dictionaries" in capsys.readouterr().err

    def test_steps_are_done_in_their_order(self, build_demo: ModuleType):
        assert build_demo.build_parser().parse_args(["--steps", "map, cells,saes"]).steps == ["cells", "saes", "map"]

    @pytest.mark.parametrize(
        "flags, words",
        [
            (["--steps", "saes"], "run the step `model` first (--steps model)"),
            (["--sources", "absent"], "absent: no such folder"),
        ],
    )
    def test_a_mistake_gives_one_sentence_and_no_file(self, build_demo: ModuleType, tmp_path, capsys, flags, words):
        assert build_demo.main([*flags, "--out-dir", str(tmp_path), "--cache", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert words in error and "Traceback" not in error
        assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def saes() -> dict[int, LayerSAE]:
    """Every SAE that the demo has, checked against the demo's model as a run would."""
    return open_saes(DEMO, LAYERS, None, load_model(str(DEMO / "model")))


class TestCommittedFiles:
    @pytest.mark.parametrize("layer", LAYERS)
    def test_each_sae_has_its_catalog_and_labels(self, saes: dict[int, LayerSAE], layer: int):
        opened = saes[layer]
        assert opened.catalog is not None and opened.sae.input_mean.any()
        # the catalog leaves out no feature that an experiment could ask for
        assert list(opened.catalog) == list(range(opened.sae.n_features))
        assert any(info.label != "unannotated" for info in opened.catalog.values())
        assert sum(bool(info.top_genes) for info in opened.catalog.values()) >= 0.95 * opened.sae.n_features
        kept = json.loads((opened.files.checkpoint.parent / "results.json").read_text())["quality"]
        measured = QUALITY["saes"][f"L{layer}"]
        assert {key: kept[key] for key in measured if key in kept} == {k: v for k, v in measured.items() if k in kept}

    def test_the_traced_features_are_those_of_the_catalog(self, saes: dict[int, LayerSAE]):
        frequencies = [info.activation_freq for info in saes[5].catalog.values()]
        assert sum(freq >= MIN_ACTIVATION_FREQ for freq in frequencies) == QUALITY["map"]["n_features"]

    def test_cells_genes_and_sets_are_those_that_were_measured(self):
        vocabulary = load_vocabulary(
            [DEMO / "model"], json.loads((DEMO / "model/config.json").read_text())["vocab_size"]
        )
        assert vocabulary.n_tokens == QUALITY["dictionaries"]["n_tokens"]
        assert len(read_gmt(DEMO / "gene_sets/go_bp.gmt", "GO_BP").genes_of) == QUALITY["gene_sets"]["n_terms"]
        for name, path in {
            "cells": "cells.h5ad",
            "model": "model/model.safetensors",
            "gene_sets": "gene_sets/go_bp.gmt",
        }.items():
            assert (DEMO / path).stat().st_size == QUALITY[name]["bytes"]

    def test_the_folder_is_small(self):
        skipped = (".cache", ".fresh", "__pycache__")
        files = [path for path in DEMO.rglob("*") if path.is_file() and not set(path.parts) & set(skipped)]
        assert sum(path.stat().st_size for path in files) <= 30e6


class TestQuality:
    """The figures that the demo has to reach for its map to mean something."""

    def test_the_model_uses_its_context(self):
        assert QUALITY["quality"]["gain_over_best_baseline"] >= 0.1
        assert QUALITY["quality"]["gain_from_own_context"] >= 0.25

    @pytest.mark.parametrize("layer", LAYERS)
    def test_each_sae_reconstructs(self, layer: int):
        measured = QUALITY["saes"][f"L{layer}"]
        assert measured["fvu_over_pca"] <= 0.7 and measured["alive"] >= 0.5
        assert measured["loss_recovered_from_mean_ablated"] >= 0.8
        assert measured["loss_recovered_from_zero_ablated"] >= 0.8

    def test_the_map_is_more_than_noise(self):
        measured = QUALITY["map"]
        assert set(measured["layers"]) == {"6", "11", "17"}
        assert all(of_layer["ratio"] >= 4 for of_layer in measured["layers"].values())
        assert measured["n_features"] >= 200 and measured["n_cells"] == 20 and measured["min_tokens"] >= 256
