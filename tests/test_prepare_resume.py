"""prepare_inputs.py stopped anywhere and started again: nothing is lost, done twice or mixed up."""

import contextlib
import errno
import itertools
import json
import os
import signal
import time
from collections import Counter
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest

import prepare_inputs
from cellcircuits import activations, jsonio, manifest, preparation, preparation_passes, preparation_state, sae_training
from cellcircuits.errors import UserError
from cellcircuits.feature_stats import GeneFeatureCounts, ReconstructionError
from cellcircuits.results import exclusive
from test_prepare_inputs import contents, gmt  # noqa: F401  gmt is a fixture

STOPS = {  # what is stopped, and the call of a function in whose place it is
    "sampling": (activations, "residuals", 5),
    "first step": (sae_training, "_step", 1),
    "training": (sae_training, "_step", 10),
    "training the second layer": (sae_training, "_step", 30),
    "baseline": (preparation_passes, "fit_baseline", 1),
    "counting": (GeneFeatureCounts, "add", 9),
    "losses": (preparation_passes, "masked_gene_loss", 10),
    "catalog of the first layer": (preparation, "build_catalog", 1),
    "catalog of the second layer": (preparation, "build_catalog", 2),
    "labels": (preparation, "annotate_catalog", 1),
    "files of the first layer": (preparation, "save_sae", 1),
    "files of the second layer": (preparation, "save_sae", 2),
    "end of the first layer": (preparation_state, "clear_unfinished", 2),
}
DONE_ONCE = ((sae_training, "_step"), (GeneFeatureCounts, "add"), (ReconstructionError, "add"))
PARTS = {  # part of the first layer: a stop at which it is there, and a function that makes it again
    "rows_0000000.npz": ("first step", (activations, "residuals")),
    "training.npz": ("training", (sae_training, "_step")),
    "trained.npz": ("counting", (sae_training, "_step")),
    "counts.npz": ("losses", (GeneFeatureCounts, "add")),
    "losses.npz": ("catalog of the first layer", (preparation_passes, "masked_gene_loss")),
}


@pytest.fixture(autouse=True)
def save_always(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # no power is cut here, and hundreds take seconds
    monkeypatch.setattr(preparation_state, "SAVE_EVERY_SECONDS", 0.0)


@pytest.fixture
def flags(study_template, gmt, tmp_path):  # noqa: F811
    return flags_for(study_template, gmt, tmp_path / "made")


def flags_for(study, gene_sets, root):
    return [
        "--model", str(study.model), "--data-path", str(study.cells), "--cells", "all", "--min-median-tokens", "5",
        "--data-root", str(root), "--layers", "1,4", "--expansion", "2", "--k", "4", "--epochs", "2",
        "--batch-size", "32", "--min-firings", "2", "--gmt", f"GO_BP={gene_sets}", "--held-out", "0.25",
        "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def opened(study_template, gmt, tmp_path_factory):  # noqa: F811
    """What the script works with, once its inputs are read."""
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preparation, "prepare", lambda work: asked.append(work) or [])
        assert prepare_inputs.main(flags_for(study_template, gmt, tmp_path_factory.mktemp("unused"))) == 0
    return asked[0]


@pytest.fixture
def made(tmp_path):
    root = tmp_path / "made"
    root.mkdir()
    return root


@pytest.fixture
def work(opened, made):
    return replace(opened, data_root=made)


@pytest.fixture(scope="module")
def whole(opened, tmp_path_factory):
    """The files of a run that nobody stopped, and how often it did what need not be done twice."""
    root = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch, DONE_ONCE)
        preparation.prepare(replace(opened, data_root=root))
    return final(root), calls


def final(root):
    """Every file but the lock, without the times."""
    found = contents(root)
    for name in (name for name in found if name.endswith("results.json")):
        results = json.loads(found[name])
        del results["training"]["elapsed_seconds"]
        found[name] = results
    return found


def count_calls(patch, functions):
    calls = Counter()
    for owner, name in functions:
        real = getattr(owner, name)

        def counted(*args, key=(owner.__name__, name), real=real, **kwargs):
            result = real(*args, **kwargs)
            calls[key] += 1
            return result

        patch.setattr(owner, name, counted)
    return calls


@contextlib.contextmanager
def stopped(owner, name, n, error=KeyboardInterrupt):
    """Inside the `with`, the n-th call of a function raises instead."""
    real, numbers = getattr(owner, name), itertools.count(1)

    def stopping(*args, **kwargs):
        if next(numbers) == n:
            raise error
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, stopping)
        yield


def part_of_first_layer(root, name):
    return root / "sae_models" / "unfinished" / "layer01_x2_k4" / name


def prepare_stopped(work, stop):
    """Stop a run at one of the `STOPS`."""
    with stopped(*STOPS[stop]), pytest.raises(KeyboardInterrupt):
        preparation.prepare(work)


