"""Every cell and gene that a run leaves out is counted with its reason in the summary of every experiment."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

import exhaustive_feature_tracing
import higher_order_ablation
import prepare_inputs
import selective_feature_tracing
import trajectory_analysis
import trajectory_steering
from cellcircuits.input_counts import inputs_entry, left_out_lines
from conftest import Study, write_study
from test_selective_tracing import term, write_layer

N_CELLS, N_GENES, DEPTH, MAX_GENES = 30, 60, 60, 20
SHALLOW, FOREIGN = 28, 29  # a cell with few counts, and one that expresses no gene of the dictionary
UNMEASURABLE = 7  # a gene whose median is so small that no rank value is finite


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The small study with something to leave out of every kind, and cells that change along their number."""
    study = write_study(tmp_path_factory.mktemp("study"))
    rng = np.random.default_rng(1)
    place = np.linspace(0, 1, N_CELLS)
    along = 20 * np.exp(-((place[:, None] - np.linspace(-0.2, 1.2, N_GENES)) ** 2) / 0.05)
    known = rng.poisson(0.3 + along)
    known[SHALLOW], known[FOREIGN] = rng.permutation(np.arange(N_GENES) < 20), 0
    again, unknown = rng.poisson(1.0, (N_CELLS, 1)), rng.poisson(2.0, (N_CELLS, 3)) + 1
    again[[SHALLOW, FOREIGN]], unknown[SHALLOW], unknown[FOREIGN] = 0, 0, 100
    cells = anndata.AnnData(sparse.csr_matrix(np.hstack([known, again, unknown]).astype(np.float32)))
    genes = [f"ENSG{i:011d}" for i in range(N_GENES)]
    cells.var_names = [*genes, f"{genes[3]}.2", "UNKNOWN1", "UNKNOWN2", "UNKNOWN3"]
    cells.obs_names = [f"cell{i}" for i in range(N_CELLS)]
    cells.obs["cell_type"] = ["hematopoietic stem cell" if i < 5 else "monocyte" for i in range(N_CELLS)]
    cells.obs["tissue_in_publication"] = "Blood"
    cells.obs["batch"] = ["b" if i == 6 else "a" for i in range(N_CELLS)]
    cells.write_h5ad(study.cells)
    medians = study.model / "geneformer" / "gene_median_dictionary_test.pkl"
    medians.write_bytes(pickle.dumps(pickle.loads(medians.read_bytes()) | {genes[UNMEASURABLE]: 1e-44}))
    (study.root / "pairs.txt").write_text("1:7,2:30\n")
    for layer in (1, 2):
        terms = {str(i): [term("GO_BP", "DNA repair" if i < 4 else "olfaction", 0.01)] for i in range(12)}
        write_layer(
            study.data_root / "sae_models" / f"layer{layer:02d}_x1_k4", dict.fromkeys(range(40), (0.1, 10)), terms, None
        )
    return study


def flags(study: Study, out_dir: Path) -> list[str]:
    return [
        "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
        "--min-median-tokens", "5", "--min-mapped", "0.1", "--max-tokens", str(MAX_GENES + 2), "--device", "cpu",
        "--downsample-to", str(DEPTH), "--obs-filter", "batch=a", "--seed", "7", "--out-dir", str(out_dir),
    ]  # fmt: skip


def expected(study: Study, **more: object) -> dict[str, object]:
    """What the summary must say but for the draw of the counts, from the file itself."""
    counts = np.asarray(anndata.read_h5ad(study.cells).X.todense())
    selected = np.delete(counts, 6, axis=0)
    assert (selected.sum(axis=1) < DEPTH).sum() == 1
    return {
        "n_rows_in_file": N_CELLS,
        "n_rows_matched": N_CELLS - 1,
        "n_rows_selected": N_CELLS - 1,
        "n_cells_used": N_CELLS - 3,
        "dropped_cells": {"fewer counts than --downsample-to": 1, "no expressed gene has a token": 1},
        "max_gene_tokens": MAX_GENES,
        "n_gene_columns": N_GENES + 4,
        "dropped_genes": {"no token in the model's dictionary": 3},
        "n_columns_summed_into_another": 1,
        "seeds": {"cells": 7, "downsampling": 7},
        **more,
    }


