"""A steering run: passes, batches, resume after a kill, larger panels, damaged files, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cellcircuits import steering_run
from cellcircuits.errors import UserError
from cellcircuits.panel import PanelFeature
from cellcircuits.steering import SteeringBench, is_active
from cellcircuits.steering_run import Steerer
from steering_fixtures import SHAPES, Setup, files_in, record_of


def test_one_clean_pass_serves_all_features_and_alphas(tmp_path: Path):
    setup = Setup()
    steerer = setup.steer(tmp_path)
    bench = steerer.bench
    n_pairs = 0
    for i in setup.early:
        clean = bench.clean(setup.cells[i])
        n_pairs += sum(is_active(bench.latents(clean, f.layer), f.index) for f in setup.panel)
    assert steerer.spent.n_clean_passes == 6
    assert steerer.spent.n_pairs == n_pairs and steerer.spent.n_steered_runs == 3 * n_pairs


def test_batches_and_groups_change_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup()
    setup.steer(tmp_path / "whole")
    setup.steer(tmp_path / "ones", batch_size=1)
    monkeypatch.setattr(steering_run, "MAX_CHANGES_BYTES", 3 * 4 * 3 * 24 * 8)
    steerer = setup.steer(tmp_path / "groups")
    assert steerer.spent.n_clean_passes == 6 + 2 * 4  # the later groups need no late cell
    for feature in setup.panel:
        whole, *others = (record_of(tmp_path / name, feature) for name in ("whole", "ones", "groups"))
        for other in others:
            for alpha, expected in whole["alpha_results"].items():
                found = other["alpha_results"][alpha]
                assert found["state_shifts"] == pytest.approx(expected["state_shifts"], rel=1e-8, abs=1e-14)


def interrupted_after(n_calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the n-th batch of steered passes end in Ctrl-C."""
    real, calls = SteeringBench.mean_changes, []

    def mean_changes(self, *args):
        calls.append(1)
        if len(calls) == n_calls:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(SteeringBench, "mean_changes", mean_changes)


