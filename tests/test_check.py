"""`--check` of every script: the numbers are those of the run that follows, nothing is written, mistakes end in 2."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import exhaustive_feature_tracing
import higher_order_ablation
import look_up_feature
import make_figures
import prepare_inputs
import selective_feature_tracing
import trajectory_analysis
import trajectory_steering
from cellcircuits import plan_report, probe
from cellcircuits.combinations import LETTERS
from cellcircuits.effects import Bench
from cellcircuits.plan_report import Plan, Work
from conftest import Study
from test_higher_order_script import flags as combination_flags
from test_selective_tracing import annotate
from test_selective_tracing import flags as selective_flags
from test_steering_script import PANEL, write_trajectory_study
from test_tracing_script import refusal

Main = Callable[[Sequence[str]], int]
TRAJECTORY = ("--root-cell-type", "macrophage", "--min-median-tokens", "5", "--device", "cpu")


@pytest.fixture(autouse=True)
def patient_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The inputs are tiny: everything is counted and timed, however slow the machine is."""
    monkeypatch.setattr(probe, "PROBE_SECONDS", 1e6)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that are printed."""
    printed, real = [], plan_report.show

    def show(plan: Plan, command: str) -> int:
        printed.append(plan)
        return real(plan, command)

    monkeypatch.setattr(plan_report, "show", show)
    return printed


@pytest.fixture(scope="module")
def trajectory_study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Inputs that no test may change."""
    return write_trajectory_study(tmp_path_factory.mktemp("trajectory"))


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Everything below some folders, with sizes and times."""
    found = [path for folder in folders for path in (folder, *folder.rglob("*")) if path.exists()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in found}


def check(main: Main, flags: Sequence[str], *folders: Path) -> None:
    """Run `--check`, which must leave the folders as they are."""
    before = listing(*folders)
    assert main([*flags, "--check"]) == 0
    assert listing(*folders) == before


def work(plan: Plan, name: str) -> Work:
    (found,) = [work for work in plan.works if work.name.startswith(name)]
    return found


def require_plausible(plan: Plan) -> None:
    """Every estimate is a positive number, and none is out of its range."""
    total = plan.seconds
    for seconds in (total, *(work.seconds for work in plan.works if work.n)):
        assert 0 < seconds.low < seconds.best < seconds.high < math.inf
    assert 1e8 < plan.host_bytes < 1e11
    assert 0 <= plan.disk.at_least <= plan.disk.at_most < 1e9 and 0 < plan.disk.about <= plan.disk.at_most
    assert 0 < plan.flops < 1e14


def records(out_dir: Path, pattern: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(out_dir.rglob(pattern))]


class TestTracing:
    def test_the_numbers_are_those_of_the_run(self, study_template: Study, tmp_path: Path, plans: list[Plan], capsys):
        out_dir = tmp_path / "new" / "out"
        flags = study_template.flags(out_dir)
        check(exhaustive_feature_tracing.main, flags, tmp_path, study_template.root)
        assert not out_dir.parent.exists()
        (plan,) = plans
        require_plausible(plan)
        printed = capsys.readouterr().out
        assert "39 of layer 1, to layers 2, 4, 5; 0 are there" in printed and "12 used, none dropped" in printed
        assert "6 blocks, width 24, 48 positions" in printed
        assert "layers 1, 2, 4, 5: 40 features, k 4, catalog, labels" in printed
        (command,) = re.findall(r"start with +(.*)", printed)
        assert shlex.split(command)[2:] == flags

        assert exhaustive_feature_tracing.main(flags) == 0
        n_pairs = sum(record["n_cells_active"] for record in records(out_dir, "feature_*.json"))
        assert work(plan, "ablated passes").n == n_pairs
        assert f"{n_pairs} of 468 (feature, cell), counted in all 12 cells" in printed
        assert work(plan, "clean passes").n == 12
        size = sum(path.stat().st_size for path in out_dir.rglob("*"))
        assert plan.disk.at_least / 3 < size < 3 * plan.disk.at_most

        check(exhaustive_feature_tracing.main, flags, out_dir)
        assert "39 of layer 1, to layers 2, 4, 5; 39 are there" in capsys.readouterr().out
        assert plans[1].works == [] and plans[1].seconds.best > 0

    def test_what_is_there_is_not_counted_again(self, study_template: Study, tmp_path: Path, plans: list[Plan], capsys):
        flags = [*study_template.flags(tmp_path / "out"), "--n-cells", "4"]
        assert exhaustive_feature_tracing.main([*flags, "--end-idx", "20"]) == 0
        check(exhaustive_feature_tracing.main, flags, tmp_path)
        assert "39 of layer 1, to layers 2, 4, 5; 19 are there" in capsys.readouterr().out
        before = {record["feature_idx"] for record in records(tmp_path / "out", "feature_*.json")}
        assert exhaustive_feature_tracing.main(flags) == 0
        later = [r for r in records(tmp_path / "out", "feature_*.json") if r["feature_idx"] not in before]
        assert work(plans[0], "ablated passes").n == sum(record["n_cells_active"] for record in later)

    def test_same_position_effects_and_their_sample(self, study_template: Study, tmp_path: Path, plans: list[Plan]):
        flags = [*study_template.flags(tmp_path / "out"), "--same-position", "--same-position-check", "13"]
        check(exhaustive_feature_tracing.main, flags, tmp_path)
        require_plausible(plans[0])
        n_pairs = work(plans[0], "ablated passes").n
        assert work(plans[0], "total effects to compare with").n == pytest.approx(n_pairs / 3)

    @pytest.mark.parametrize("sources", ["1,2", "0,1,2,4"])
    def test_several_source_layers(self, sources: str, study: Study, tmp_path: Path, plans: list[Plan], capsys):
        n_sources = len(sources.split(","))
        if n_sources == 4:  # so many are described together
            folder = next(study.data_root.glob("sae_models/layer01*"))
            shutil.copytree(folder, folder.with_name(folder.name.replace("01", "00")))
        flags = [*study.flags(tmp_path / "out"), "--source-layer", sources, "--n-cells", "3"]
        check(exhaustive_feature_tracing.main, flags, tmp_path, study.root)
        require_plausible(plans[0])
        assert "; 0 are there" in capsys.readouterr().out
        assert exhaustive_feature_tracing.main(flags) == 0
        n_pairs = sum(record["n_cells_active"] for record in records(tmp_path / "out", "feature_*.json"))
        assert sum(work.n for work in plans[0].works if work.name.startswith("ablated passes")) == n_pairs
        assert work(plans[0], "full passes that check").n == 2 * n_sources

    def test_selective_tracing(self, study: Study, tmp_path: Path, plans: list[Plan], capsys):
        annotate(study)
        flags = selective_flags(study, tmp_path / "out")
        check(selective_feature_tracing.main, flags, tmp_path, study.root)
        (plan,) = plans
        require_plausible(plan)
        assert "8 of layer 2, to layers 4, 5; 0 are there" in capsys.readouterr().out
        assert selective_feature_tracing.main(flags) == 0
        n_pairs = sum(record["n_cells_active"] for record in records(tmp_path / "out", "feature_*.json"))
        assert sum(work.n for work in plan.works if work.name.startswith("ablated passes")) == n_pairs
        check(selective_feature_tracing.main, flags, tmp_path)
        assert "8 of layer 2, to layers 4, 5; 8 are there" in capsys.readouterr().out and plans[1].works == []

    def test_a_folder_of_another_run_is_refused(self, study_template: Study, tmp_path: Path, capsys):
        flags = study_template.flags(tmp_path / "out")
        assert exhaustive_feature_tracing.main([*flags, "--features", "1"]) == 0
        before = listing(tmp_path)
        status = exhaustive_feature_tracing.main([*flags, "--min-abs-d", "0.7", "--check"])
        assert "min_abs_d is 0.5 there and 0.7 here" in refusal(capsys, status)
        status = exhaustive_feature_tracing.main([*flags, "--source-layer", "1,2", "--check"])
        assert "several source layers need a folder of their own" in refusal(capsys, status)
        assert listing(tmp_path) == before

    def test_wrong_inputs_are_refused_as_by_the_run(self, study_template: Study, tmp_path: Path, capsys):
        flags = study_template.flags(tmp_path / "out")
        for wrong, said in (
            (["--features", "999"], "has no feature 999"),
            (["--downstream-layers", "9"], "this model has 6 blocks"),
            (["--data-path", str(tmp_path / "none.h5ad")], "no such file"),
            (["--obs-filter", "gene=none"], "gene"),
        ):
            assert said in refusal(capsys, exhaustive_feature_tracing.main([*flags, *wrong, "--check"]))
        assert not (tmp_path / "out").exists()


class TestASlowMachine:
    """Where one pass takes longer than the probe may, one of each kind is enough."""

    @pytest.fixture(autouse=True)
    def no_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(probe, "PROBE_SECONDS", 0.0)

    def test_tracing(self, study_template: Study, tmp_path: Path, plans: list[Plan], monkeypatch, capsys):
        calls = []
        real = Bench.effects
        monkeypatch.setattr(Bench, "effects", lambda *args: calls.append(args) or real(*args))
        check(exhaustive_feature_tracing.main, study_template.flags(tmp_path / "out"), tmp_path)
        assert len(calls) == 1
        require_plausible(plans[0])
        assert "from clean runs of 1 of 12 cells" in capsys.readouterr().out
        assert 200 < work(plans[0], "ablated passes").n < 300
        assert work(plans[0], "blocks of features").n == 3

    def test_combinations(self, study: Study, tmp_path: Path, plans: list[Plan], monkeypatch, capsys):
        check(higher_order_ablation.main, combination_flags(study, tmp_path / "out"), tmp_path)
        require_plausible(plans[0])
        assert "from clean passes of 1 of 8 cells" in capsys.readouterr().out

    def test_steering(self, trajectory_study: Study, tmp_path: Path, plans: list[Plan], capsys):
        check(trajectory_steering.main, steering_flags(trajectory_study, tmp_path / "out"), tmp_path)
        require_plausible(plans[0])
        assert re.search(r"from 1 of \d early cells", capsys.readouterr().out)

    def test_a_run_of_days_gets_a_smaller_first_step(self, study_template: Study, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(plan_report, "DAY", 0.001)
        check(exhaustive_feature_tracing.main, study_template.flags(tmp_path / "out"), tmp_path)
        assert "of about an hour: the same with --end-idx 40" in capsys.readouterr().out

    def test_a_busy_machine_is_said(self, study_template: Study, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(plan_report.os, "getloadavg", lambda: (999.0, 0.0, 0.0))
        check(exhaustive_feature_tracing.main, study_template.flags(tmp_path / "out"), tmp_path)
        assert "others are at work: a load of 999.0" in capsys.readouterr().out


class TestPlaces:
    def test_a_disk_that_is_too_small(self, study_template: Study, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(plan_report.shutil, "disk_usage", lambda path: SimpleNamespace(free=3000))
        flags = [*study_template.flags(tmp_path / "out"), "--features", "1,2,4", "--check"]
        assert "and the results need at least" in refusal(capsys, exhaustive_feature_tracing.main(flags))

    def test_a_disk_that_may_be_too_small_is_said(self, study_template: Study, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(plan_report.shutil, "disk_usage", lambda path: SimpleNamespace(free=60_000))
        flags = [*study_template.flags(tmp_path / "out"), "--features", "1,2,4", "--check"]
        assert exhaustive_feature_tracing.main(flags) == 0
        assert "which may not be enough" in capsys.readouterr().out

    def test_a_file_where_the_folder_would_be(self, study_template: Study, tmp_path: Path, capsys):
        (tmp_path / "file").write_text("")
        flags = [*study_template.flags(tmp_path / "file" / "out"), "--features", "1", "--check"]
        assert "is no folder" in refusal(capsys, exhaustive_feature_tracing.main(flags))

    def test_a_folder_that_cannot_be_written(self, study_template: Study, tmp_path: Path, monkeypatch, capsys):
        monkeypatch.setattr(plan_report.os, "access", lambda path, mode: False)
        flags = [*study_template.flags(tmp_path / "out"), "--features", "1", "--check"]
        assert "cannot be written" in refusal(capsys, exhaustive_feature_tracing.main(flags))


@pytest.mark.parametrize(
    "main",
    [
        exhaustive_feature_tracing.main,
        selective_feature_tracing.main,
        higher_order_ablation.main,
        trajectory_steering.main,
    ],
)
def test_a_summary_and_a_check_are_two_things(main: Main, tmp_path: Path, capsys):
    status = main(["--out-dir", str(tmp_path / "out"), "--check", "--analysis-only"])
    assert "leave one out" in refusal(capsys, status)


class TestCombinations:
    @pytest.mark.parametrize("order", [2, 3])
    def test_the_numbers_are_those_of_the_run(
        self, order: int, study: Study, tmp_path: Path, plans: list[Plan], capsys
    ):
        flags = combination_flags(study, tmp_path / "out", order)
        check(higher_order_ablation.main, flags, tmp_path)
        (plan,) = plans
        require_plausible(plan)
        assert higher_order_ablation.main(flags) == 0
        of_run = records(tmp_path / "out", "pair_*.json" if order == 2 else "triplet_*.json")
        trees = work(plan, "trees of ablated passes")
        assert trees.n == sum(record["n_active"][LETTERS[:order]] for record in of_run)
        n_runs = sum(record["n_block_runs"] for record in of_run)
        (n_planned,) = re.findall(r"([\d,]+) blocks on one stream", trees.name)
        # an edit may switch a later feature on or off, which clean runs do not show
        assert int(n_planned.replace(",", "")) == pytest.approx(n_runs, rel=0.1)
        assert work(plan, "clean passes").n == 8
        capsys.readouterr()
        check(higher_order_ablation.main, flags, tmp_path)
        assert f"{len(of_run)} at layer 5; {len(of_run)} are there" in capsys.readouterr().out
        assert plans[1].works == []

    def test_effects_that_are_missing_count_as_left(self, study: Study, tmp_path: Path, plans: list[Plan]):
        flags = combination_flags(study, tmp_path / "out", 2)
        assert higher_order_ablation.main(flags) == 0
        check(higher_order_ablation.main, [*flags, "--save-effects"], tmp_path)
        assert plans[0].works and plans[0].disk.about > 2 * 4 * 3 * 40 * 8

    def test_a_folder_of_another_run_is_refused(self, study: Study, tmp_path: Path, capsys):
        flags = combination_flags(study, tmp_path / "out", 2)
        assert higher_order_ablation.main(flags) == 0
        assert "n_cells is 8 there" in refusal(
            capsys, higher_order_ablation.main([*flags, "--n-cells", "7", "--check"])
        )


def steering_flags(study: Study, out_dir: Path) -> list[str]:
    return [
        "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
        "--traj-dir", str(study.root), "--panel", str(study.root / "panel.json"), "--min-median-tokens", "5",
        "--device", "cpu", "--out-dir", str(out_dir),
    ]  # fmt: skip


class TestSteering:
    def test_the_numbers_are_those_of_the_run(
        self, trajectory_study: Study, tmp_path: Path, plans: list[Plan], capsys, caplog
    ):
        flags = steering_flags(trajectory_study, tmp_path / "out")
        check(trajectory_steering.main, flags, tmp_path, trajectory_study.root)
        (plan,) = plans
        require_plausible(plan)
        assert f"{len(PANEL)} of layers 1, 4, 5, alphas 2, 5; 0 are there" in capsys.readouterr().out
        caplog.set_level("INFO")
        assert trajectory_steering.main(flags) == 0
        ((n_clean, n_steered),) = re.findall(r"(\d+) clean passes, (\d+) steered passes", caplog.text)
        assert work(plan, "clean passes").n == int(n_clean)
        n_planned = sum(work.n for work in plan.works if work.name.startswith("steered passes"))
        assert n_planned == int(n_steered) > 0
        check(trajectory_steering.main, flags, tmp_path)
        assert f"{len(PANEL)} are there" in capsys.readouterr().out and plans[1].works == []

    def test_a_folder_of_another_run_is_refused(self, trajectory_study: Study, tmp_path: Path, capsys):
        flags = steering_flags(trajectory_study, tmp_path / "out")
        assert trajectory_steering.main(flags) == 0
        status = trajectory_steering.main([*flags, "--alphas", "3", "--check"])
        assert "alphas is [2.0, 5.0] there" in refusal(capsys, status)


class TestTrajectory:
    def flags(self, study: Study, out_dir: Path) -> list[str]:
        return [
            "--model", str(study.model), "--data-root", str(study.data_root), "--data-path", str(study.cells),
            "--traj-dir", str(study.root), "--layers", "1,4", "--min-median-tokens", "5", "--device", "cpu",
            "--out-dir", str(out_dir),
        ]  # fmt: skip

    def test_the_numbers_are_those_of_the_run(self, trajectory_study: Study, tmp_path: Path, plans: list[Plan], capsys):
        flags = self.flags(trajectory_study, tmp_path / "out")
        check(trajectory_analysis.main, flags, tmp_path, trajectory_study.root)
        (plan,) = plans
        require_plausible(plan)
        printed = capsys.readouterr().out
        assert trajectory_analysis.main(flags) == 0
        summary = json.loads((tmp_path / "out" / "trajectory_summary.json").read_text())
        assert work(plan, "clean passes").n == summary["n_cells"] == 14
        counts = (summary["n_early"], summary["n_late"], summary["n_left_out"])
        assert "{} early and {} late cells, {} left out".format(*counts) in printed
        size = (tmp_path / "out" / "sae_activations.npz").stat().st_size
        assert size / 3 < plan.disk.about < 300 * size

    def test_wrong_inputs_are_refused_as_by_the_run(self, trajectory_study: Study, tmp_path: Path, capsys):
        flags = self.flags(trajectory_study, tmp_path / "out")
        status = trajectory_analysis.main([*flags, "--follow-genes", "NO_GENE", "--check"])
        assert "NO_GENE" in refusal(capsys, status)
        status = trajectory_analysis.main([*flags, "--layers", "9", "--check"])
        assert "this model has 6 blocks" in refusal(capsys, status)
        assert not (tmp_path / "out").exists()


class TestPreparation:
    @pytest.fixture
    def flags(self, study_template: Study, tmp_path: Path) -> list[str]:
        sets = tmp_path / "sets.gmt"
        rng = np.random.default_rng(0)
        names = [[f"GENE{gene}" for gene in rng.choice(60, 12, replace=False)] for _ in range(25)]
        sets.write_text("".join("\t".join([f"Term {i}", "", *of_set]) + "\n" for i, of_set in enumerate(names)))
        return [
            "--model", str(study_template.model), "--data-path", str(study_template.cells), "--cells", "all",
            "--min-median-tokens", "5", "--data-root", str(tmp_path / "made"), "--layers", "1,4", "--expansion", "2",
            "--k", "4", "--epochs", "3", "--batch-size", "32", "--min-firings", "2", "--gmt", f"GO_BP={sets}",
            "--device", "cpu",
        ]  # fmt: skip

    def test_the_numbers_are_those_of_the_run(self, flags: list[str], tmp_path: Path, plans: list[Plan], capsys):
        check(prepare_inputs.main, flags, tmp_path)
        (plan,) = plans
        require_plausible(plan)
        assert "1, 4; 1, 4 left to make" in capsys.readouterr().out
        assert prepare_inputs.main(flags) == 0
        made = records(tmp_path / "made", "results.json")
        assert work(plan, "training steps").n == sum(result["training"]["n_steps"] for result in made)
        assert work(plan, "clean passes that count").n == 14 and work(plan, "clean passes that sample").n == 13
        n_loss_cells = made[0]["quality"]["n_loss_cells"]
        assert work(plan, "passes for masked-gene losses").n == (1 + 3 * 2) * n_loss_cells
        check(prepare_inputs.main, flags, tmp_path)
        assert "1, 4; none left to make" in capsys.readouterr().out and plans[1].works == []

    def test_layers_in_groups_are_passed_over_again(self, flags: list[str], tmp_path: Path, plans: list[Plan]):
        check(prepare_inputs.main, [*flags, "--max-memory-gb", "5e-5"], tmp_path)
        assert work(plans[0], "clean passes that count").n == 28

    def test_existing_saes(self, flags: list[str], study: Study, plans: list[Plan], capsys):
        flags = [*flags, "--data-root", str(study.data_root), "--existing-saes"]
        check(prepare_inputs.main, flags, study.root)
        assert plans[0].works == []  # catalogs and labels are there
        for path in study.data_root.rglob("feature_*.json"):
            path.unlink()
        check(prepare_inputs.main, flags, study.root)
        assert work(plans[1], "clean passes that count").n == 14 and work(plans[1], "layers to label").n == 2
        assert prepare_inputs.main(flags) == 0
        check(prepare_inputs.main, [*flags, "--relabel"], study.root)
        assert [work.name for work in plans[2].works if work.n] == ["layers to label"]

    def test_other_settings_are_refused(self, flags: list[str], tmp_path: Path, capsys):
        assert prepare_inputs.main(flags) == 0
        status = prepare_inputs.main([*flags, "--epochs", "4", "--check"])
        assert "epochs is 3 there and 4 here" in refusal(capsys, status)


def test_looking_up_and_drawing(study_template: Study, tmp_path: Path, capsys):
    flags = ["--out-dir", str(tmp_path / "out")]
    for main in (make_figures.main, lambda words: look_up_feature.main(["1", *words])):
        assert str(tmp_path / "out") in refusal(capsys, main([*flags, "--check"]))
    assert exhaustive_feature_tracing.main([*study_template.flags(tmp_path / "out"), "--features", "1,2"]) == 0
    capsys.readouterr()
    check(make_figures.main, flags, tmp_path)
    assert f"3 panels to write as {tmp_path / 'out' / 'exhaustive_tracing.png'}" in capsys.readouterr().out
    check(look_up_feature.main, ["1", *flags], tmp_path)
    n_lines = int(capsys.readouterr().out.split()[0])
    assert look_up_feature.main(["1", *flags]) == 0
    assert len(capsys.readouterr().out.splitlines()) == n_lines
    assert "no feature 99" in refusal(capsys, look_up_feature.main(["99", *flags, "--check"]))
