"""Times in result files: real, or fixed by SOURCE_DATE_EPOCH so that two runs give the same bytes."""

import json
from pathlib import Path

import pytest

import exhaustive_feature_tracing
from cellcircuits.clock import fixed_time, recorded_moment, recorded_seconds
from cellcircuits.errors import UserError
from conftest import Study


def test_times_are_real_where_nothing_fixes_them(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    assert recorded_seconds(1.5) == 1.5
    assert recorded_moment(86400.25) == "1970-01-02T00:00:00.250000+00:00"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "")
    assert fixed_time() is None


def test_times_are_fixed_where_the_variable_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert recorded_seconds(1.5) == 0.0
    assert recorded_moment(5.0) == "1970-01-02T00:00:00+00:00"


@pytest.mark.parametrize("text", ["yesterday", "-1", "1.5", "9" * 30, "\u0661"])
def test_a_variable_that_is_no_time_is_refused(monkeypatch: pytest.MonkeyPatch, text: str):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", text)
    with pytest.raises(UserError, match="SOURCE_DATE_EPOCH"):
        recorded_seconds(1.0)


def test_two_runs_write_the_same_bytes(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        study.cells.touch()  # a copy of the inputs has other times
        assert exhaustive_feature_tracing.main([*study.flags(folder), "--features", "0,1,2"]) == 0
    of_one, of_two = ({p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in folders)
    assert of_one == of_two
    assert json.loads((folders[0] / "feature_0000.json").read_text())["elapsed_seconds"] == 0
