"""Whose a folder is: settings, software and what is refused."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from cellcircuits import manifest
from cellcircuits.errors import UserError
from cellcircuits.manifest import (
    check_folder,
    claim_folder,
    code_hash,
    origin,
    origin_differences,
    setting_differences,
    settings_fingerprint,
)

SETTINGS = {"source_layer": 5, "min_abs_d": 0.5, "saes": {"6": {"checkpoint": "aa", "mean": "bb"}}}
FIRST = {"code": "c1", "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "numpy": "2.3.1", "scanpy": "1.11.4"}}


def changed(code: str = "c1", **versions: str) -> dict[str, Any]:
    """FIRST with another code or other versions."""
    return {"code": code, "versions": FIRST["versions"] | versions}


def everything_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestClaimFolder:
    @pytest.mark.parametrize("name", ["feature_0001.json", "exhaustive_summary.json", "edges.parquet", "blocks"])
    def test_results_without_a_manifest_are_refused_and_left_alone(self, tmp_path: Path, name: str):
        (tmp_path / name).mkdir() if name == "blocks" else (tmp_path / name).write_text("mine")
        with pytest.raises(UserError, match=f"{name}.*without a manifest.json"):
            claim_folder(tmp_path, SETTINGS, {})
        assert [path.name for path in tmp_path.iterdir()] == [name]  # not even a lock file is added
        assert name == "blocks" or (tmp_path / name).read_text() == "mine"

    def test_a_folder_with_other_things_is_taken(self, tmp_path: Path):
        (tmp_path / "notes.txt").write_text("mine")
        assert claim_folder(tmp_path, SETTINGS, {}) == settings_fingerprint(SETTINGS)

    def test_every_difference_is_named_and_nothing_changes(self, tmp_path: Path):
        claim_folder(tmp_path, SETTINGS, {})
        before = (tmp_path / "manifest.json").read_bytes()
        other = {"source_layer": 5, "min_abs_d": 0.8, "saes": {"6": {"checkpoint": "aa", "mean": "cc"}}, "new": 1}
        with pytest.raises(UserError) as refused:
            claim_folder(tmp_path, other, {"device": "cuda"})
        expected = 'min_abs_d is 0.5 there and 0.8 here; saes.6.mean is "bb" there and "cc" here; new is null there'
        assert expected in str(refused.value) and "source_layer" not in str(refused.value)
        assert (tmp_path / "manifest.json").read_bytes() == before

    def test_long_values_are_cut(self):
        (difference,) = setting_differences({"cells": "a" * 64}, {"cells": "b" * 64})
        assert difference == f'cells is "{"a" * 13}... there and "{"b" * 13}... here'

    def test_provenance_grows_by_what_is_new_only(self, tmp_path: Path):
        cpu, gpu = {"device": "cpu"}, {"device": "cuda"}
        fingerprints = {claim_folder(tmp_path, SETTINGS, origin) for origin in (cpu, cpu, gpu, cpu)}
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest == {"schema_version": 1, "settings": SETTINGS, "provenance": [cpu, gpu]}
        assert fingerprints == {settings_fingerprint(SETTINGS)}

    def test_fingerprint_depends_on_every_value_and_on_no_order(self):
        print_of = settings_fingerprint(SETTINGS)
        assert settings_fingerprint(dict(reversed(SETTINGS.items()))) == print_of
        assert settings_fingerprint(SETTINGS | {"saes": {"6": {"checkpoint": "aa", "mean": "bc"}}}) != print_of
        assert len(print_of) == 64

    @pytest.mark.parametrize("content", ["{", "[]", "{}", '{"settings": {}}', '{"settings": {"source_layer": "5"}}'])
    def test_a_file_that_is_no_manifest_is_refused(self, tmp_path: Path, content: str):
        (tmp_path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json"):
            claim_folder(tmp_path, SETTINGS, {})
        assert (tmp_path / "manifest.json").read_text() == content


class TestCodeHash:
    @pytest.fixture
    def sources(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "library").mkdir()
        for name, content in (("run.py", "a = 1"), ("library/b.py", "b = 2"), ("notes.txt", "x")):
            (tmp_path / name).write_text(content)
        monkeypatch.setattr(manifest, "SOURCES", tmp_path)
        return tmp_path

    def test_is_over_names_and_bytes_in_order(self, sources: Path):
        expected = hashlib.sha256(b"library/b.py 5 b = 2" + b"run.py 5 a = 1").hexdigest()
        assert code_hash.__wrapped__() == expected

    def test_other_files_do_not_count(self, sources: Path):
        before = code_hash.__wrapped__()
        (sources / "notes.txt").write_text("y")
        (sources / ".#run.py").symlink_to("nobody@nowhere")  # what Emacs leaves
        (sources / "library" / ".hidden").mkdir()
        (sources / "library" / ".hidden" / "copy.py").write_text("c = 3")
        assert code_hash.__wrapped__() == before

    @pytest.mark.parametrize("name, content", [("run.py", "a = 2"), ("library/c.py", ""), ("library/b.py", "b = 2 ")])
    def test_every_other_change_does(self, sources: Path, name: str, content: str):
        before = code_hash.__wrapped__()
        (sources / name).write_text(content)
        assert code_hash.__wrapped__() != before

    def test_a_new_name_does(self, sources: Path):
        before = code_hash.__wrapped__()
        (sources / "run.py").rename(sources / "ran.py")
        assert code_hash.__wrapped__() != before


class TestOrigin:
    def test_what_computes_here(self):
        here = origin()
        assert here["code"] == code_hash() and len(here["code"]) == 64
        assert here["versions"]["torch"] == torch.__version__ and here["versions"]["numpy"] == numpy.__version__
        assert set(here) == {"code", "versions", "machine"} and set(here["machine"]) == {"system", "processor"}
        assert {"python", "transformers", "scipy", "anndata", "scanpy", "pandas", "h5py", "pyarrow"} < set(
            here["versions"]
        )

    @pytest.mark.parametrize(
        "kept, said",
        [
            (FIRST, []),
            (changed(numpy="2.4.0"), ["numpy 2.4.0 -> 2.3.1"]),
            (changed(torch="2.13.0+cu130"), []),
            (changed(torch="2.12.0+cpu"), ["torch 2.12.0+cpu -> 2.13.0+cpu"]),
            (changed(python="3.12.1", scanpy="1.12"), []),
            (changed("c0", numpy="2.2.0"), ["the code in src/ has changed", "numpy 2.2.0 -> 2.3.1"]),
            ({"versions": {"numpy": "2.2.0"}}, ["made before code was recorded", "numpy 2.2.0 -> 2.3.1"]),
            ({"code": "c1", "versions": "damaged"}, []),
        ],
    )
    def test_differences_that_can_change_numbers(self, kept: dict[str, Any], said: list[str]):
        assert origin_differences(kept, FIRST) == said

    def test_further_libraries(self):
        assert origin_differences(changed(scanpy="1.12"), FIRST, ("scanpy",)) == ["scanpy 1.12 -> 1.11.4"]


class TestOtherSoftware:
    def test_each_difference_is_named_and_nothing_changes(self, tmp_path: Path):
        claim_folder(tmp_path, SETTINGS, FIRST)
        before = everything_in(tmp_path)
        with pytest.raises(UserError) as refused:
            claim_folder(tmp_path, SETTINGS, changed("c2", numpy="2.4.0"))
        assert "(the code in src/ has changed; numpy 2.3.1 -> 2.4.0)" in str(refused.value)
        assert "--out-dir" in str(refused.value) and "--mix-versions" in str(refused.value)
        assert everything_in(tmp_path) == before

    def test_mixed_it_is_recorded_and_both_go_on(self, tmp_path: Path):
        second, third = changed(numpy="2.4.0"), changed(numpy="2.4.1")
        claim_folder(tmp_path, SETTINGS, FIRST)
        claim_folder(tmp_path, SETTINGS, second, mix_versions=True)
        for known in (FIRST, second, FIRST | {"device": "cuda"}):
            claim_folder(tmp_path, SETTINGS, known)
        with pytest.raises(UserError, match=r"numpy 2\.3\.1 -> 2\.4\.1"):  # against the last one
            claim_folder(tmp_path, SETTINGS, third)
        kept = json.loads((tmp_path / "manifest.json").read_text())
        assert kept["provenance"] == [FIRST, second, FIRST | {"device": "cuda"}]

    def test_a_folder_from_before_code_was_recorded(self, tmp_path: Path):
        claim_folder(tmp_path, SETTINGS, {"versions": FIRST["versions"]})
        with pytest.raises(UserError, match="made before code was recorded"):
            claim_folder(tmp_path, SETTINGS, FIRST)
        claim_folder(tmp_path, SETTINGS, FIRST, mix_versions=True)
        claim_folder(tmp_path, SETTINGS, FIRST)

    def test_scanpy_counts_where_it_orders_the_cells(self, tmp_path: Path):
        settings = {"experiment": "trajectory_analysis", "layers": [1]}
        claim_folder(tmp_path / "a", settings, FIRST)
        with pytest.raises(UserError, match="scanpy"):
            claim_folder(tmp_path / "a", settings, changed(scanpy="1.12"))
        claim_folder(tmp_path / "b", SETTINGS, FIRST)
        claim_folder(tmp_path / "b", SETTINGS, changed(scanpy="1.12"))

    def test_other_settings_are_refused_even_when_mixed(self, tmp_path: Path):
        claim_folder(tmp_path, SETTINGS, FIRST)
        with pytest.raises(UserError, match="min_abs_d"):
            claim_folder(tmp_path, SETTINGS | {"min_abs_d": 1.0}, changed("c2"), mix_versions=True)


class TestCheckFolder:
    def test_a_new_folder_stays_absent(self, tmp_path: Path):
        assert check_folder(tmp_path / "new", SETTINGS, FIRST) is False
        assert check_folder(tmp_path, SETTINGS, FIRST) is False
        assert list(tmp_path.iterdir()) == []

    def test_a_run_to_go_on_with(self, tmp_path: Path):
        claim_folder(tmp_path, SETTINGS, FIRST)
        before = everything_in(tmp_path)
        assert check_folder(tmp_path, SETTINGS, FIRST) and check_folder(tmp_path, SETTINGS)
        assert check_folder(tmp_path, SETTINGS, changed("c2"), mix_versions=True)
        assert everything_in(tmp_path) == before

    @pytest.mark.parametrize("settings, provenance", [(SETTINGS | {"min_abs_d": 1}, FIRST), (SETTINGS, changed("c2"))])
    def test_refuses_as_a_run_would(self, tmp_path: Path, settings: dict, provenance: dict):
        claim_folder(tmp_path, SETTINGS, FIRST)
        sentences = []
        for look in (check_folder, claim_folder):
            with pytest.raises(UserError) as refused:
                look(tmp_path, settings, provenance)
            sentences.append(str(refused.value))
        assert sentences[0] == sentences[1]

    def test_stray_results(self, tmp_path: Path):
        (tmp_path / "edges.parquet").write_text("mine")
        with pytest.raises(UserError, match=r"edges\.parquet.*without a manifest"):
            check_folder(tmp_path, SETTINGS)


@pytest.mark.parametrize("look", [check_folder, claim_folder])
@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("gone")])
def test_a_manifest_that_is_no_file_is_one_sentence(tmp_path: Path, look, make):
    path = tmp_path / "manifest.json"
    make(path)
    with pytest.raises(UserError, match=r"manifest\.json: (cannot be read|no such file)"):
        look(tmp_path, SETTINGS, FIRST)
    assert path.is_symlink() or path.is_dir()
