"""What is kept of the experiments' folders, and edges by target layer against plain loops."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import collect_results
from cellcircuits.attenuation import edge_counts, edges_by_layer, resampled_means
from cellcircuits.collected import ALSO, NEEDED, collect
from cellcircuits.errors import UserError
from cellcircuits.graph_store import EDGE_SCHEMA, FEATURE_SCHEMA
from cellcircuits.manifest import MANIFEST

NAME = "planted model"
TARGETS = [2, 4, 5]
N_EDGES = {0: (3, 2, 0), 1: (1, 1, 1), 2: (0, 0, 0), 7: (4, 0, 2)}  # feature: edges to each target layer


def write_trace(folder: Path, layer: int = 1) -> None:
    """The tables of a trace with the planted edges; every second edge is calibrated."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"experiment": "exhaustive_feature_tracing", "source_layer": layer, "downstream_layers": TARGETS}
    (folder / MANIFEST).write_text(json.dumps({"settings": settings, "provenance": []}))
    rows = [
        (feature, target, i)
        for feature, counts in N_EDGES.items()
        for target, n in zip(TARGETS, counts, strict=True)
        for i in range(n)
    ]
    edges = {name: [None] * len(rows) for name in EDGE_SCHEMA.names} | {
        "source": [row[0] for row in rows],
        "target_layer": [row[1] for row in rows],
        "target": [row[2] for row in rows],
        "cohens_d": [(-1.0) ** i * (0.6 + 0.1 * i) for i in range(len(rows))],
        "is_calibrated": [i % 2 == 0 for i in range(len(rows))],
    }
    pq.write_table(pa.table(edges, schema=EDGE_SCHEMA), folder / "edges.parquet")
    features = {name: [None] * (len(N_EDGES) + 1) for name in FEATURE_SCHEMA.names} | {
        "feature": [*N_EDGES, 9],
        "n_edges": [*map(sum, N_EDGES.values()), None],
        "is_traced": [True] * len(N_EDGES) + [False],
    }
    pq.write_table(pa.table(features, schema=FEATURE_SCHEMA), folder / "features.parquet")


