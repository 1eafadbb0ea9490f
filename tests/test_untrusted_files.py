"""Prepared files that once read past a check, ran for ever or ended the process: each ends in one sentence."""

import io
import json
import os
import pickle
import signal
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import sparse

import make_figures
from cell_fixtures import GENES, random_counts, write_cells
from cellcircuits import geneformer, h5ad
from cellcircuits.catalog import load_catalog
from cellcircuits.combinations import Combination, ComboFeature, choose_triplets, read_combinations
from cellcircuits.errors import UserError, printable
from cellcircuits.gene_sets import GeneSet, build_term_table, read_gmt
from cellcircuits.geneformer import load_model
from cellcircuits.h5ad import H5adFile
from cellcircuits.h5ad_frames import receive
from cellcircuits.jsonio import read_json
from cellcircuits.loading import file_sha256, load_checkpoint, open_array
from cellcircuits.panel import read_panel
from cellcircuits.selection import read_selective_summary
from cellcircuits.vocabulary import read_token_dictionary
from conftest import random_model

SOON = 20  # seconds


@pytest.fixture(autouse=True)
def _ends_soon() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SOON)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def one_sentence(what: str, read: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read()
    assert str(caught.value).isprintable()


class TestWhatIsNoFile:
    READERS = (
        read_json, read_token_dictionary, read_panel, open_array, load_checkpoint, file_sha256, H5adFile,
        lambda path: read_gmt(path, "GO_BP"), lambda path: read_combinations(path, 2),
    )  # fmt: skip

    @pytest.mark.parametrize("read", READERS)
    def test_pipes_devices_and_folders(self, read: Callable[[Path], object], tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "link").symlink_to("/dev/zero")
        (tmp_path / "folder").mkdir()
        for name in ("pipe", "link", "folder", "absent"):
            one_sentence("pipe or a device|no such file|[Dd]irectory", lambda name=name: read(tmp_path / name))


class TestPickles:
    def refused(self, tmp_path: Path, content: bytes, what: str) -> None:
        """As a dictionary and as a checkpoint."""
        (tmp_path / "dictionary.pkl").write_bytes(content)
        one_sentence(what, lambda: read_token_dictionary(tmp_path / "dictionary.pkl"))
        stream = io.BytesIO()
        torch.save({"k": torch.zeros(2)}, stream)
        with zipfile.ZipFile(stream) as old, zipfile.ZipFile(tmp_path / "sae.pt", "w") as new:
            for name in old.namelist():
                new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
        one_sentence(what, lambda: load_checkpoint(tmp_path / "sae.pt"))

    def test_a_key_too_deep_to_be_hashed(self, tmp_path: Path) -> None:
        """Hashing nested tuples takes a frame of the C stack for each."""
        self.refused(tmp_path, b"\x80\x02}K\x01" + b"\x85" * 300_000 + b"K\x01s.", "300000 tuples")
        self.refused(tmp_path, b"\x80\x02}K\x01" + b"\x85q\x00" * 150_000 + b"K\x01s.", "150000 tuples")
        self.refused(tmp_path, b"\x80\x02}K\x01" + b"K\x01\x86" * 200_000 + b"K\x01s.", "200000 tuples")

    def test_the_deepest_that_is_admitted_can_be_hashed(self, tmp_path: Path) -> None:
        torch.save({"k": torch.zeros(2)}, tmp_path / "sae.pt")
        with zipfile.ZipFile(tmp_path / "sae.pt") as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(tmp_path / "sae.pt", "w") as new:
            for name, part in parts.items():
                deep = b"\x80\x02}K\x01" + b"\x85" * 10_000 + b"K\x01s."
                new.writestr(name, deep if name.endswith("data.pkl") else part)
        assert len(load_checkpoint(tmp_path / "sae.pt")) == 1

    def test_keys_that_all_have_one_hash(self, tmp_path: Path) -> None:
        numbers = [n * ((1 << 61) - 1) for n in range(1, 100_000)]
        assert len(set(map(hash, numbers))) == 1
        keys = b"".join(b"\x8a\x0c" + number.to_bytes(12, "little") + b"N" for number in numbers)
        self.refused(tmp_path, b"\x80\x02}(" + keys + b"u.", "an integer of 6[0-9] bits")

    def test_scalars_of_numpy_in_every_protocol_are_still_read(self, tmp_path: Path) -> None:
        path = tmp_path / "token_dictionary.pkl"
        for protocol in (3, 4, 5):
            path.write_bytes(pickle.dumps({"ENSG1": np.int64(4), "ENSG2": np.int64(5)}, protocol))
            assert read_token_dictionary(path) == {"ENSG1": 4, "ENSG2": 5}


class TestArchives:
    @pytest.fixture
    def sound(self, tmp_path: Path) -> bytes:
        torch.save({"k": 3, "w": torch.zeros(4)}, tmp_path / "sound.pt")
        return (tmp_path / "sound.pt").read_bytes()

    def test_a_second_list_of_parts(self, sound: bytes, tmp_path: Path) -> None:
        end, path = sound.rindex(b"PK\5\6"), tmp_path / "two.pt"
        for content in (sound + sound[sound.index(b"PK\1\2") :], sound[:end] + sound, sound + b"#"):
            path.write_bytes(content)
            one_sentence("not a readable", lambda: load_checkpoint(path))

    def test_torch_would_read_the_other_list(self, tmp_path: Path) -> None:
        """What the check sees and what torch would load are two archives in one file."""
        path = tmp_path / "two.pt"
        path.write_bytes(_two_in_one({"k": 3}, {"k": 4}))
        with zipfile.ZipFile(path) as archive:
            assert b"K\x03" in archive.read("archive/data.pkl")
        assert torch.load(path, weights_only=True) == {"k": 4}
        one_sentence("not a readable", lambda: load_checkpoint(path))

    def test_parts_without_number(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "sae.pt"
        with zipfile.ZipFile(path, "w") as archive:
            for n in range(1000):
                archive.writestr(f"archive/data/{n}", b"")
        monkeypatch.setattr("cellcircuits.loading.MAX_LIST_BYTES", 50_000)
        monkeypatch.setattr(zipfile, "ZipFile", None)  # a million of them would take it a gigabyte to list
        one_sentence("does not end with a list", lambda: load_checkpoint(path))

    def test_names_that_torch_does_not_tell_apart(self, sound: bytes, tmp_path: Path) -> None:
        path = tmp_path / "two.pt"
        with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
            new.writestr(old.namelist()[0].upper(), b"\x80\x02}.")
        one_sentence("lie over each other", lambda: load_checkpoint(path))

    def test_a_storage_larger_than_what_is_stored(self, tmp_path: Path) -> None:
        """The library itself refuses it; if it ever does not, tensors would show memory of this process."""
        path = tmp_path / "sae.pt"
        torch.save({"w": torch.zeros(1000)}, path)
        path.write_bytes(_repacked(path, lambda content: content.replace(b"M\xe8\x03", b"M\xe9\x03")))
        one_sentence("not a readable", lambda: load_checkpoint(path))


def _two_in_one(seen: object, hidden: object) -> bytes:
    """An archive whose list of parts names `seen`, with a second list where its end says that it starts."""
    parts = {}
    for name, content in (("seen", seen), ("hidden", hidden)):
        stream = io.BytesIO()
        torch.save(content, stream)
        with zipfile.ZipFile(stream) as archive:
            parts[name] = {entry: archive.read(entry) for entry in archive.namelist()}
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in parts["hidden"].items():
            archive.writestr(name, content)
    first = stream.getvalue()
    start, end = first.index(b"PK\1\2"), first.rindex(b"PK\5\6")
    second = io.BytesIO()
    with zipfile.ZipFile(second, "w") as archive:
        for name, content in parts["seen"].items():
            archive.writestr(name, content)
    there = second.getvalue()
    listed = bytearray(there[there.index(b"PK\1\2") : there.rindex(b"PK\5\6")])
    # Python takes the difference between where the list is and where it should be as bytes put in front
    shift = end + there.index(b"PK\1\2") - start
    place = 0
    while (place := listed.find(b"PK\1\2", place)) >= 0:
        (offset,) = struct.unpack_from("<I", listed, place + 42)
        struct.pack_into("<I", listed, place + 42, (end + offset - shift) % (1 << 32))
        place += 46
    return first[:end] + there[: there.index(b"PK\1\2")] + bytes(listed) + first[end:]


def _repacked(path: Path, change: Callable[[bytes], bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(stream, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith("data.pkl") else old.read(name))
    return stream.getvalue()


class TestTexts:
    def test_many_values(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.json"
        path.write_text("[" + "[]," * 500 + "{}]")
        monkeypatch.setattr("cellcircuits.jsonio.MAX_JSON_VALUES", 1002)
        assert len(read_json(path)) == 501
        monkeypatch.setattr("cellcircuits.jsonio.MAX_JSON_VALUES", 1001)
        one_sentence("more than 1,001 values", lambda: read_json(path))

    def test_a_number_of_a_million_digits(self, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text("9" * 10**6)
        one_sentence("not valid JSON", lambda: read_json(tmp_path / "a.json"))

    def test_halves_of_surrogate_pairs(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        pieces = ['"\\ud800"', '"\\uDFFF\\ud800x"', '"\\ud83d\\ude00"', '"\\\\ud800"', '"\\ud800\\ud83d\\ude00"']
        path.write_text(f"[{','.join(pieces)}]")
        assert read_json(path) == ["?", "??x", "\U0001f600", "\\ud800", "?\U0001f600"]

    def test_a_list_of_combinations_nested_too_deeply_to_be_shown(self, tmp_path: Path) -> None:
        path = tmp_path / "pairs.json"
        path.write_text("[" * 800 + "]" * 800)
        one_sentence("nested deeper", lambda: read_combinations(path, 2))

    def test_a_selective_summary_without_a_pathway(self, tmp_path: Path) -> None:
        path = tmp_path / "selective_summary.json"
        path.write_text(json.dumps({"features": [{"label": "a", "layer": 0, "idx": 1, "n_edges": 2}]}))
        one_sentence("activation_freq", lambda: read_selective_summary(path))

    def test_more_triplets_than_could_be_sorted(self) -> None:
        pairs = [
            Combination((ComboFeature(layer, n), ComboFeature(11, n)), "ddr", "same_pathway")
            for layer in (0, 5)
            for n in range(101)
        ]
        one_sentence("1,030,301 triplets", lambda: choose_triplets(pairs, 15))

    def test_gene_sets(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.gmt"
        path.write_text("term\tabout\t" + "\t".join("AB" for _ in range(100)))
        monkeypatch.setattr("cellcircuits.gene_sets.MAX_GMT_NAMES", 101)
        assert len(read_gmt(path, "x").genes_of) == 1
        monkeypatch.setattr("cellcircuits.gene_sets.MAX_GMT_NAMES", 100)
        one_sentence("more than 100 genes", lambda: read_gmt(path, "x"))
        monkeypatch.setattr("cellcircuits.gene_sets.MAX_GMT_BYTES", 10)
        one_sentence("too large for a file of gene sets", lambda: read_gmt(path, "x"))

    def test_a_term_of_two_files_is_found_soon(self) -> None:
        terms = [GeneSet("GO_BP", str(n), frozenset({1})) for n in range(60_000)]
        one_sentence("'59999' of GO_BP", lambda: build_term_table([*terms, terms[-1]], [1]))


class TestWhatIsShown:
    def test_escape_codes_reach_no_terminal(self, tmp_path: Path) -> None:
        hostile = "a\x1b[2J\r\x9b\u202eb"
        assert printable(hostile) == "a\\x1b[2J\\r\\x9b\\u202eb"
        assert str(UserError(f"{hostile} ñ 細胞.")) == f"{printable(hostile)} ñ 細胞."
        entry = {"feature_idx": 0, "activation_freq": 0.1, "top_genes": [{"gene_name": hostile}]}
        (tmp_path / "c.json").write_text(json.dumps({"features": [entry]}))
        (tmp_path / "a.json").write_text(json.dumps({"feature_annotations": {"0": [{"term": hostile}]}}))
        info = load_catalog(tmp_path / "c.json", tmp_path / "a.json", 1)[0]
        assert info.label.isprintable() and info.top_genes[0].isprintable()
        (tmp_path / "p.json").write_text(json.dumps([{"layer": 0, "idx": 1, "label": hostile}]))
        assert read_panel(tmp_path / "p.json")[0].label.isprintable()

    def test_a_label_is_no_formula(self) -> None:
        axes = Figure().subplots()
        hub = {"label": r"$\frac{$ and $", "feature_idx": 1, "total_edges": 3}
        make_figures.top_hubs(axes, {"top_20_hubs": [hub], "source_layer": 0}, {})
        axes.figure.savefig(io.BytesIO())


class TestModels:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        random_model(n_layers=2).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def test_a_header_of_names_without_end(self, folder: Path) -> None:
        path, sound = folder / "model.safetensors", (folder / "model.safetensors").read_bytes()
        (n_header,) = struct.unpack("<Q", sound[:8])
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header = json.loads(sound[8 : 8 + n_header]) | {f"bert.x{n}": empty for n in range(20_000)}
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + sound[8 + n_header :])
        one_sentence("claims a header of", lambda: load_model(str(folder)))

    @pytest.mark.parametrize("value", ["NaN", "Infinity", "-1.0", "0.0", "1"])
    def test_an_epsilon_that_makes_no_numbers(self, folder: Path, value: str) -> None:
        content = json.loads((folder / "config.json").read_text()) | {"layer_norm_eps": 0.5}
        (folder / "config.json").write_text(json.dumps(content).replace("0.5", value))
        one_sentence("no possible value", lambda: load_model(str(folder)))

    def test_weights_from_the_hub_are_checked_too(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked = []

        def cached_file(source: str, name: str, **_: object) -> str | None:
            asked.append(name)
            return str(folder / name) if (folder / name).is_file() else None

        monkeypatch.setattr(geneformer, "cached_file", cached_file)
        (folder / "model.safetensors").unlink()
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
        one_sentence("packed", lambda: load_model("somebody/a-model"))
        assert asked == ["config.json", "model.safetensors", "pytorch_model.bin"]


class TestCells:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return write_cells(tmp_path / "a.h5ad", sparse.csr_matrix(random_counts()), GENES)

    def test_a_group_that_no_link_names(self, path: Path, tmp_path: Path) -> None:
        """It is reached by a reference only, so that its links to other files are not seen by looking at all links."""
        with h5py.File(tmp_path / "other.h5", "w") as other:
            other["values"] = np.array([b"secret1", b"secret2"])
        with h5py.File(path, "r+") as file:
            group = file.create_group("hidden")
            group.attrs["encoding-type"] = "nullable-string-array"
            group["values"] = h5py.ExternalLink("other.h5", "/values")
            group["mask"] = np.zeros(2, bool)
            file["obs/line"] = (np.arange(30) % 2).astype("i1")
            file["obs/line"].attrs["categories"] = group.ref
            file["obs"].attrs["column-order"] = np.array(["line"], dtype=h5py.string_dtype())
            hidden, shown = (struct.pack("<Q", h5py.h5o.get_info(file[name].id).addr) for name in ("hidden", "var"))
        content = bytearray(path.read_bytes())
        place = content.index(hidden + b"\1\0\0\0", content.index(b"SNOD"))
        content[place : place + 32] = shown + bytes(24)  # the link now leads to another group
        path.write_bytes(content)
        with H5adFile(path) as file:
            one_sentence("is no dataset", file.obs)

    def test_a_column_whose_name_is_no_text(self, path: Path) -> None:
        with h5py.File(path, "r+") as file:
            file["obs"].attrs["column-order"] = np.array([b"gen\xff"], dtype=h5py.string_dtype())
        with H5adFile(path) as file:
            one_sentence("obs cannot be read", file.obs)

    @pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGBUS"])
    def test_the_library_crashes_while_it_reads(self, path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        crash = f"content.StoredCells.table = lambda *_: os.kill(os.getpid(), signal.{name})"
        start = f"import os, signal; from cellcircuits import h5ad_content as content; {crash}; from cellcircuits.h5ad_"
        monkeypatch.setattr(h5ad, "_PROGRAM", h5ad._PROGRAM.replace("from cellcircuits.h5ad_", start))
        with H5adFile(path) as file:
            one_sentence(f"obs cannot be read: .* ended with {name}", file.obs)
            one_sentence(f"var cannot be read: .* ended with {name}", lambda: file.var("X"))

    @pytest.mark.parametrize(
        "said",
        [
            b"[]", b"{}", b"3", b'{"fields": 3, "arrays": []}', b'{"fields": {}, "arrays": [["<i8"]]}', b"[" * 100_000,
            b'{"fields": {}, "arrays": [["O", 1]]}', b'{"fields": {}, "arrays": [["nonsense", 1]]}',
            b'{"fields": {}, "arrays": [["<i8", -1]]}', b'{"fields": {}, "arrays": [["<i8", 1e400]]}', b"\xff\xfe",
            b'{"fields": {}, "arrays": [["i8,(", 1]]}', b'{"fields": {}, "arrays": []}',
        ],
    )  # fmt: skip
    def test_the_process_says_something_else(self, path: Path, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
        message = struct.pack(">Q", len(said)) + said
        if b'"arrays": []}' not in said or b"3" in said:
            with pytest.raises(ValueError):
                receive(io.BytesIO(message), 1 << 20)
        monkeypatch.setattr(h5ad, "_PROGRAM", f"import sys; sys.stdout.buffer.write({message!r})")
        one_sentence("the list of contents cannot be read", lambda: H5adFile(path))