@pytest.mark.parametrize("n_calls", [3, 6, 9])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_killed_and_started_again_gives_the_same_files(
    n_calls: int, batch_size: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    setup = Setup(dtype=torch.float32)
    whole = setup.steer(tmp_path / "whole", batch_size=batch_size)
    monkeypatch.setattr(steering_run, "SAVE_EVERY_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        interrupted_after(n_calls if batch_size is None else 2 * n_calls, patch)
        with pytest.raises(KeyboardInterrupt):
            setup.steer(tmp_path / "parts", batch_size=batch_size)
    assert not list((tmp_path / "parts").glob("steering_*")) and (tmp_path / "parts/partial/unfinished.npz").exists()
    rest = setup.steer(tmp_path / "parts", batch_size=batch_size)
    assert 0 < rest.spent.n_clean_passes <= whole.spent.n_clean_passes
    assert rest.spent.n_steered_runs < whole.spent.n_steered_runs
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")
    assert not (tmp_path / "parts/partial/unfinished.npz").exists()


def test_killed_among_the_records_runs_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup(dtype=torch.float32)
    setup.steer(tmp_path / "whole")
    real = Steerer.write_record

    def write_record(self, feature, *args):
        if feature == setup.panel[3]:
            raise KeyboardInterrupt
        real(self, feature, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Steerer, "write_record", write_record)
        with pytest.raises(KeyboardInterrupt):
            setup.steer(tmp_path / "parts")
    assert len(list((tmp_path / "parts").glob("steering_*"))) == 3
    rest = setup.steer(tmp_path / "parts")
    assert rest.spent.n_clean_passes == rest.spent.n_steered_runs == 0
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")


@pytest.mark.parametrize("content", [b"", b"PK no archive", "another run"])
def test_useless_partial_work_is_ignored(content: bytes | str, tmp_path: Path):
    setup = Setup(dtype=torch.float32)
    setup.steer(tmp_path / "whole")
    partial = tmp_path / "parts/partial/unfinished.npz"
    partial.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        partial.write_bytes(content)
    else:
        np.savez(partial, marks=np.array([f"{f.name} other" for f in setup.panel]), done=np.ones((4, 8, 3), dtype=bool))
    setup.steer(tmp_path / "parts")
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")


def test_partial_work_of_another_form_is_ignored(tmp_path: Path):
    setup = Setup(dtype=torch.float32)
    steerer = setup.steer(tmp_path / "whole")
    partial = tmp_path / "parts/partial/unfinished.npz"
    partial.parent.mkdir(parents=True)
    np.savez(partial, marks=np.array([steerer.mark(f) for f in setup.panel]), done=np.ones((4, 8, 3), dtype=bool))
    setup.steer(tmp_path / "parts")
    assert files_in(tmp_path / "parts") == files_in(tmp_path / "whole")


def test_a_damaged_file_is_made_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    setup = Setup(dtype=torch.float32)
    setup.steer(tmp_path)
    before = files_in(tmp_path)
    name = f"steering_{setup.panel[2].name}.json"
    (tmp_path / name).write_bytes(before[name][:200])
    (tmp_path / "state_signatures.npz").write_bytes(b"PK")
    steerer = setup.steer(tmp_path)
    assert name in caplog.text and "state_signatures.npz" in caplog.text
    assert steerer.spent.n_clean_passes == 6
    found = files_in(tmp_path)
    old, new = (json.loads(files[name])["alpha_results"]["2.0"] for files in (before, found))
    assert new["state_shifts"] == pytest.approx(old["state_shifts"], rel=1e-3, abs=1e-8)
    assert {key: value for key, value in found.items() if key != name} == {
        key: value for key, value in before.items() if key != name
    }


def test_files_of_another_run_are_made_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    setup = Setup(dtype=torch.float32)
    setup.steer(tmp_path)
    setup.steer(tmp_path / "other", fingerprint="another", cells=setup.cells[::-1])
    name = f"steering_{setup.panel[2].name}.json"
    before = files_in(tmp_path)
    for file in (name, "state_signatures.npz"):
        (tmp_path / file).write_bytes((tmp_path / "other" / file).read_bytes())
    assert setup.steer(tmp_path).spent.n_clean_passes == 6
    assert name in caplog.text and "state_signatures.npz is of another run" in caplog.text
    with np.load(tmp_path / "state_signatures.npz") as kept:
        assert kept["fingerprint"].item() == "run"
    found, expected = (json.loads(files[name])["alpha_results"]["2.0"] for files in (files_in(tmp_path), before))
    assert found["state_shifts"] == pytest.approx(expected["state_shifts"], rel=1e-3, abs=1e-8)


def test_a_larger_panel_adds_its_features(tmp_path: Path):
    setup = Setup(SHAPES[3])
    whole = setup.panel
    setup.steer(tmp_path / "whole")
    setup.panel, every = [f for f in whole if f.layer == 2], setup.saes
    setup.saes = {2: every[2]}
    setup.steer(tmp_path / "parts")
    kept = files_in(tmp_path / "parts")
    setup.panel, setup.saes = whole, every
    second = setup.steer(tmp_path / "parts")
    assert second.spent.n_clean_passes == len(setup.early)
    assert all(files_in(tmp_path / "parts")[name] == kept[name] for name in kept if name.startswith("steering"))
    for feature in whole:
        found, expected = (record_of(tmp_path / name, feature) for name in ("parts", "whole"))
        for alpha, result in expected["alpha_results"].items():
            shifts = found["alpha_results"][alpha]["state_shifts"]
            assert shifts == pytest.approx(result["state_shifts"], rel=1e-8, abs=1e-13)


def test_a_larger_panel_keeps_interrupted_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup(SHAPES[3])
    whole, every = setup.panel, setup.saes
    monkeypatch.setattr(steering_run, "SAVE_EVERY_SECONDS", -1.0)
    setup.panel, setup.saes = [f for f in whole if f.layer == 2], {2: every[2]}
    with monkeypatch.context() as patch:
        interrupted_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            setup.steer(tmp_path)
    setup.panel, setup.saes = whole, every
    begun, rest = setup.steerer(tmp_path).groups(whole)
    assert {f.layer for f in begun} == {2} and {f.layer for f in rest} == {0, 3, 4}
    setup.steer(tmp_path)
    assert len(list(tmp_path.glob("steering_*"))) == len(whole)


def test_another_sae_of_a_layer_is_refused_by_name(tmp_path: Path):
    setup = Setup()
    setup.steer(tmp_path)
    marks = {1: {"checkpoint": "sha of 1", "mean": "-"}, 4: {"checkpoint": "another", "mean": "-"}}
    with pytest.raises(UserError, match=r'F\d+_L4.*saes\.4\.checkpoint is "sha of 4" there and "another" here'):
        setup.steer(tmp_path, saes=marks)


def test_labels_and_switch_sizes_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup()
    setup.steer(tmp_path)
    before = record_of(tmp_path, setup.panel[0])
    setup.panel = [PanelFeature(f.layer, f.index, None, "new") for f in setup.panel]
    monkeypatch.setattr(SteeringBench, "clean", lambda *_: pytest.fail("a cell was run"))
    setup.steer(tmp_path)
    assert record_of(tmp_path, setup.panel[0]) == before | {"label": "new", "switch_d": None}


def test_out_of_memory_halves_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup()
    setup.steer(tmp_path / "whole")
    real, sizes = SteeringBench.mean_changes, []

    def tight(self, clean, layer, latents, runs):
        if len(runs) > 3:
            raise torch.OutOfMemoryError("none left")
        sizes.append(len(runs))
        return real(self, clean, layer, latents, runs)

    monkeypatch.setattr(SteeringBench, "mean_changes", tight)
    setup.steer(tmp_path / "tight")
    assert 1 < max(sizes) <= 3
    for feature in setup.panel:
        found, expected = (record_of(tmp_path / name, feature) for name in ("tight", "whole"))
        assert found["steered_cells"] == expected["steered_cells"]
    n_calls = []

    def none_left(self, *args):
        n_calls.append(1)
        if len(n_calls) > 1:  # the first is the self-check
            raise torch.OutOfMemoryError("none left")
        return real(self, *args)

    monkeypatch.setattr(SteeringBench, "mean_changes", none_left)
    with pytest.raises(UserError, match="memory"):
        setup.steer(tmp_path / "none")


def test_an_engine_that_disagrees_with_a_full_pass_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    setup = Setup(dtype=torch.float32)
    setup.early, setup.late = np.array([2, 3, 5]), np.array([0, 1, 8])  # late cells run before the engine is compared
    real = SteeringBench.mean_changes
    monkeypatch.setattr(steering_run, "SAVE_EVERY_SECONDS", -1.0)
    monkeypatch.setattr(SteeringBench, "mean_changes", lambda *args: 1.1 * real(*args))
    with pytest.raises(UserError, match="disagree"):
        setup.steer(tmp_path)
    assert not (tmp_path / "partial").exists() and not list(tmp_path.glob("steering_*"))


def test_numbers_that_are_none_are_refused(tmp_path: Path):
    setup = Setup(dtype=torch.float32)
    with torch.no_grad():
        setup.saes[1].W_dec.weight[:] = float("inf")
    with pytest.raises(UserError, match=r"NaN or infinite.*--alphas"):
        setup.steer(tmp_path / "sae")
    setup = Setup(dtype=torch.float32)
    with torch.no_grad():
        setup.model.bert.encoder.layer[5].output.dense.weight[:] = float("nan")
    with pytest.raises(UserError, match=r"NaN or infinite.*weights"):
        setup.steer(tmp_path / "model")


def test_partial_work_is_saved_well_within_ten_minutes():
    assert steering_run.SAVE_EVERY_SECONDS <= 300
