"""What is said where a folder cannot be used: each sentence names the folder, the flag and the way on."""

import errno
import fcntl
import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from cellcircuits.errors import UserError
from cellcircuits.jsonio import create_json, write_atomically
from cellcircuits.manifest import check_folder, claim_folder, open_folder, require_same_origin, setting_differences
from cellcircuits.results import exclusive, one_at_a_time, quantity_note, shared

SETTINGS = {"experiment": "exhaustive_feature_tracing", "source_layer": 5}


def refusal(call, *args: Any) -> str:
    """The sentence that a call is refused with."""
    with pytest.raises(UserError) as refused:
        call(*args)
    return str(refused.value)


def refused_entry(lock: AbstractContextManager) -> str:
    """The sentence that entering a `with` is refused with."""
    return refusal(lock.__enter__)


def claim(folder: Path, **settings: Any) -> Path:
    claim_folder(folder, settings, {})
    return folder


class TestOtherRunsAtWork:
    @pytest.mark.parametrize("first", [exclusive, shared])
    def test_the_folder_and_the_flag_that_names_it(self, tmp_path: Path, first):
        with first(tmp_path):
            in_words = f"{tmp_path}: another run is at work there; wait for it or choose another "
            assert refused_entry(exclusive(tmp_path)) == f"{in_words}--out-dir."
            assert refused_entry(exclusive(tmp_path, "--data-root")) == f"{in_words}--data-root."
            if first is exclusive:
                assert refused_entry(shared(tmp_path)) == f"{in_words}--out-dir."

    @pytest.mark.parametrize("lock, alone", [(exclusive, "no other run"), (shared, "no run of another experiment")])
    def test_without_locks_the_user_is_told_to_take_care(self, tmp_path: Path, monkeypatch, caplog, lock, alone: str):
        def flock(*_: object) -> None:
            raise OSError(errno.ENOTSUP, "not supported")

        monkeypatch.setattr(fcntl, "flock", flock)
        with lock(tmp_path), one_at_a_time(tmp_path):
            pass
        assert caplog.messages == [f"{tmp_path} cannot be locked (not supported); let {alone} work in it."]

    @pytest.mark.parametrize("lock", [exclusive, shared, one_at_a_time])
    def test_a_folder_that_cannot_be_made_is_named(self, tmp_path: Path, lock):
        (tmp_path / "file").write_text("mine")
        folder = tmp_path / "file" / "out"
        assert refused_entry(lock(folder)).startswith(f"{folder}: cannot be written (Not a directory); ")

    def test_the_lock_files_are_hidden_and_stay(self, tmp_path: Path):
        with shared(tmp_path / "new" / "out"):
            pass
        assert {path.name for path in (tmp_path / "new" / "out").iterdir()} == {".lock", ".moment.lock"}

    def test_a_run_of_its_own_keeps_one_at_a_time_free(self, tmp_path: Path):
        with exclusive(tmp_path), one_at_a_time(tmp_path):
            pass


def test_what_is_half_written_in_every_subfolder_is_removed(tmp_path: Path):
    left = [
        tmp_path / folder / name
        for folder in (".", "blocks", "partial", "effects")
        for name in (".manifest.json.1.tmp", ".L1_F2_x_L2_F3.npz.1.tmp")
    ]
    kept = [tmp_path / "other" / ".manifest.json.1.tmp", tmp_path / "blocks" / "manifest.json.1.tmp"]
    for path in (*left, *kept):
        path.parent.mkdir(exist_ok=True)
        path.write_text("")
    with exclusive(tmp_path):
        assert [path for path in (*left, *kept) if path.exists()] == kept


def test_half_written_files_that_cannot_be_removed_stop_nobody(tmp_path: Path):
    folder, file = tmp_path / ".manifest.json.1.tmp", tmp_path / ".progress.json.1.tmp"
    folder.mkdir()
    file.write_text("")
    with exclusive(tmp_path):
        assert folder.exists() and not file.exists()


class TestOpenFolder:
    def test_no_run(self, tmp_path: Path):
        assert refusal(open_folder, tmp_path) == (
            f"{tmp_path}: holds no run (no manifest.json); run without --analysis-only first, or fix --out-dir."
        )

    def test_another_experiment(self, tmp_path: Path):
        folder = claim(tmp_path, **SETTINGS)
        assert open_folder(folder)["settings"] == SETTINGS
        assert open_folder(folder, "exhaustive_feature_tracing") == open_folder(folder)
        assert refusal(open_folder, folder, "trajectory_steering") == (
            f"{folder}: holds another experiment (exhaustive_feature_tracing); fix --out-dir."
        )

    @pytest.mark.parametrize(
        "experiment, key, good, bad",
        [
            ("exhaustive_feature_tracing", "source_layer", 5, [5]),
            ("higher_order_ablation", "order", 2, "2"),
            ("trajectory_steering", "alphas", [2.0], 2.0),
            ("trajectory_analysis", "layers", [1], 1),
            (None, "source_layer", 5, True),  # of an older release
            ("something newer", "source_layer", 5, None),
        ],
    )
    def test_the_setting_that_every_manifest_has(self, tmp_path: Path, experiment, key: str, good: Any, bad: Any):
        named = {} if experiment is None else {"experiment": experiment}
        assert open_folder(claim(tmp_path / "good", **named, **{key: good}))["settings"][key] == good
        for settings in (named | {key: bad}, named, named | {f"{key}x": good}):
            folder = tmp_path / str(len(settings)) / str(len(list(tmp_path.iterdir())))
            folder.mkdir(parents=True)
            (folder / "manifest.json").write_text(json.dumps({"settings": settings}))
            assert refusal(open_folder, folder) == (
                f"{folder / 'manifest.json'}: is not the manifest of an experiment; fix --out-dir."
            )


