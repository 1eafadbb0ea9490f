"""What is damaged in an output folder or does not belong there: made again, left alone or one sentence; not counted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

import exhaustive_feature_tracing
import higher_order_ablation
import trajectory_analysis
import trajectory_steering
from conftest import Study
from test_higher_order_script import timeless
from test_steering_script import write_trajectory_study

CELLS = ["--cells", "all", "--n-cells", "8"]


@dataclass(frozen=True)
class Finished:
    """A finished run of an experiment that no test may change, and how to run it again into another folder."""

    folder: Path
    run: Callable[[Path], int]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return write_trajectory_study(tmp_path_factory.mktemp("study"))


def command(experiment: str, study: Study) -> Callable[[Path], int]:
    inputs = [
        "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
        "--min-median-tokens", "5", "--device", "cpu",
    ]  # fmt: skip
    (study.root / "pairs.txt").write_text("1:7,2:30\n1:0,4:5\n")
    main, flags = {
        "tracing": (exhaustive_feature_tracing.main, [*CELLS, "--source-layer", "1", "--downstream-layers", "2,5",
            "--end-idx", "5"]),
        "pairs": (higher_order_ablation.main, [*CELLS, "--order", "2", "--pairs", str(study.root / "pairs.txt"),
            "--target-layer", "5", "--save-effects"]),
        "trajectory": (trajectory_analysis.main, ["--traj-dir", str(study.root), "--layers", "1"]),
        "steering": (trajectory_steering.main, ["--traj-dir", str(study.root),
            "--panel", str(study.root / "panel.json")]),
    }[experiment]  # fmt: skip
    return lambda out_dir: main([*inputs, *flags, "--out-dir", str(out_dir)])


@pytest.fixture(scope="module")
def finished(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Finished]:
    made: dict[str, Finished] = {}

    def get(experiment: str) -> Finished:
        if experiment not in made:
            folder = tmp_path_factory.mktemp("finished") / "out"
            run = command(experiment, study)
            assert run(folder) == 0
            made[experiment] = Finished(folder, run)
        return made[experiment]

    return get


def content(out_dir: Path) -> dict[str, object]:
    """Every file of a folder; of JSON what does not tell times, of shards nothing, as they do."""
    found: dict[str, object] = {}
    for path in sorted(out_dir.rglob("*")):
        name = str(path.relative_to(out_dir))
        if path.is_symlink() or path.is_dir():
            found[name] = path.is_symlink()
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        else:
            found[name] = None if path.parent.name == "blocks" else path.read_bytes()
    return found


def loop(path: Path) -> None:
    path.symlink_to(path)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def garbage(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 or PAR1 or {\xff" * 9)


RESULT_FILES = [
    ("tracing", "feature_0001.json"), ("tracing", "blocks/block_00000.parquet"), ("tracing", "edges.parquet"),
    ("tracing", "features.parquet"), ("tracing", "exhaustive_summary.json"), ("tracing", "progress.json"),
    ("tracing", "blocks"),
    ("pairs", "pair_L1_F7_x_L2_F30.json"), ("pairs", "effects/L1_F7_x_L2_F30.npz"), ("pairs", "summary.json"),
    ("pairs", "effects"),
    ("steering", "steering_F0_L1.json"), ("steering", "state_signatures.npz"), ("steering", "summary.json"),
    ("trajectory", "sae_activations.npz"), ("trajectory", "cell_metadata.json"),
]  # fmt: skip


@pytest.mark.parametrize("damage", [empty, garbage, loop, Path.mkdir], ids=["empty", "garbage", "loop", "folder"])
@pytest.mark.parametrize("experiment, name", RESULT_FILES)
def test_something_else_in_the_place_of_a_result(
    finished: Callable[[str], Finished], tmp_path: Path, capsys, experiment: str, name: str, damage
):
    reference = finished(experiment)
    out_dir = shutil.copytree(reference.folder, tmp_path / "out")
    path = out_dir / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    damage(path)
    capsys.readouterr()
    status = reference.run(out_dir)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    there, expected = content(out_dir), content(reference.folder)
    if status == 0:
        assert there == expected
    else:  # something that a rename does not replace stays, and is named
        assert status == 2
        (sentence,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert str(path) in sentence
        assert is_kept(path, damage)
        others = [other for other in expected if not other.startswith(name) and other not in MADE_FROM_OTHERS]
        assert {other: there[other] for other in others} == {other: expected[other] for other in others}
    # a damaged file is always made again; only what cannot be replaced may stop a run
    assert status == 0 or damage is Path.mkdir or name in ("blocks", "effects")


def is_kept(path: Path, damage) -> bool:
    return path.is_dir() if damage is Path.mkdir else path.is_symlink() if damage is loop else path.is_file()


MADE_FROM_OTHERS = (
    "progress.json", "summary.json", "exhaustive_summary.json", "calibration.json", "trajectory_summary.json",
    "edges.parquet", "features.parquet",
)  # fmt: skip
STRANGERS = [
    ("tracing", "feature_9999.json", b'{"feature_idx": 9999, "total_significant_edges": 7}'),
    ("tracing", "blocks/block_notes.parquet", b"mine"),
    ("tracing", "blocks/block_00160.parquet", b""),
    ("tracing", "notes.txt", b"mine"),
    ("pairs", "pair_L1_F1_x_L2_F2.json", b"{}"),
    ("pairs", "partial/L1_F7_x_L2_F30.npz", b""),
    ("steering", "steering_F9_L9.json", b"[]"),
    ("steering", "partial/unfinished.npz", b"PK\x03\x04"),
    ("trajectory", "partial/notes.txt", b"mine"),
]


@pytest.mark.parametrize("experiment, name, stranger", STRANGERS)
def test_what_others_left_is_not_counted(
    finished: Callable[[str], Finished], tmp_path: Path, experiment: str, name: str, stranger: bytes
):
    reference = finished(experiment)
    out_dir = shutil.copytree(reference.folder, tmp_path / "out")
    (out_dir / name).parent.mkdir(exist_ok=True)
    (out_dir / name).write_bytes(stranger)
    assert reference.run(out_dir) == 0
    path = out_dir / name
    if path.exists():  # a partial is the run's own, and removed
        assert path.read_bytes() == stranger
        path.unlink()
    if not (reference.folder / path.parent.name).exists() and path.parent != out_dir:
        path.parent.rmdir()
    assert content(out_dir) == content(reference.folder)


@pytest.mark.parametrize("kind", [Path.mkdir, Path.touch, loop])
@pytest.mark.parametrize("experiment, name", [
    ("tracing", "blocks/block_00000.partial.npz"), ("pairs", "partial/L1_F7_x_L2_F30.npz"),
    ("trajectory", "partial/rows_0000000.npz"), ("steering", "partial/unfinished.npz"),
])  # fmt: skip
def test_something_else_in_the_place_of_unfinished_work(
    finished: Callable[[str], Finished], tmp_path: Path, capsys, experiment: str, name: str, kind
):
    """It is no reason to stop where nothing needs to be saved, which takes minutes."""
    reference = finished(experiment)
    out_dir = shutil.copytree(reference.folder, tmp_path / "out")
    for pattern in ("blocks/*", "feature_*.json", "pair_*.json", "steering_*.json", "sae_activations.npz"):
        for path in out_dir.glob(pattern):
            path.unlink()
    path = out_dir / name
    path.parent.mkdir(exist_ok=True)
    kind(path)
    status = reference.run(out_dir)
    error = capsys.readouterr().err
    if status:
        (sentence,) = [line for line in error.splitlines() if line.startswith("error: ")]
        assert status == 2 and kind is Path.mkdir and experiment == "steering" and str(path) in sentence
        return
    for leftover in (path, path.parent):
        if leftover.is_dir() and not (reference.folder / leftover.relative_to(out_dir)).exists():
            leftover.rmdir()
    assert content(out_dir) == content(reference.folder)


def test_an_output_folder_that_is_a_loop(study: Study, tmp_path: Path, capsys):
    loop(tmp_path / "out")
    assert command("tracing", study)(tmp_path / "out") == 2
    assert f"error: {tmp_path / 'out'}: cannot be written" in capsys.readouterr().err