def write_runs(runs: Path) -> None:
    """Folders of all experiments; their JSON is small but real JSON."""
    for folder, names in [*NEEDED.items(), *ALSO.items()]:
        (runs / folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            path = runs / folder / name.replace("*", "1")
            if path.suffix == ".json":
                path.write_text(json.dumps({"of": folder}))
            elif path.suffix == ".npz":
                np.savez(path, early=np.arange(3.0))
    write_trace(runs / "exhaustive_tracing")
    for layer in (0, 1):
        write_trace(runs / f"selective_tracing/layer{layer:02d}", layer)
    (runs / "exhaustive_tracing/feature_0001.json").write_text("{}")


def tree(folder: Path) -> dict[Path, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


class TestEdgesByLayer:
    def test_counts_are_those_of_a_loop(self):
        rng = np.random.default_rng(0)
        features = rng.permutation(30)[:20]
        sources, layers = rng.choice(features, 200), rng.choice(TARGETS, 200)
        slow = [
            [sum(1 for s, t in zip(sources, layers, strict=True) if (s, t) == (f, x)) for x in TARGETS]
            for f in features
        ]
        assert (edge_counts(sources, layers, features, TARGETS) == slow).all()

    def test_resampled_means_keep_the_layers_of_a_feature_together(self):
        counts = np.array([[1.0, 2.0], [3.0, 6.0], [5.0, 10.0]])
        means = resampled_means(counts, np.random.default_rng(0))
        assert np.allclose(means[:, 1], 2 * means[:, 0])
        assert means[:, 0].mean() == pytest.approx(3, abs=0.1)
        assert means[:, 0].std() == pytest.approx(np.std([1, 3, 5]) / 3**0.5, abs=0.05)

    def test_a_folder_is_described(self, tmp_path: Path):
        write_trace(tmp_path)
        found = edges_by_layer(tmp_path)
        assert (found["source_layer"], found["n_features"]) == (1, 4)
        totals = np.sum(list(N_EDGES.values()), axis=0)
        assert [of["n_edges"] for of in found["layers"]] == totals.tolist()
        assert [of["edges_mean"] for of in found["layers"]] == pytest.approx((totals / 4).tolist())
        assert sum(of["n_calibrated"] for of in found["layers"]) == 7
        assert found["last_over_first"] == pytest.approx(totals[2] / totals[0])
        assert found["last_over_first_low"] <= found["last_over_first"] <= found["last_over_first_high"]
        assert found == edges_by_layer(tmp_path)

    def test_tables_that_disagree_are_refused(self, tmp_path: Path):
        write_trace(tmp_path)
        table = pq.read_table(tmp_path / "features.parquet")
        pq.write_table(table.slice(1), tmp_path / "features.parquet")
        with pytest.raises(UserError, match="disagree"):
            edges_by_layer(tmp_path)


class TestCollect:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> Path:
        write_runs(tmp_path / "runs")
        return tmp_path / "runs"

    def test_every_file_says_which_inputs_it_is_of(self, runs: Path, tmp_path: Path):
        out = tmp_path / "out"
        names = collect(runs, out, NAME)
        assert set(names) == set(tree(out))
        assert Path("exhaustive_tracing/feature_0001.json") not in names
        for name in names:
            if name.suffix == ".json":
                assert next(iter(json.loads((out / name).read_text()).items())) == ("inputs_name", NAME)
            elif name.suffix == ".npz":
                with np.load(out / name) as kept:
                    assert kept["inputs_name"].item() == NAME and (kept["early"] == [0, 1, 2]).all()
            else:
                kept = pq.read_table(out / name)
                assert kept.schema.metadata[b"inputs_name"].decode() == NAME
                assert kept.equals(pq.read_table(runs / name))

    def test_the_bytes_are_the_same_every_time_and_stale_files_go(self, runs: Path, tmp_path: Path):
        collect(runs, tmp_path / "one", NAME)
        stale = tmp_path / "one/higher_order_ablation/triplet_of_another_run.json"
        stale.write_text("{}")
        foreign = tmp_path / "one/higher_order_ablation/notes.txt"
        foreign.write_text("mine")
        collect(runs, tmp_path / "one", NAME)
        collect(runs, tmp_path / "two", NAME)
        assert not stale.exists() and foreign.exists()
        foreign.unlink()
        assert tree(tmp_path / "one") == tree(tmp_path / "two")

    def test_analyses_that_were_not_run_are_left_out(self, runs: Path, tmp_path: Path):
        for name in ("specificity", "controlled_steering"):
            for path in (runs / name).iterdir():
                path.unlink()
        names = collect(runs, tmp_path / "out", NAME)
        assert not {"specificity", "controlled_steering"} & {name.parts[0] for name in names}

    def test_a_run_of_its_own_is_not_overwritten(self, runs: Path, tmp_path: Path):
        with pytest.raises(UserError, match="holds a run of its own"):
            collect(runs, runs, NAME)

    @pytest.mark.parametrize(
        "name, content, words",
        [
            ("higher_order_ablation/summary.json", None, "no such file"),
            ("higher_order_ablation/summary.json", b"[]", "is not a JSON object"),
            ("trajectory_steering/state_signatures.npz", b"PK", "damaged"),
            ("exhaustive_tracing/features.parquet", b"PAR1", "damaged"),
        ],
    )
    def test_a_missing_or_damaged_file_is_named(self, runs: Path, tmp_path: Path, name, content, words, capsys):
        (runs / name).unlink()
        if content is not None:
            (runs / name).write_bytes(content)
        flags = ["--runs", str(runs), "--name", NAME, "--out-dir", str(tmp_path / "out")]
        assert collect_results.main(flags) == 2
        error = capsys.readouterr().err
        assert Path(name).name in error and words in error and "Traceback" not in error

    def test_the_script_adds_a_readme(self, runs: Path, tmp_path: Path, capsys):
        out = tmp_path / "out"
        flags = ["--runs", str(runs), "--name", NAME, "--out-dir", str(out)]
        assert collect_results.main([*flags, "--check"]) == 0 and not out.exists()
        assert "files to copy" in capsys.readouterr().out
        assert collect_results.main(flags) == 0
        assert NAME in (out / "README.md").read_text() and "Kept:" in capsys.readouterr().out
        assert collect_results.main(["--runs", str(runs), "--name", " ", "--out-dir", str(out)]) == 2