@pytest.mark.parametrize("stop", STOPS)
def test_stopped_and_resumed_equals_uninterrupted_and_nothing_is_done_twice(work, made, whole, monkeypatch, stop):
    calls = count_calls(monkeypatch, DONE_ONCE)
    prepare_stopped(work, stop)
    preparation.prepare(work)
    assert (final(made), calls) == whole


def test_the_script_says_how_to_go_on(flags, made, whole, capsys):
    with stopped(*STOPS["training"]):
        assert prepare_inputs.main(flags) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert prepare_inputs.main(flags) == 0
    assert final(made) == whole[0]


def test_stopped_again_and_again_at_any_write(work, made, whole):
    n_stops = 0
    for _ in range(40):
        with stopped(jsonio, "_sync_folder", 9):
            try:
                preparation.prepare(work)
            except KeyboardInterrupt:
                n_stops += 1
    assert n_stops > 10 and final(made) == whole[0]


def test_a_killed_process_goes_on(work, made, whole):
    child = os.fork()
    if child == 0:
        preparation.prepare(work)
        os._exit(0)
    trained = part_of_first_layer(made, "trained.npz")
    deadline = time.monotonic() + 60
    while not trained.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert trained.exists()
    left = made / "sae_models" / "layer04_x2_k4" / ".sae_final.pt.4711.0123abcd.tmp"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    preparation.prepare(work)
    assert final(made) == whole[0]


def test_other_groups_of_layers_go_on_with_the_same_work(work, made, whole, monkeypatch):
    calls = count_calls(monkeypatch, DONE_ONCE)
    prepare_stopped(work, "counting")
    preparation.prepare(replace(work, settings=replace(work.settings, max_memory_gb=5e-5)))
    assert (final(made), calls) == whole


def test_what_takes_moments_is_not_kept(work, made, whole, monkeypatch):
    monkeypatch.setattr(preparation_state, "SAVE_EVERY_SECONDS", 1000.0)
    prepare_stopped(work, "catalog of the first layer")
    assert {path.name for path in (made / "sae_models" / "unfinished").rglob("*.npz")} == {"trained.npz"}
    preparation.prepare(work)
    assert final(made) == whole[0]


@pytest.mark.parametrize(
    ("part", "harm"),
    [*((part, "cut") for part in PARTS), *(("counts.npz", harm) for harm in ("bit", "work", "shape", "empty"))],
)
def test_a_damaged_or_foreign_part_is_said_and_made_again(work, made, whole, monkeypatch, caplog, part, harm):
    stop, remade = PARTS[part]
    prepare_stopped(work, stop)
    spoil(part_of_first_layer(made, part), harm)
    calls = count_calls(monkeypatch, [remade])
    preparation.prepare(work)
    assert any(part in message and "is not used" in message for message in caplog.messages)
    assert final(made) == whole[0] and sum(calls.values()) > 0


def spoil(path, harm):
    content, place = path.read_bytes(), path.stat().st_size // 2
    with np.load(path) as kept:
        arrays = dict(kept)
    changed = {"fingerprint": np.array("0" * 64)} if harm == "work" else {"n_cells": np.zeros(3)}
    foreign = BytesIO()
    np.savez(foreign, **(arrays | changed))
    harmed = {"cut": content[:place], "bit": content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]}
    path.write_bytes(harmed.get(harm, b"" if harm == "empty" else foreign.getvalue()))


def test_a_folder_in_place_of_a_part_is_one_sentence(work, made, whole):
    prepare_stopped(work, "losses")
    path = part_of_first_layer(made, "counts.npz")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"counts\.npz: cannot be written \(Is a directory\)"):
        preparation.prepare(work)
    path.rmdir()
    preparation.prepare(work)
    assert final(made) == whole[0]


@pytest.mark.parametrize("content", [None, b"{", b'{"schema_version": 0}', b"[NaN]"])
def test_work_of_unknown_origin_is_said_and_not_used(work, made, whole, caplog, content):
    prepare_stopped(work, "losses")
    for path in (made / "sae_models" / "unfinished").rglob("work.json"):
        path.unlink() if content is None else path.write_bytes(content)
    preparation.prepare(work)
    assert sum("is not used" in message for message in caplog.messages) == 2
    assert final(made) == whole[0]


@pytest.mark.parametrize("changed", [{"layer": [1]}, {"quality": {"fvu": "low"}}, {"annotation": []}, {"inputs": 3}])
def test_results_of_another_form_are_left_alone(work, made, changed):
    preparation.prepare(work)
    path = made / "sae_models" / "layer04_x2_k4" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    before = contents(made)
    with pytest.raises(UserError, match=r"results\.json: was not written by this script"):
        preparation.prepare(work)
    assert contents(made) == before