RUNS: dict[str, tuple[Callable, list[str], str]] = {
    "tracing": (
        exhaustive_feature_tracing.main,
        ["--cells", "all", "--source-layer", "1", "--downstream-layers", "2", "--end-idx", "4"],
        "exhaustive_summary.json",
    ),
    "several layers": (
        exhaustive_feature_tracing.main,
        ["--cells", "all", "--source-layer", "1,2", "--downstream-layers", "4", "--features", "1"],
        "layers_summary.json",
    ),
    "selective": (
        selective_feature_tracing.main,
        ["--cells", "all", "--source-layers", "1", "--downstream-layers", "2", "--n-features", "1"],
        "selective_summary.json",
    ),
    "pairs": (
        higher_order_ablation.main,
        ["--cells", "all", "--order", "2", "--target-layer", "5"],
        "summary.json",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_ablations(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    main, more, summary = RUNS[name]
    if name == "pairs":
        more = [*more, "--pairs", str(study.root / "pairs.txt")]
    assert main([*flags(study, tmp_path), *more]) == 0
    check(study, tmp_path / summary, capsys.readouterr().out)
    (tmp_path / summary).unlink()
    assert main([*flags(study, tmp_path), *more, "--analysis-only"]) == 0  # the manifest alone knows it too
    check(study, tmp_path / summary, capsys.readouterr().out)


def check(study: Study, path: Path, printed: str, **more: object) -> None:
    """Compare the `inputs` of a summary, and the line of the terminal, with what the file holds."""
    inputs = json.loads(path.read_text())["inputs"]
    wanted = expected(study, **more)
    assert {key: inputs[key] for key in wanted} == wanted
    assert 0 < inputs["share_of_counts_dropped"] < 0.5
    assert inputs["n_cells_truncated"] > 0 and inputs["n_gene_tokens_truncated"] >= inputs["n_cells_truncated"]
    assert 0 < inputs["dropped_genes_of_cells"]["rank value 0 or not finite"] < N_CELLS
    n_dropped, n_cut = sum(inputs["dropped_cells"].values()), inputs["n_cells_truncated"]
    assert inputs["n_rows_selected"] - n_dropped == inputs["n_cells_used"]
    (line,) = (line for line in printed.splitlines() if line.startswith("  left out: "))
    assert f"{inputs['n_cells_used']} of 29 cells used (1 fewer counts than --downsample-to, 1 no expressed" in line
    assert f"; {n_cut} cells cut to {MAX_GENES} genes (" in line
    assert f"; 3 of {N_GENES + 4} gene columns (" in line and "no token in the model's dictionary" in line
    assert "; 1 gene columns summed into another of the same gene; " in line and "rank value 0 or not finite" in line


def test_a_trajectory_and_steering(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "trajectory"
    assert trajectory_analysis.main([*flags(study, made), "--layers", "1"]) == 0
    seeds = {"cells": 7, "downsampling": 7, "scanpy": 0}
    check(study, made / "trajectory_summary.json", capsys.readouterr().out, seeds=seeds)
    metadata = json.loads((made / "cell_metadata.json").read_text())
    metadata["pseudotime"][4] = None
    (made / "cell_metadata.json").write_text(json.dumps(metadata))
    panel = study.root / "panel.json"
    panel.write_text(json.dumps([{"layer": 1, "idx": 7}]))
    steered = tmp_path / "steered"
    command = [*flags(study, steered), "--traj-dir", str(made), "--panel", str(panel)]
    dropped = {"fewer counts than --downsample-to": 1, "no expressed gene has a token": 1, "no pseudotime": 1}
    for more in ([], ["--analysis-only"]):
        assert trajectory_steering.main([*command, *more]) == 0
        out = capsys.readouterr().out
        check(study, steered / "summary.json", out, dropped_cells=dropped, n_cells_used=N_CELLS - 4)


def test_prepared_inputs(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = flags(study, tmp_path)[:-2]
    command[command.index("--data-root") + 1] = str(tmp_path / "made")
    size = ["--layers", "1", "--expansion", "1", "--k", "2", "--epochs", "1", "--batch-size", "32", "--sae-seed", "5"]
    assert prepare_inputs.main([*command, "--cells", "all", *size]) == 0
    path = tmp_path / "made" / "sae_models" / "layer01_x1_k2" / "results.json"
    check(study, path, capsys.readouterr().out, seeds={"cells": 7, "downsampling": 7, "sae": 5})


def test_the_seed_of_control_pairs_is_recorded(study: Study, tmp_path: Path) -> None:
    command = [*flags(study, tmp_path)[:-2], "--cells", "all"]
    selective, pairs = tmp_path / "selective", tmp_path / "pairs"
    layers = ["--source-layers", "1,2", "--downstream-layers", "4,5", "--n-features", "12"]
    assert selective_feature_tracing.main([*command, *layers, "--out-dir", str(selective)]) == 0
    chosen = ["--order", "2", "--selective-dir", str(selective), "--target-layer", "5", "--pairing-seed", "3"]
    assert higher_order_ablation.main([*command, *chosen, "--out-dir", str(pairs)]) == 0
    summary = json.loads((pairs / "summary.json").read_text())
    assert summary["inputs"]["seeds"] == {"cells": 7, "downsampling": 7, "pairing": 3}


REPORT = {
    "n_rows_in_file": 9, "n_rows_matched": 8, "n_rows_selected": 7, "n_cells": 7, "n_dropped_cells": {},
    "n_genes_in_file": 5, "n_genes_mapped": 5, "share_of_counts_mapped": 1.0, "n_columns_summed_into_another": 0,
    "n_cells_truncated": 0, "n_gene_tokens_truncated": 0, "max_gene_tokens": 100, "n_without_rank": 0,
}  # fmt: skip


def test_nothing_left_out_says_nothing() -> None:
    entry = inputs_entry([{"cells": {}}, {"cells": REPORT, "seeds": {"cells": 1}}])  # the last one counts
    assert entry["inputs"]["dropped_cells"] == entry["inputs"]["dropped_genes"] == {}
    assert list(left_out_lines(entry)) == list(left_out_lines({})) == []


@pytest.mark.parametrize(
    "origins",
    [None, [], [3], [{}], [{"cells": REPORT}], [{"cells": {**REPORT, "n_cells": "7"}, "seeds": {}}],
     [{"cells": {**REPORT, "share_of_counts_mapped": float("nan")}, "seeds": {}}],
     [{"cells": {**REPORT, "n_dropped_cells": [1]}, "seeds": {}}], [{"cells": REPORT, "seeds": 3}]],
)  # fmt: skip
def test_a_damaged_or_older_record_gives_no_entry(origins: object) -> None:
    assert inputs_entry(origins) == {}
