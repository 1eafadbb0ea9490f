"""analyse_graph.py end to end: a traced folder, bare tables, damaged tables, and nothing but degrees."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import spearmanr

import analyse_graph
import exhaustive_feature_tracing
from cellcircuits.degree_table import read_tables
from cellcircuits.graph_statistics import GraphSettings, graph_statistics
from cellcircuits.graph_store import EDGE_SCHEMA, FEATURE_SCHEMA
from conftest import write_study

QUICK = ["--p-precision", "0.1", "--n-bootstrap", "2"]


def write(path: Path, content: object) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def tables(tmp_path: Path) -> dict[str, Path]:
    """Degrees of 120 features; some lack a frequency, one frequency has no degree."""
    rng = np.random.default_rng(0)
    frequency = rng.uniform(0.001, 0.2, 120)
    degrees = rng.poisson(300 * frequency * rng.gamma(3, 1 / 3, 120))
    return {
        "degrees": write(tmp_path / "degrees.json", {str(i): int(degree) for i, degree in enumerate(degrees)}),
        "frequency": write(tmp_path / "frequency.json", {str(i + 5): share for i, share in enumerate(frequency)}),
        "annotated": write(tmp_path / "annotated.json", {str(i): bool(i % 3) for i in range(120)}),
    }


def run(tables: dict[str, Path], out_dir: Path, *more: str) -> int:
    flags = [word for name, path in tables.items() for word in (f"--{name}", str(path))]
    return analyse_graph.main([*flags, "--out-dir", str(out_dir), *QUICK, *more])


def statistics_of(folder: Path) -> dict:
    def refuse(token: str) -> None:
        raise AssertionError(token)

    return json.loads((folder / "graph_statistics.json").read_text(), parse_constant=refuse)


def test_bare_tables(tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tables, tmp_path / "out") == 0
    content = statistics_of(tmp_path / "out")
    assert content["features"] == {
        "n": 120,
        "n_without_frequency": 5,
        "n_frequency_without_degree": 5,
        "n_without_annotated": 0,
        "n_annotated_without_degree": 0,
    }
    assert content["settings"] == {"seed": 0, "p_precision": 0.1, "n_bootstrap": 2, "caliper": 0.1}
    assert content["drivers"]["n"] == 115
    assert content["annotation"]["n_annotated"] == 80
    assert (tmp_path / "out" / "graph_statistics.png").stat().st_size > 10_000
    tests = {entry["test"]: entry for entry in content["tests"]}
    assert tests.keys() == {
        "drivers.activation_freq.added_last",
        "annotation.top_20.fisher",
        "annotation.top_20.matched",
        "annotation.logistic_model.frequency_given_degree",
        "annotation.logistic_model.degree_given_frequency",
        "annotation.auc_of_degree",
    }
    by_p = sorted(tests.values(), key=lambda entry: entry["p"])
    assert by_p[0]["p_holm"] == pytest.approx(min(1, 6 * by_p[0]["p"]))
    assert by_p[-1]["q_bh"] == pytest.approx(by_p[-1]["p"])
    said = capsys.readouterr().out
    assert "120 features" in said
    assert "it says nothing of the other" in said or "No power law" in said


def test_a_check_computes_nothing(tables: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tables, tmp_path / "out", "--check") == 0
    assert "120 degrees" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_the_order_of_the_tables_does_not_matter(tables: dict[str, Path], tmp_path: Path) -> None:
    backwards = [
        write(tmp_path / f"backwards_{name}.json", dict(reversed(json.loads(path.read_text()).items())))
        for name, path in tables.items()
    ]
    settings = GraphSettings(p_precision=0.1, n_bootstrap=2)
    one, two = (graph_statistics(read_tables(*paths), settings) for paths in (tables.values(), backwards))
    assert two.pop("of") == "backwards_degrees.json"
    assert two == {name: part for name, part in one.items() if name != "of"}


@pytest.mark.parametrize(
    "degrees",
    [{"7": 3}, {"7": 0, "8": 0}, {str(i): 0 for i in range(80)}, {str(i): 5 for i in range(80)}],
    ids=["one feature", "two without edges", "no edges", "all equal"],
)
def test_degrees_alone_however_plain(degrees: dict[str, int], tmp_path: Path) -> None:
    path = write(tmp_path / "degrees.json", degrees)
    assert run({"degrees": path}, tmp_path / "out") == 0
    content = statistics_of(tmp_path / "out")
    for part in ("tail", "distribution", "drivers", "annotation"):
        assert content[part]["result"] is None
        assert content[part]["reason"]
    assert content["tests"] == []
    assert (tmp_path / "out" / "graph_statistics.png").is_file()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("degrees", [1, 2], "is not a table"),
        ("degrees", {}, "holds no feature"),
        ("degrees", {"L5/F3": 4}, "is not a feature index"),
        ("degrees", {"03": 4}, "is not a feature index"),
        ("degrees", {"-3": 4}, "is not a feature index"),
        ("degrees", {"9" * 5000: 4}, "is not a feature index"),
        ("degrees", {"3": -1}, "feature 3 must have an integer of at least 0"),
        ("degrees", {"3": 1.5}, "feature 3 must have an integer of at least 0"),
        ("degrees", {"3": True}, "feature 3 must have an integer of at least 0"),
        ("degrees", {"3": 10**12}, "feature 3 must have an integer of at least 0"),
        ("frequency", {"3": 0}, "feature 3 must have a share above 0"),
        ("frequency", {"3": 1.2}, "feature 3 must have a share above 0"),
        ("frequency", {"3": float("nan")}, "feature 3 must have a share above 0"),
        ("frequency", {"3": None}, "feature 3 must have a share above 0"),
        ("annotated", {"3": "yes"}, "feature 3 must have true, false, 1 or 0"),
        ("annotated", {"3": 2}, "feature 3 must have true, false, 1 or 0"),
    ],
)
def test_bad_tables(
    tables: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    content: object,
    said: str,
) -> None:
    write(tables[name], content)
    assert run(tables, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "name either"),
        (["--degrees", "a.json", "--trace-dir", "b"], "name either"),
        (["--degrees", "a.json"], "--out-dir is missing"),
        (["--trace-dir", "b", "--frequency", "a.json"], "belong to --degrees"),
        (["--degrees", "a.json", "--out-dir", "o", "--min-active-cells", "8"], "belong to --trace-dir"),
        (["--degrees", "a.json", "--out-dir", "o", "--p-precision", "0.6"], "--p-precision must be"),
        (["--degrees", "a.json", "--out-dir", "o", "--seed", "-1"], "--seed must be"),
        (["--degrees", "missing.json", "--out-dir", "o"], "no such file"),
        (["--trace-dir", "missing"], "holds no run"),
    ],
)
def test_flags_that_do_not_fit(
    flags: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert analyse_graph.main(flags) == 2
    assert said in capsys.readouterr().err


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A traced folder as the tracing script leaves it: manifest, features of two layers, edges."""
    folder = tmp_path / "trace"
    folder.mkdir()
    settings = {"experiment": "exhaustive_feature_tracing", "source_layer": 1, "downstream_layers": [2]}
    write(folder / "manifest.json", {"settings": settings})
    rng = np.random.default_rng(0)
    degrees = rng.poisson(rng.gamma(2, 8, 90))
    rows = [
        {
            "layer": layer,
            "feature": i,
            "label": "Cell cycle" if i % 2 else "unannotated",
            "activation_freq": None if i == 4 else float(rng.uniform(0.001, 0.2)),
            "is_traced": layer == 1,
            "n_cells_active": i % 20 if layer == 1 else None,
            "n_edges": int(degrees[i]) if layer == 1 else None,
            "degree_calibrated": int(degrees[i]) // 2 if layer == 1 and i % 20 >= 8 else None,
            "top_genes": ["GENE"],
        }
        for layer in (1, 2)
        for i in range(90)
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=FEATURE_SCHEMA), folder / "features.parquet")
    edge = dict.fromkeys(EDGE_SCHEMA.names, 0) | {"is_calibrated": False} | {"source_layer": 1, "target_layer": 2}
    edges = [edge | {"source": i, "target": target} for i in range(90) for target in range(degrees[i])]
    pq.write_table(pa.Table.from_pylist(edges, schema=EDGE_SCHEMA), folder / "edges.parquet")
    return folder


