"""A device that runs out of memory in experiment 1: batches shrink, and what cannot shrink is one sentence."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from cellcircuits.effects import Bench
from conftest import Study
from test_tracing_script import refusal, trace

ERRORS = [torch.OutOfMemoryError("none left"), RuntimeError("MPS backend out of memory (allocated: 9.0 GB)")]


@pytest.fixture(scope="module")
def finished(study_template: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with memory enough that no test may change."""
    out_dir = tmp_path_factory.mktemp("finished")
    assert trace(study_template, out_dir, "--end-idx", "24") == 0
    return out_dir


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_batch_is_halved_and_the_run_goes_on(
    study_template: Study, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
):
    real, sizes = Bench.effects, []

    def tight(self, clean, features):
        if len(features) > 3:
            raise error
        sizes.append(len(features))
        return real(self, clean, features)

    monkeypatch.setattr(Bench, "effects", tight)
    assert trace(study_template, tmp_path, "--end-idx", "24") == 0
    assert 1 < max(sizes) <= 3
    found, expected = (pq.read_table(folder / "edges.parquet").to_pandas() for folder in (tmp_path, finished))
    names = ["source", "target_layer", "target", "n_cells"]
    assert found[names].equals(expected[names])


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize(
    "method, words", [("effects", "not even one feature fits"), ("clean", "its clean run does not fit")]
)
def test_what_cannot_shrink_is_one_sentence(
    study_template: Study, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch, method: str, words: str, error
):
    real = getattr(Bench, method)

    def none_left(self, one, *features):
        if (one.row if method == "clean" else one.cell.row) != 0:
            raise error
        return real(self, one, *features)

    monkeypatch.setattr(Bench, method, none_left)
    sentence = refusal(capsys, trace(study_template, tmp_path))
    assert words in sentence and "--max-tokens" in sentence


@pytest.mark.parametrize("method", ["effects", "clean"])
def test_another_failure_is_not_taken_for_it(
    study_template: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
):
    def broken(*_):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Bench, method, broken)
    with pytest.raises(RuntimeError, match="a defect"):
        trace(study_template, tmp_path)
