"""Rows of a long pass over cells come back after a kill as they were saved, or not at all."""

from pathlib import Path

import numpy as np
import pytest

from cellcircuits import kept_rows
from cellcircuits.kept_rows import KeptRows, remove_rows

N_CELLS = 7


def empty() -> dict[str, np.ndarray]:
    return {"a": np.zeros((N_CELLS, 3), dtype=np.float32), "b": np.zeros((N_CELLS, 2), dtype=np.float32)}


def fill(kept: KeptRows, until: int) -> None:
    """Finish the cells up to `until`; the row of cell i says i + 1."""
    for i in range(kept.n_done, until):
        for array in kept.arrays.values():
            array[i] = i + 1
        kept.finished(i + 1)


def rows_of(kept: KeptRows) -> list[float]:
    assert (kept.arrays["a"][:, :1] == kept.arrays["b"]).all()
    return kept.arrays["a"][:, 0].tolist()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cells 0 to 4, saved after the third and the fifth."""
    kept = KeptRows(empty(), tmp_path / "rows", "f")
    for until in (3, 5):
        fill(kept, until)
        kept.save()
    fill(kept, 6)  # not saved
    return tmp_path / "rows"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_save_is_a_file_of_new_rows(saved: Path):
    assert names(saved) == ["rows_0000000.npz", "rows_0000003.npz"]
    with np.load(saved / "rows_0000003.npz") as content:
        assert content["a"].shape == (2, 3)


def test_the_saved_rows_come_back(saved: Path):
    kept = KeptRows(empty(), saved, "f")
    assert kept.n_done == 5 and rows_of(kept) == [1, 2, 3, 4, 5, 0, 0]
    fill(kept, N_CELLS)
    assert rows_of(kept) == list(range(1, N_CELLS + 1))


def test_saving_goes_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(kept_rows.time, "monotonic", lambda: now[0])
    kept = KeptRows(empty(), tmp_path, "f")
    for i in range(N_CELLS):
        now[0] += 80  # so the third and the sixth are more than 180 s after the last save
        fill(kept, i + 1)
    assert names(tmp_path) == ["rows_0000000.npz", "rows_0000003.npz"]
    assert kept_rows.SAVE_EVERY_SECONDS <= 300


def test_nothing_new_is_not_saved(saved: Path):
    before = names(saved)
    KeptRows(empty(), saved, "f").save()
    assert names(saved) == before


@pytest.mark.parametrize("number, n_done", [(0, 0), (3, 3)])
def test_a_damaged_file_is_said_and_made_again(saved: Path, caplog, number: int, n_done: int):
    path = saved / f"rows_{number:07d}.npz"
    path.write_bytes(path.read_bytes()[:100])
    kept = KeptRows(empty(), saved, "f")
    assert kept.n_done == n_done and f"{path} is damaged" in caplog.text
    fill(kept, N_CELLS)
    kept.save()
    assert rows_of(KeptRows(empty(), saved, "f")) == list(range(1, N_CELLS + 1))


def test_a_folder_in_its_place_is_said(saved: Path, caplog):
    (saved / "rows_0000003.npz").unlink()
    (saved / "rows_0000003.npz").mkdir()
    assert KeptRows(empty(), saved, "f").n_done == 3
    assert "is damaged (IsADirectoryError)" in caplog.text


def test_rows_of_another_run_are_not_used(saved: Path, caplog):
    kept = KeptRows(empty(), saved, "g")
    assert kept.n_done == 0 and rows_of(kept) == [0] * N_CELLS and "of another run" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        {"a": np.ones((2, 4), np.float32), "b": np.ones((2, 2), np.float32)},
        {"a": np.ones((2, 3)), "b": np.ones((2, 2), np.float32)},
        {"a": np.ones((2, 3), np.float32), "b": np.ones((1, 2), np.float32)},
        {"a": np.ones((8, 3), np.float32), "b": np.ones((8, 2), np.float32)},
    ],
)
def test_rows_of_another_form_are_not_used(tmp_path: Path, caplog, content):
    np.savez(tmp_path / "rows_0000000.npz", fingerprint=np.array("f"), **content)
    kept = KeptRows(empty(), tmp_path, "f")
    assert kept.n_done == 0 and rows_of(kept) == [0] * N_CELLS and "does not fit" in caplog.text


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    kept = KeptRows(empty(), None, "f")
    fill(kept, 3)
    kept.save()
    assert list(tmp_path.iterdir()) == []


def test_removing_leaves_what_others_have_there(saved: Path):
    (saved / "notes.txt").write_text("mine")
    remove_rows(saved)
    assert names(saved) == ["notes.txt"]
    (saved / "notes.txt").unlink()
    remove_rows(saved)
    assert not saved.exists()
    remove_rows(saved)