def test_live_targets_and_dose_of_a_trace_drive_the_degrees(tmp_path: Path) -> None:
    """From the model to the statistics: every predictor has a value for every feature that is active."""
    study, out_dir = write_study(tmp_path / "study", n_features=240), tmp_path / "out"
    (path,) = (study.data_root / "sae_models").glob("layer01*/feature_catalog.json")
    content, rng = json.loads(path.read_text()), np.random.default_rng(0)
    for feature in content["features"]:
        feature["activation_freq"] = rng.uniform(0.001, 0.2)
    write(path, content)
    assert (
        exhaustive_feature_tracing.main([*study.flags(out_dir), "--downstream-layers", "2", "--sign-flips", "50"]) == 0
    )
    assert analyse_graph.main(["--trace-dir", str(out_dir), *QUICK]) == 0
    drivers = statistics_of(out_dir)["drivers"]
    traced = [row for row in pq.read_table(out_dir / "features.parquet").to_pylist() if row["is_traced"]]
    active = [row for row in traced if row["n_cells_active"]]
    assert drivers["predictors"] == ["activation_freq", "n_live_targets", "ablated_norm"]
    assert drivers["n"] == sum(row["n_live_targets"] > 0 and row["ablated_norm"] > 0 for row in active) >= 50
    correlation = drivers["result"]["rank_correlations"]["ablated_norm"]["spearman"]
    known = [row for row in active if row["n_live_targets"] and row["ablated_norm"]]
    expected = spearmanr([row["ablated_norm"] for row in known], [row["n_edges"] for row in known])
    assert correlation["rho"] == pytest.approx(expected.statistic, abs=1e-9)
    assert drivers["result"]["model"]["terms"].keys() >= {"n_live_targets", "ablated_norm"}


