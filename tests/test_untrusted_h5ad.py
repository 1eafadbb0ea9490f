"""The .h5ad reader and its process: the same tables and rows as AnnData's own reader, and one error for a crash."""

import io
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import exhaustive_feature_tracing
from cell_fixtures import GENES, random_counts, write_cells
from cellcircuits.errors import UserError
from cellcircuits.h5ad import H5adFile
from cellcircuits.h5ad_child import limit, serve
from cellcircuits.h5ad_content import StoredCells
from cellcircuits.h5ad_frames import receive, send, text_array, texts_of
from conftest import Study

ROOM = 1 << 30
SRC = Path(__file__).parents[1] / "src"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_cells(tmp_path / "a.h5ad", sparse.csr_matrix(random_counts()), GENES)


def refusal(path: Path, read=lambda file: file.obs()) -> str:
    with pytest.raises(UserError) as caught, H5adFile(path) as file:
        read(file)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def in_this_process(path: Path, key: str = "obs") -> str:
    """What the reader says, without a process around it."""
    with pytest.raises(UserError) as caught:
        StoredCells(path, ROOM).table(key)
    return str(caught.value)


class TestTables:
    def test_are_those_of_anndata(self, tmp_path: Path) -> None:
        n = 30
        obs = pd.DataFrame(
            {
                "text": [f"é{i}" for i in range(n)],
                "kind": pd.Categorical(["a", "b", None] * 10, categories=["b", "a", "c"], ordered=True),
                "depth": np.arange(n, dtype=np.float32) / 3,
                "even": np.arange(n) % 2 == 0,
                "number": np.arange(n, dtype=np.uint16),
                "maybe": pd.array([1, None, 3] * 10, dtype="Int64"),
                "perhaps": pd.array([True, None, False] * 10, dtype="boolean"),
                "slash": pd.Categorical(np.arange(n) % 3),
            },
            index=[f"cell{i}" for i in range(n)],
        )
        path = tmp_path / "a.h5ad"
        data = anndata.AnnData(random_counts(), obs=obs, var=pd.DataFrame({"symbol": GENES}, index=GENES))
        data.obs.index.name = "barcode"
        data.write_h5ad(path)
        expected = anndata.read_h5ad(path)
        with H5adFile(path) as file:
            pd.testing.assert_frame_equal(file.obs(), expected.obs)
            pd.testing.assert_frame_equal(file.var("X"), expected.var)

    def test_of_text_with_missing_values(self, path: Path) -> None:
        with h5py.File(path, "r+") as file:
            group = file["obs"].create_group("maybe")
            group.attrs["encoding-type"] = "nullable-string-array"
            group["values"] = np.array(["x"] * 30, dtype=h5py.string_dtype())
            group["mask"] = np.arange(30) % 3 == 0
            names = [*file["obs"].attrs["column-order"], "maybe"]
            file["obs"].attrs["column-order"] = np.array(names, dtype=h5py.string_dtype())
        with H5adFile(path) as file:
            column = file.obs()["maybe"]
        assert column.isna().tolist() == [i % 3 == 0 for i in range(30)]
        assert set(column.dropna()) == {"x"}

    def test_with_categories_as_old_anndata_wrote_them(self, path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file["obs/__categories/line"] = np.array([b"K562", b"RPE1"])
            file["obs/line"] = (np.arange(30) % 3 - 1).astype("i1")
            file["obs/line"].attrs["categories"] = file["obs/__categories/line"].ref
            file["obs"].attrs["column-order"] = np.array(["line"], dtype=h5py.string_dtype())
        with H5adFile(path) as file:
            line = file.obs()["line"]
        assert line.isna().sum() == 10
        assert line.cat.categories.tolist() == ["K562", "RPE1"]

    def test_in_another_byte_order(self, path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file["obs/depth"] = np.arange(30, dtype=">i4")
            file["obs"].attrs["column-order"] = np.array(["depth"], dtype=h5py.string_dtype())
        with H5adFile(path) as file:
            assert file.obs()["depth"].tolist() == list(range(30))

    @pytest.mark.parametrize(
        ("change", "what"),
        [
            (lambda obs: obs.attrs.modify("encoding-type", "dict"), "obs is not a table"),
            (lambda obs: obs.attrs.create("column-order", np.array([b"gene", b"gene"])), "two columns have one name"),
            (lambda obs: obs.attrs.modify("_index", "absent"), "cannot be read"),
            (lambda obs: obs.__setitem__("odd", np.zeros((30, 2))), "no list of values"),
            (lambda obs: obs.__setitem__("odd", np.zeros(30, "c8")), "neither numbers nor text"),
            (lambda obs: obs.__setitem__("odd", np.array([obs.ref] * 30, h5py.ref_dtype)), "neither numbers nor text"),
            (lambda obs: obs.__setitem__("odd", np.zeros(29)), "cannot be read"),
            (lambda obs: obs.create_group("odd"), "is no dataset"),
        ],
    )
    def test_that_make_no_sense(self, path: Path, change, what: str) -> None:
        with h5py.File(path, "r+") as file:
            change(file["obs"])
            if "odd" in file["obs"]:
                file["obs"].attrs["column-order"] = np.array(["odd"], dtype=h5py.string_dtype())
        assert what in refusal(path)


class TestOutside:
    """Content that no link names is reached by references, so every dataset is looked at when it is read."""

    def test_categories_behind_a_reference(self, path: Path, tmp_path: Path) -> None:
        (tmp_path / "secret").write_bytes(b"secret" * 10)
        with h5py.File(path, "r+") as file:
            hidden = file.create_dataset("hidden", (2,), "S6", external=[(str(tmp_path / "secret"), 0, 12)])
            file["obs/line"] = (np.arange(30) % 2).astype("i1")
            file["obs/line"].attrs["categories"] = hidden.ref
            file["obs"].attrs["column-order"] = np.array(["line"], dtype=h5py.string_dtype())
            file["keep"] = np.array([hidden.ref], h5py.ref_dtype)
            del file["hidden"]  # the reference may live on or be stale: neither may lead out
        said = refusal(path)
        assert "cannot be read" in said and "secret" not in said.replace(str(tmp_path), "")

    @pytest.mark.parametrize("target", ["/obs/gene", "/", "/nowhere", "/loop"])
    def test_soft_links_stay_inside(self, path: Path, target: str) -> None:
        with h5py.File(path, "r+") as file:
            del file["X"]
            file["X"] = h5py.SoftLink(target)
            file["loop"] = h5py.SoftLink("/loop")
        said = refusal(path)
        assert "has no X" in said or "too many links" in said

    def test_plug_ins_are_never_loaded(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with h5py.File(path, "r+") as file:
            values = np.arange(30, dtype="f4")
            made = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            made.set_chunk((30,))
            made.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (1,))
            space, kind = h5py.h5s.create_simple((30,)), h5py.h5t.py_create(values.dtype)
            h5py.h5d.create(file["obs"].id, b"depth", kind, space, dcpl=made).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
            file["obs"].attrs["column-order"] = np.array(["depth"], dtype=h5py.string_dtype())
        assert "HDF5 filter 32015" in refusal(path)
        monkeypatch.setenv("HDF5_PLUGIN_PATH", "/somewhere")
        with H5adFile(path) as file:
            environment = Path(f"/proc/{file._reader.pid}/environ")
            if environment.exists():
                assert b"HDF5_PLUGIN_PRELOAD=::" in environment.read_bytes()
                assert b"/somewhere" not in environment.read_bytes()


class TestSizes:
    @pytest.mark.parametrize("part", ["obs/gene/codes", "obs/_index", "X/indptr", "X/data"])
    def test_claimed_by_a_small_file(self, path: Path, part: str) -> None:
        with h5py.File(path, "r+") as file:
            attributes, dtype = dict(file[part].attrs), file[part].dtype
            del file[part]
            file.create_dataset(part, (10**12,), dtype, chunks=(1 << 16,))
            for key, value in attributes.items():
                file[part].attrs[key] = value
        assert path.stat().st_size < 10**6
        said = refusal(path, lambda file: (file.obs(), list(file.blocks("X", np.arange(30), (30, 12)))))
        assert "claims 1000000000000 values" in said

    def test_one_text_for_every_cell(self, path: Path) -> None:
        """A thousand references to one packed megabyte: 30 GB of text, if anyone let them."""
        with h5py.File(path, "r+") as file:
            del file["obs/_index"]
            n = 30_000
            file.create_dataset("obs/_index", (n,), h5py.string_dtype(), chunks=(n,), compression="gzip")
            file["obs/_index"][0] = "x" * 10**6
            raw = file["obs/_index"].id.read_direct_chunk((0,))[1]
            reference = zlib.decompress(raw)[:16]
            file["obs/_index"].id.write_direct_chunk((0,), zlib.compress(reference * n))
            file["obs/_index"].attrs["encoding-type"] = "string-array"
        said = refusal(path)
        assert "cannot be read" in said

    def test_a_column_that_no_machine_could_hold(self, path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file.create_dataset("obs/depth", (10**6,), "f8", data=np.zeros(10**6))
            file["obs"].attrs["column-order"] = np.array(["depth"], dtype=h5py.string_dtype())
        with pytest.raises(UserError, match="too much for a file of this size"):
            StoredCells(path, 10**6).table("obs")

    @pytest.mark.parametrize("shape", [[30.5, 12.0], [30], [-30, 12], [[30, 12]]])
    def test_shape_that_is_none(self, path: Path, shape: list) -> None:
        with h5py.File(path, "r+") as file:
            file["X"].attrs["shape"] = np.array(shape)
        assert "shape" in refusal(path, lambda file: list(file.blocks("X", np.arange(30), (30, 12))))

    @pytest.mark.parametrize("storage", [sparse.csr_matrix, sparse.csc_matrix])
    @pytest.mark.parametrize(
        ("part", "values", "what"),
        [
            ("indptr", np.arange(5), "row starts for"),
            ("indptr", np.zeros((2, 2), int), "no list of values"),
            ("indices", np.zeros(400), "no integers"),
            ("indices", np.zeros(3, int), "behind the stored values"),
            ("data", np.zeros((4, 4)), "no list of values"),
        ],
    )
    def test_sparse_parts_that_do_not_fit(self, tmp_path: Path, storage, part: str, values, what: str) -> None:
        path = write_cells(tmp_path / "a.h5ad", storage(random_counts()), GENES)
        with h5py.File(path, "r+") as file:
            del file["X"][part]
            file["X"][part] = values
        assert what in refusal(path, lambda file: list(file.blocks("X", np.arange(30), (30, 12))))


class TestProcess:
    @pytest.mark.parametrize(
        ("module", "absent"),
        [("h5ad", {"h5py", "anndata", "torch"}), ("h5ad_child", {"pandas", "scipy", "anndata", "torch"})],
    )
    def test_each_side_imports_its_own(self, module: str, absent: set[str]) -> None:
        program = f"import sys; sys.path.insert(0, {str(SRC)!r}); import cellcircuits.{module}; print(*sys.modules)"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert not absent & set(found.stdout.split())

    @pytest.mark.parametrize(
        ("number", "what"), [(signal.SIGSEGV, "SIGSEGV"), (signal.SIGXCPU, "4 seconds of computing")]
    )
    def test_a_crash_is_one_error(self, path: Path, number: int, what: str) -> None:
        with pytest.raises(UserError, match=what) as caught, H5adFile(path) as file:
            os.kill(file._reader.pid, number)
            file._reader.wait()
            file.obs()
        assert str(path) in str(caught.value)

    def test_a_crash_while_opening(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cellcircuits.h5ad._PROGRAM", "import os; os.abort()")
        assert "SIGABRT" in refusal(path)
        monkeypatch.setattr("cellcircuits.h5ad._PROGRAM", "raise SystemExit(7)")
        assert "status 7" in refusal(path)
        monkeypatch.setattr("cellcircuits.h5ad._PROGRAM", r"import os; os.write(1, b'\xff' * 100)")
        assert "too long a header" in refusal(path)

    def test_nothing_of_it_is_left_over(self, path: Path) -> None:
        with H5adFile(path) as file:
            process = file._reader
        assert process.poll() is not None
        with pytest.raises(UserError), H5adFile(path) as file:
            process = file._reader
            raise UserError("x")
        assert process.poll() is not None

    def test_modules_in_the_working_directory_are_not_imported(
        self, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("h5py", "json", "numpy", "cellcircuits"):
            (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
        monkeypatch.chdir(tmp_path)
        with H5adFile(path) as file:
            assert len(file.obs()) == 30
        assert not (tmp_path / "canary").exists()

    def test_a_block_left_unread_does_not_disturb_the_next_request(self, path: Path, monkeypatch) -> None:
        monkeypatch.setattr("cellcircuits.h5ad.BLOCK_BYTES", 700)
        with H5adFile(path) as file:
            blocks = file.blocks("X", np.arange(30), (30, 12))
            first = next(blocks)
            assert len(file.obs()) == 30
            again = np.vstack([block.toarray() for block in file.blocks("X", np.arange(30), (30, 12))])
        assert 0 < first.shape[0] < 30
        np.testing.assert_array_equal(again, random_counts())

    def test_limits(self) -> None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                limit(1 << 28, 5)
                bytearray(1 << 30)
            except MemoryError:
                code = 0
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == (0 if Path("/proc/self/statm").exists() else 1)

    def test_requests_and_replies(self, path: Path) -> None:
        requests, replies = io.BytesIO(), io.BytesIO()
        send(requests, {"ask": "table", "key": "obs"})
        send(requests, {"ask": "table", "key": "raw/var"})
        shape = {"matrix": "X", "shape": [30, 12], "block_bytes": 1 << 20}
        send(requests, {"ask": "blocks", **shape}, [np.arange(3)])
        send(requests, {"ask": "next"})
        requests.seek(0)
        with pytest.raises(EOFError):
            serve(path, ROOM, requests, replies)
        replies.seek(0)
        received = [receive(replies, ROOM) for _ in range(5)]
        assert received[0][0] == {"matrices": ["X"]}
        assert [name for name, _ in received[1][0]["columns"]] == ["gene"]
        assert "raw/var cannot be read" in received[2][0]["error"]
        assert received[3][0] == {"n_rows": 3}
        assert received[4][0] == {"end": True}
        assert receive(io.BytesIO(_reply_about(path.with_name("none"))), ROOM)[0]["error"]


def _reply_about(path: Path) -> bytes:
    replies = io.BytesIO()
    serve(path, ROOM, io.BytesIO(), replies)
    return replies.getvalue()


class TestMessages:
    def test_round_trip(self) -> None:
        stream = io.BytesIO()
        arrays = [np.arange(3), np.zeros(0), np.array([True]), text_array(["é", "\ud800", ""])]
        send(stream, {"a": [1, None]}, arrays)
        stream.seek(0)
        fields, received = receive(stream, 1000)
        assert fields == {"a": [1, None]}
        for sent, found in zip(arrays, received, strict=True):
            assert sent.dtype == found.dtype
            np.testing.assert_array_equal(sent, found)
        assert texts_of(received[3]) == ["é", "\ud800", ""]

    def test_cut_short(self) -> None:
        stream = io.BytesIO()
        send(stream, {}, [np.arange(10)])
        for n_bytes in (0, 3, 12, 60, len(stream.getvalue()) - 1):
            with pytest.raises(EOFError):
                receive(io.BytesIO(stream.getvalue()[:n_bytes]), 1000)

    def test_larger_than_admitted(self) -> None:
        stream = io.BytesIO()
        send(stream, {}, [np.arange(10), np.arange(10)])
        with pytest.raises(ValueError, match="too large"):
            receive(io.BytesIO(stream.getvalue()), 159)
        assert len(receive(io.BytesIO(stream.getvalue()), 160)[1]) == 2
        with pytest.raises(ValueError, match="no numbers"):
            receive(io.BytesIO(stream.getvalue().replace(b"<i8", b"|O8", 1)), 1000)


def test_names_of_a_file_become_no_paths(study: Study) -> None:
    """A trace of cells, genes and features with hostile names writes the files that any trace writes."""
    assert exhaustive_feature_tracing.main([*study.flags(study.root / "plain"), "--features", "0,1"]) == 0
    with h5py.File(study.cells, "r+") as file:
        hostile = ["../../x", "/etc/x", "~/x", "a\nb\x1b[2J", "..", "x" * 300, "CON", "-rf"]
        file["obs/_index"][: len(hostile)] = hostile
    for path in study.root.glob("sae_models/*/feature_annotations.json"):
        labels = {str(number): [{"ontology": "GO_BP", "term": name}] for number, name in enumerate(hostile)}
        path.write_text(json.dumps({"feature_annotations": labels}))
    for path in study.root.glob("sae_models/*/feature_catalog.json"):
        content = json.loads(path.read_text())
        for feature in content["features"]:
            feature["top_genes"] = [{"gene_name": name} for name in hostile]
        path.write_text(json.dumps(content))
    outside = {path for path in study.root.parent.rglob("*")}
    assert exhaustive_feature_tracing.main([*study.flags(study.root / "hostile"), "--features", "0,1"]) == 0
    made = {path for path in study.root.parent.rglob("*")} - outside
    expected = {path.relative_to(study.root / "plain") for path in (study.root / "plain").rglob("*")}
    assert {path.relative_to(study.root / "hostile") for path in made if path != study.root / "hostile"} == expected


def test_a_reader_that_cannot_be_started_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "cells.h5ad"
    path.write_bytes(b"")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    with pytest.raises(UserError, match="cannot be started"):
        H5adFile(path)