@pytest.mark.parametrize("stop", ["training", "files of the first layer"])
def test_other_settings_are_named_and_touch_nothing(work, made, whole, stop):
    prepare_stopped(work, stop)
    before = contents(made)
    settings = replace(work.settings, training=replace(work.settings.training, epochs=7), n_top_genes=9)
    with pytest.raises(UserError, match=r"epochs is 2 there and 7 here; top_genes is 20 there and 9 here.* another"):
        preparation.prepare(replace(work, settings=settings))
    assert contents(made) == before
    preparation.prepare(work)
    assert final(made) == whole[0]


def test_other_software_is_refused_or_recorded(work, made, whole, monkeypatch):
    prepare_stopped(work, "training")
    before = contents(made)
    monkeypatch.setattr(manifest, "code_hash", lambda: "another")
    with pytest.raises(UserError, match=r"the code in src/ has changed.*--mix-versions"):
        preparation.prepare(work)
    assert contents(made) == before
    for results in preparation.prepare(replace(work, mix_versions=True)):
        first, second = results["provenance"]
        assert first["code"] == whole[0]["sae_models/layer01_x2_k4/results.json"]["provenance"][0]["code"] != "another"
        assert second["code"] == "another"
    made_files = {name: content for name, content in final(made).items() if not name.endswith("results.json")}
    assert made_files.items() <= whole[0].items() and len(made_files) == len(whole[0]) - 2


def test_finished_layers_of_other_software_are_kept_and_it_is_said(work, made, monkeypatch, caplog):
    preparation.prepare(work)
    before = contents(made)
    caplog.set_level("INFO")
    monkeypatch.setattr(manifest, "code_hash", lambda: "another")
    preparation.prepare(work)
    assert contents(made) == before
    assert sum("kept (other software made it: the code in src/ has" in text for text in caplog.messages) == 2


def test_two_runs_at_once_do_not_meet(work, made):
    with exclusive(made):
        for run in (preparation.prepare, lambda asked: preparation.complete_existing(asked, None)):
            with pytest.raises(UserError, match=r"another run is at work there; .* another --data-root"):
                run(work)
    assert not (made / "sae_models").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_one_sentence_and_loses_nothing(work, made, whole, number):
    error = OSError(number, os.strerror(number))
    with stopped(os, "fsync", 51, error), pytest.raises(UserError, match=rf"training\.npz: .*{os.strerror(number)}"):
        preparation.prepare(work)
    preparation.prepare(work)
    assert final(made) == whole[0]


def test_a_disk_without_room_is_refused_at_the_start(work, made, monkeypatch):
    monkeypatch.setattr(preparation.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="GiB are free; free some, lower --max-memory-gb"):
        preparation.prepare(work)
    assert not (made / "sae_models").exists()


def test_catalogs_of_existing_saes_go_on(work, study, monkeypatch):
    work, root = replace(work, data_root=study.data_root), study.data_root
    paths = [path for layer in (1, 4) for path in root.glob(f"sae_models/layer{layer:02d}*/feature_*")]
    for path in paths:
        path.unlink()
    preparation.complete_existing(work, None)
    expected = contents(root)
    for path in paths:
        path.unlink()
    calls = count_calls(monkeypatch, DONE_ONCE)
    for stop in ("counting", "catalog of the second layer"):
        with stopped(*STOPS[stop]), pytest.raises(KeyboardInterrupt):
            preparation.complete_existing(work, None)
    preparation.complete_existing(work, None)
    n_cells = len(work.inputs.cells.cells)
    assert contents(root) == expected and calls["GeneFeatureCounts", "add"] == 2 * n_cells


def test_a_training_that_diverges_names_layer_and_step(work, made):
    training = replace(work.settings.training, lr=1e38)
    with pytest.raises(UserError, match=r"layer 1: training diverged, .* by step \d+;"):
        preparation.prepare(replace(work, settings=replace(work.settings, training=training)))
    assert not list(made.rglob("training.npz"))


def test_a_part_of_unknown_form_is_not_read(tmp_path):
    state = preparation_state.open_unfinished(tmp_path, "a", {"k": 1}, {"code": "x"}, mix_versions=False)
    state.write("counts.npz", {"n": np.arange(3)})
    again = preparation_state.open_unfinished(tmp_path, "a", {"k": 1}, {"code": "x"}, mix_versions=False)
    assert again.read("counts.npz", {"n": np.arange(3)})["n"].tolist() == [0, 1, 2]
    assert again.read("counts.npz", {"n": None}) is not None
    for like in ({"n": np.zeros(3)}, {"n": np.arange(4)}, {"m": np.arange(3)}, {"n": None, "m": None}, {}):
        assert again.read("counts.npz", like) is None
    with pytest.raises(UserError, match="k is 1 there and 2 here"):
        preparation_state.open_unfinished(tmp_path, "a", {"k": 2}, {"code": "x"}, mix_versions=True)
    again.clear()
    assert not list(tmp_path.rglob("unfinished"))