def test_a_traced_folder(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert analyse_graph.main(["--trace-dir", str(trace), *QUICK]) == 0
    content = statistics_of(trace)
    edges = pq.read_table(trace / "edges.parquet")
    assert content["degree"]["total_edges"] == edges.num_rows
    assert content["features"]["n"] == 90
    assert content["features"]["n_without_frequency"] == 1
    assert content["features"]["n_active_in_no_cell"] == 5
    assert content["annotation"]["n_annotated"] == 45
    assert content["drivers"]["n"] == 89
    assert "Layer 1: 90 features" in capsys.readouterr().out


def test_features_active_in_few_cells_can_be_left_out(trace: Path, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    flags = ["--trace-dir", str(trace), "--min-active-cells", "8", "--out-dir", str(out_dir), *QUICK]
    assert analyse_graph.main(flags) == 0
    content = statistics_of(out_dir)
    assert content["features"]["n_in_fewer_cells"] == 40
    assert content["features"]["n"] == 50
    assert not (trace / "graph_statistics.json").exists()


def test_tables_that_disagree_are_refused(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edges = pq.read_table(trace / "edges.parquet")
    pq.write_table(edges.slice(1), trace / "edges.parquet")
    assert analyse_graph.main(["--trace-dir", str(trace), *QUICK]) == 2
    assert "features.parquet and edges.parquet disagree" in capsys.readouterr().err


def test_calibrated_degrees_of_features_that_have_them(trace: Path) -> None:
    assert analyse_graph.main(["--trace-dir", str(trace), "--degree", "calibrated", *QUICK]) == 0
    rows = pq.read_table(trace / "features.parquet").to_pylist()
    expected = [row["degree_calibrated"] for row in rows if row["degree_calibrated"] is not None]
    content = statistics_of(trace)
    assert (content["features"]["n"], content["degree"]["total_edges"]) == (len(expected), sum(expected))


def test_without_any_calibrated_degree_it_says_what_would_give_one(trace: Path, capsys: pytest.CaptureFixture[str]):
    features = pq.read_table(trace / "features.parquet")
    none = pa.nulls(len(features), pa.int32())
    at = features.schema.get_field_index("degree_calibrated")
    pq.write_table(features.set_column(at, FEATURE_SCHEMA.field(at), none), trace / "features.parquet")
    assert analyse_graph.main(["--trace-dir", str(trace), "--degree", "calibrated", *QUICK]) == 2
    said = capsys.readouterr().err
    assert "none is active in enough cells" in said and "--degree raw" in said and said.count("\n") == 1
