"""Files are whole or absent, whatever the libraries that fill them make of an error; and what is said of it."""

import errno
import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from cellcircuits.errors import UserError, cannot_write
from cellcircuits.jsonio import create_json, discard, read_json, write_atomically, write_json
from cellcircuits.results import HALF_WRITTEN


class FailingFile:
    """Stands for a file on a disk that is full after some writes, or whose reader pressed Ctrl-C."""

    def __init__(self, stream, error: BaseException, after: int):
        self.stream, self.error, self.left = stream, error, after

    def write(self, data) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.stream.write(data)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.stream.close()


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Make every file that is opened for writing fail after some writes."""

    def install(error: BaseException, after: int) -> None:
        real = Path.open
        monkeypatch.setattr(
            Path,
            "open",
            lambda path, mode="r", *a, **k: (
                FailingFile(real(path, mode, *a, **k), error, after) if mode == "wb" else real(path, mode, *a, **k)
            ),
        )

    return install


WRITERS = {
    "json": lambda stream: stream.write(b"{}"),
    "npy": lambda stream: np.save(stream, np.zeros(10_000)),
    "npz": lambda stream: np.savez(stream, a=np.zeros(10_000)),
    "torch": lambda stream: torch.save({"a": torch.zeros(10_000)}, stream),
}


def drops_errors(stream) -> None:
    try:
        stream.write(b"x")
    except OSError:
        pass


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
class TestWhateverALibraryMakesOfIt:
    def test_a_full_disk_is_said(self, tmp_path: Path, failing, writer, after: int):
        (tmp_path / "a").write_bytes(b"old")
        failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), after)
        try:
            write_atomically(tmp_path / "a", writer)
        except UserError as error:
            assert str(error).startswith(f"{tmp_path / 'a'}: cannot be written (No space left on device); free some")
            assert (tmp_path / "a").read_bytes() == b"old"
        else:  # so few writes that none failed
            assert after and writer in (WRITERS["json"], WRITERS["npy"])
        assert [path.name for path in tmp_path.iterdir()] == ["a"]

    def test_ctrl_c_stays_ctrl_c(self, tmp_path: Path, failing, writer, after: int):
        (tmp_path / "a").write_bytes(b"old")
        failing(KeyboardInterrupt(), after)
        try:
            write_atomically(tmp_path / "a", writer)
        except KeyboardInterrupt:
            assert (tmp_path / "a").read_bytes() == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_an_error_that_a_library_drops_is_found(tmp_path: Path, failing):
    failing(OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), 0)
    with pytest.raises(UserError, match="quota"):
        write_atomically(tmp_path / "a", drops_errors)
    assert list(tmp_path.iterdir()) == []


def test_the_name_is_brought_to_the_disk_after_the_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real, synced = os.fsync, []

    def fsync(number: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(number).st_mode)
        synced.append(("folder" if is_folder else "file", (tmp_path / "a.json").exists()))
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", {})
    assert synced == [("file", False), ("folder", True)]
    synced.clear()
    assert create_json(tmp_path / "a.json", {}) is False
    (tmp_path / "a.json").unlink()
    synced.clear()
    assert create_json(tmp_path / "a.json", {}) is True
    assert synced == [("file", False), ("folder", True)]


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.fsync

    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_json(tmp_path / "a.json", {"b": 1})
    assert (tmp_path / "a.json").is_file()


@pytest.mark.parametrize(
    "number, words",
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "make it writable"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EACCES, "ask for the right"),
        (errno.EISDIR, "Is a directory"),
    ],
)
def test_each_cause_has_its_mend(number: int, words: str):
    said = str(cannot_write(Path("out/a.json"), OSError(number, os.strerror(number))))
    assert said.startswith("out/a.json: cannot be written (") and words in said
    assert said.endswith("what was finished is kept.") and said.count(". ") == 0


def test_an_error_without_a_number_says_its_own_words():
    assert "(10 requested and 0 written)" in str(cannot_write(Path("a"), OSError("10 requested and 0 written")))


def test_discarding_harms_nobody(tmp_path: Path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    for name in ("file", "folder", "absent"):
        discard(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_are_indented_by_two_and_folders_made(tmp_path: Path):
    path = tmp_path / "new" / "deep" / "a.json"
    write_json(path, {"label": "naïve", "n": [1]})
    assert path.read_bytes() == b'{\n  "label": "na\\u00efve",\n  "n": [\n    1\n  ]\n}'


@pytest.mark.parametrize("name", ["manifest.json", "feature_0007.json", "edges.parquet", "block_00016.partial.npz"])
def test_what_a_killed_run_leaves_is_known_to_the_next_one(tmp_path: Path, name: str):
    seen = []
    write_atomically(tmp_path / name, lambda stream: seen.extend(tmp_path.iterdir()))
    assert [bool(HALF_WRITTEN.fullmatch(path.name)) for path in seen] == [True]


class TestReading:
    @pytest.mark.parametrize("text", ["[1, 2, 3]", '{"a": 1, "b": {}}', "[[[]], {}]", '["::::"]', "[{}, {}]"])
    def test_a_file_of_too_many_values_is_refused_before_it_is_parsed(self, tmp_path: Path, monkeypatch, text: str):
        path = tmp_path / "a.json"
        path.write_text(text)
        n_values = sum(map(text.count, ",:[{"))
        monkeypatch.setattr("cellcircuits.jsonio.MAX_JSON_VALUES", n_values)
        assert read_json(path) == json.loads(text)
        monkeypatch.setattr("cellcircuits.jsonio.MAX_JSON_VALUES", n_values - 1)
        with pytest.raises(UserError) as refused:
            read_json(path)
        assert str(refused.value) == f"{path}: holds more than {n_values - 1:,} values; restore or remove the file."

    def test_a_file_that_is_too_large_is_called_what_it_should_be(self, tmp_path: Path, monkeypatch):
        monkeypatch.setattr("cellcircuits.jsonio.MAX_JSON_BYTES", 3)
        (tmp_path / "a.json").write_text("[1, 2]")
        with pytest.raises(UserError, match=r"too large for JSON \(more than 3 bytes\)"):
            read_json(tmp_path / "a.json")