def test_other_settings_and_both_ways_on(tmp_path: Path):
    claim(tmp_path, **SETTINGS)
    assert refusal(claim_folder, tmp_path, SETTINGS | {"source_layer": 6}, {}) == (
        f"{tmp_path}: holds a run with other settings (source_layer is 5 there and 6 here); choose another --out-dir, "
        "or run with those settings to go on there."
    )


@pytest.mark.parametrize("look", [claim_folder, check_folder])
def test_settings_that_are_no_numbers_are_a_defect(tmp_path: Path, look):
    claim(tmp_path, **SETTINGS)
    with pytest.raises(ValueError):
        look(tmp_path, SETTINGS | {"source_layer": float("nan")}, {})


def test_results_of_nobody(tmp_path: Path):
    (tmp_path / "edges.parquet").write_text("mine")
    assert refusal(claim_folder, tmp_path, SETTINGS, {}) == (
        f"{tmp_path}: holds results (edges.parquet) without a manifest.json, so nobody can say what they were made "
        "from; they are left alone, choose another --out-dir."
    )


@pytest.mark.parametrize("damaged", [{}, {"provenance": None}, {"provenance": {"code": "a"}}, {"provenance": ["b"]}])
def test_a_manifest_whose_provenance_is_damaged_can_be_gone_on_with(tmp_path: Path, damaged: dict[str, Any]):
    (tmp_path / "manifest.json").write_text(json.dumps({"settings": SETTINGS, **damaged}))
    claim_folder(tmp_path, SETTINGS, {"code": "c"})
    kept = json.loads((tmp_path / "manifest.json").read_text())
    others = damaged.get("provenance")
    assert kept["settings"] == SETTINGS
    assert kept["provenance"] == [*(others if isinstance(others, list) else []), {"code": "c"}]


class TestWhereChosenFeaturesComeFrom:
    HERE: dict[str, Any] = {"model": "m", "saes": {"1": {"checkpoint": "a"}, "4": {"checkpoint": "b"}}}  # noqa: RUF012

    def check(self, *folders: Path) -> None:
        require_same_origin("--pairs", folders, self.HERE)

    def folder(self, tmp_path: Path, **other: Any) -> Path:
        return claim(tmp_path, **SETTINGS, **(self.HERE | other))

    def test_the_same_model_and_saes(self, tmp_path: Path):
        self.check(self.folder(tmp_path))

    def test_layers_that_only_one_of_the_runs_has_do_not_count(self, tmp_path: Path):
        self.check(self.folder(tmp_path, saes={"4": {"checkpoint": "b"}, "5": {"checkpoint": "other"}}))

    @pytest.mark.parametrize("saes", [None, "damaged"])
    def test_without_saes_the_model_decides(self, tmp_path: Path, saes: Any):
        self.check(self.folder(tmp_path / "same", saes=saes))
        assert "(model is " in refusal(self.check, self.folder(tmp_path / "other", saes=saes, model="n"))

    def test_without_a_manifest_nothing_is_checked(self, tmp_path: Path):
        self.check(tmp_path, tmp_path / "none")

    @pytest.mark.parametrize(
        "other, difference",
        [
            ({"model": "n"}, 'model is "n" there and "m" here'),
            ({"saes": {"4": {"checkpoint": "c"}}}, 'saes.4.checkpoint is "c" there and "b" here'),
            ({"model": None, "saes": {"1": {}}}, 'model is null there and "m" here; '
             'saes.1.checkpoint is null there and "a" here'),
        ],
    )  # fmt: skip
    def test_another_model_or_sae_is_named_in_whichever_folder(self, tmp_path: Path, other: dict, difference: str):
        good, bad = self.folder(tmp_path / "good"), self.folder(tmp_path / "bad", **other)
        in_words = (
            f"--pairs: {bad} was made with another model or SAE ({difference}), so its features are others; make it "
            "again with these."
        )
        assert refusal(self.check, good, bad) == refusal(self.check, bad, good) == in_words


def test_differences_are_in_the_order_of_the_settings_and_nested_ones_by_their_path():
    kept = {"a": 1, "b": {"c": {"d": 1, "e": 2}}, "f": [1], "g": {"h": 1}}
    now = {"i": 0, "b": {"c": {"d": 1, "e": 3}}, "f": [2], "g": 7, "a": 1}
    assert list(setting_differences(kept, now)) == [
        "b.c.e is 2 there and 3 here", "f is [1] there and [2] here", 'g is {"h": 1} there and 7 here',
        "i is null there and 0 here",
    ]  # fmt: skip


@pytest.mark.parametrize("length, is_cut", [(38, False), (39, True)])
def test_values_of_more_than_forty_characters_are_cut(length: int, is_cut: bool):
    value = "".join(chr(ord("a") + i % 26) for i in range(length))
    shown = f'"{value[:13]}...' if is_cut else f'"{value}"'
    assert list(setting_differences({"x": value}, {"x": 1})) == [f"x is {shown} there and 1 here"]


def test_headings_say_same_position_effects_only_where_they_are():
    assert quantity_note({"quantity": "same_position"}) == " (same-position effects)"
    assert quantity_note({"quantity": "total"}) == quantity_note({}) == ""


def test_a_file_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    path = tmp_path / "file" / "out" / "a.json"
    for write in (lambda: create_json(path, {}), lambda: write_atomically(path, lambda stream: None)):
        assert refusal(write).startswith(f"{path}: cannot be written (Not a directory); ")
