"""Files of strangers: nothing of theirs runs, sizes are checked before memory is taken, every end is one sentence."""

import ast
import json
import os
import pickle
import re
import signal
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BertConfig

from cellcircuits.catalog import load_catalog
from cellcircuits.errors import UserError
from cellcircuits.geneformer import load_model
from cellcircuits.jsonio import MAX_JSON_DEPTH, read_json
from cellcircuits.loading import load_checkpoint, open_array
from cellcircuits.vocabulary import read_median_dictionary, read_token_dictionary
from conftest import random_model
from fuzz_inputs import Kind, fuzz, kinds, run_mutant


def one_sentence(what: str, read: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=what) as caught:
        read()
    assert "\n" not in str(caught.value)


class TestPickles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "token_dictionary.pkl"

    def refused(self, path: Path, content: bytes, what: str) -> None:
        path.write_bytes(content)
        one_sentence(what, lambda: read_token_dictionary(path))

    def test_tuples_that_would_take_years_to_hash(self, path: Path) -> None:
        shared: object = ()
        for _ in range(60):
            shared = (shared, shared)
        for protocol in range(6):
            dumped = pickle.dumps({"a": shared}, protocol)
            self.refused(path, dumped, "refused")
        as_key = b"}" + dumped[dumped.index(b"a") + 2 : -2] + b"K\x01s."
        self.refused(path, as_key, "refused|damaged")

    def test_a_note_with_a_huge_number(self, path: Path) -> None:
        self.refused(path, b"}r\xff\xff\xff\x7fX\x01\x00\x00\x00aK\x01s.", "2147483647 notes")

    def test_an_integer_that_python_does_not_print(self, path: Path) -> None:
        self.refused(path, pickle.dumps({"ENSG1": 1 << 70_000}), "an integer of 70001 bits")

    def test_very_many_opcodes(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cellcircuits.pickle_check.MAX_OPCODES", 50)
        self.refused(path, pickle.dumps({str(n): n for n in range(50)}), "no plain data")

    def test_text_that_no_result_could_hold(self, path: Path) -> None:
        self.refused(path, pickle.dumps({"\ud800": 1}), "no Unicode")

    def test_a_scalar_that_many_genes_share(self, path: Path) -> None:
        shared = np.float64(2.5)
        path.write_bytes(pickle.dumps({"ENSG1": shared, "ENSG2": shared}))
        assert read_median_dictionary(path) == {"ENSG1": 2.5, "ENSG2": 2.5}


class TestCheckpoints:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        path = tmp_path / "sae_final.pt"
        torch.save({"weights": torch.zeros(1000), "k": 3}, path)
        return path

    def refused(self, path: Path, what: str) -> None:
        one_sentence(what, lambda: load_checkpoint(path))

    def with_pickle(self, path: Path, content: bytes) -> None:
        with zipfile.ZipFile(path) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w") as new:
            for name, part in parts.items():
                new.writestr(name, content if name.endswith("data.pkl") else part)

    def test_packed_storages(self, path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            parts = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, part in parts.items():
                new.writestr(name, part)
        self.refused(path, "packed")

    def test_parts_of_one_name(self, path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr(archive.namelist()[0], b"")
        self.refused(path, "lie over each other")

    @pytest.mark.parametrize("maker", ["torch\nTensor", "builtins\nbytearray", "torch\nUntypedStorage", "os\nsystem"])
    def test_makers_of_large_objects(self, path: Path, maker: str) -> None:
        self.with_pickle(path, b"\x80\x02}X\x01\x00\x00\x00ac" + maker.encode() + b"\nJ\xff\xff\xff\x7f\x85Rs.")
        self.refused(path, "refused")

    def test_tensor_of_more_values_than_are_stored(self, path: Path) -> None:
        torch.save({"weights": torch.zeros(1).expand(10**12)}, path)
        self.refused(path, "has fewer values")

    @pytest.mark.parametrize("tensor", [torch.zeros(3).to_sparse(), torch.zeros(3, device="meta")])
    def test_tensor_of_another_form(self, path: Path, tensor: torch.Tensor) -> None:
        torch.save({"weights": tensor}, path)
        self.refused(path, "refused")

    def test_of_very_old_pytorch(self, path: Path) -> None:
        torch.save({"k": 3}, path, _use_new_zipfile_serialization=False)
        self.refused(path, r"PyTorch 1\.6")

    def test_lists_within_lists(self, path: Path) -> None:
        content: object = 1
        for _ in range(300):
            content = [content]
        torch.save({"deep": content}, path)
        assert load_checkpoint(path)["deep"] == content  # no recursion of ours

    def test_what_others_keep_in_a_checkpoint(self, path: Path) -> None:
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam([{"params": [weight]} for weight in model.parameters()])
        model(torch.ones(3)).sum().backward()
        optimizer.step()
        torch.save(
            {"m": model.state_dict(), "o": optimizer.state_dict(), "shape": torch.Size([2]), "loss": [1.0]}, path
        )
        assert torch.equal(load_checkpoint(path)["m"]["weight"], model.weight)


class TestArrays:
    @pytest.mark.parametrize(
        "shape", ["(1000000000000,)", "(-12,)", "(99999999999999999999,)", "(4294967296,4294967296)"]
    )
    def test_claims_more_than_there_is(self, tmp_path: Path, shape: str) -> None:
        path = tmp_path / "a.npy"
        np.save(path, np.zeros(12, np.float32))
        path.write_bytes(path.read_bytes().replace(b"(12,)", shape.encode(), 1))
        one_sentence("readable", lambda: open_array(path))

    def test_an_archive_of_arrays(self, tmp_path: Path) -> None:
        np.savez_compressed(tmp_path / "a.npz", np.zeros(10**6))
        one_sentence("readable", lambda: open_array(tmp_path / "a.npz"))


class TestJson:
    @pytest.mark.parametrize("depth", [MAX_JSON_DEPTH + 1, 900, 100_000])
    def test_deeply_nested(self, tmp_path: Path, depth: int) -> None:
        path = tmp_path / "a.json"
        path.write_text('{"a":[' * (depth // 2) + "[" * (depth % 2) + "]" * (depth % 2) + "]}" * (depth // 2))
        one_sentence("nested|JSON", lambda: read_json(path))

    def test_nested_as_deeply_as_admitted(self, tmp_path: Path) -> None:
        path = tmp_path / "a.json"
        path.write_text("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH)
        content = read_json(path)
        for _ in range(MAX_JSON_DEPTH - 1):
            (content,) = content
        assert content == []

    def test_too_large(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("cellcircuits.jsonio.MAX_JSON_BYTES", 3)
        (tmp_path / "a.json").write_text("[1, 2]")
        one_sentence("too large", lambda: read_json(tmp_path / "a.json"))

    def test_label_of_a_stranger_stays_a_label(self, tmp_path: Path) -> None:
        """Names from files are shown, and no path is made of them."""
        before = set(Path.cwd().iterdir())
        entry = {"feature_idx": 0, "activation_freq": 0.1, "top_genes": [{"gene_name": "../../x\n\ud800"}]}
        (tmp_path / "c.json").write_text(json.dumps({"features": [entry]}))
        labels = {"0": [{"term": "/etc/../passwd\n\x00"}]}
        (tmp_path / "a.json").write_text(json.dumps({"feature_annotations": labels}))
        info = load_catalog(tmp_path / "c.json", tmp_path / "a.json", 1)[0]
        assert (info.label, info.top_genes) == ("/etc/../passwd \\x00", ("../../x ?",))
        assert set(Path.cwd().iterdir()) == before


class TestModels:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        random_model(n_layers=2).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    def change(self, folder: Path, **fields: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    @pytest.mark.parametrize(
        "fields",
        [
            {"auto_map": {"AutoConfig": "evil.Evil", "AutoModelForMaskedLM": "evil.Evil"}},
            {"auto_map": {"AutoConfig": "evil.Evil"}, "model_type": "evil"},
            {"auto_map": {"AutoConfig": "stranger/repo--evil.Evil"}},
            {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        ],
    )
    def test_code_beside_a_model_never_runs(self, folder: Path, fields: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        canary = folder / "canary"
        (folder / "evil.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Evil: pass\n")
        monkeypatch.setattr("builtins.input", lambda *_: "y")  # transformers asks, and a user may say yes
        self.change(folder, **fields)
        one_sentence("model", lambda: load_model(str(folder)))
        assert not canary.exists()

    @pytest.mark.parametrize(
        "fields",
        [
            {"attn_implementation": "kernels-community/evil"},
            {"_attn_implementation": "stranger/evil:evil"},
            {"torch_dtype": "evil.dtype", "dtype": "evil"},
            {"architectures": ["Evil"]},
        ],
    )
    def test_fields_that_shape_no_bert_are_not_handed_on(self, folder: Path, fields: dict) -> None:
        sound = load_model(str(folder))
        self.change(folder, **fields)
        assert load_model(str(folder)).fingerprint == sound.fingerprint

    @pytest.mark.parametrize(
        ("fields", "what"),
        [
            ({"vocab_size": 10**9}, "cannot be loaded|memory"),
            ({"hidden_size": 10**7}, "memory"),
            ({"num_hidden_layers": 10**6}, "memory"),
            ({"max_position_embeddings": -5}, "no possible value"),
            ({"num_attention_heads": "4"}, "no possible value"),
            ({"hidden_act": ["relu"]}, "no possible value"),
            ({"pad_token_id": 10**6}, "cannot be loaded"),
        ],
    )
    def test_sizes_are_checked_before_weights_are_made(self, folder: Path, fields: dict, what: str) -> None:
        self.change(folder, **fields)
        one_sentence(what, lambda: load_model(str(folder)))

    def test_config_that_is_no_table(self, folder: Path) -> None:
        (folder / "config.json").write_text("[]")
        one_sentence("not an object", lambda: load_model(str(folder)))

    def test_every_setting_that_shapes_the_model_is_handed_on(self, folder: Path) -> None:
        """Whatever a published config.json says, the model computes the same as with transformers' own reading."""
        self.change(folder, layer_norm_eps=1e-7, hidden_act="gelu_new", pad_token_id=3)
        ours, theirs = load_model(str(folder)).model.config, BertConfig.from_pretrained(folder)
        for name in (
            "layer_norm_eps",
            "hidden_act",
            "pad_token_id",
            "tie_word_embeddings",
            "vocab_size",
            "hidden_size",
        ):
            assert getattr(ours, name) == getattr(theirs, name)

    @pytest.mark.parametrize("claimed", [0, 1, 10**8, 1 << 62])
    def test_safetensors_that_claim_another_header(self, folder: Path, claimed: int) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(struct.pack("<Q", claimed) + path.read_bytes()[8:])
        one_sentence("cannot be loaded", lambda: load_model(str(folder)))

    def test_adapter(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "stranger/model"}')
        one_sentence("adapter", lambda: load_model(str(folder)))

    def as_shards(self, folder: Path) -> dict[str, str]:
        state = random_model(n_layers=2).state_dict()
        torch.save(state, folder / "part.bin")
        (folder / "model.safetensors").unlink()
        return dict.fromkeys(state, "part.bin")

    def test_weights_of_pytorch_and_shards_outside_the_folder(self, folder: Path) -> None:
        sound, shards = load_model(str(folder)).fingerprint, self.as_shards(folder)
        index = folder / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
        assert load_model(str(folder)).fingerprint == sound
        for name in ("../part.bin", "/etc/passwd", "a\\b.bin", "", 3):
            index.write_text(json.dumps({"weight_map": shards | {next(iter(shards)): name}}))
            one_sentence("must name files of this folder", lambda: load_model(str(folder)))
        index.write_text(json.dumps({"weight_map": shards | {next(iter(shards)): "gone.bin"}}))
        one_sentence(r"'gone\.bin' is not there", lambda: load_model(str(folder)))

    def test_packed_weights_of_pytorch(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", b"\x80\x02}.")
            archive.writestr("archive/data/0", bytes(10**6))
        one_sentence("packed", lambda: load_model(str(folder)))


def test_nothing_in_the_sources_trusts_code_of_others() -> None:
    for path in (Path(__file__).parents[1] / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"trust_remote_code=(?!False)|AutoModel|AutoConfig|\bmarshal\b|\bshelve\b|(?<!\.)\beval\(", text
        ), path


# what these make is compared, hashed, shown or sent to our own process; it never becomes a file of results
NOT_WRITTEN = {"h5ad_frames": {"send"}, "claims": {"_make"}}  # of a claim: names and integers
DUMPS = ("json.dumps", "json.dump", "dumps", "dump")


def test_every_json_that_is_written_refuses_nan() -> None:
    """`json.dumps` without `allow_nan=False` is found in no function that writes."""
    src = Path(__file__).parents[1] / "src"
    for path in src.rglob("*.py"):
        for function in (n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)):
            calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and ast.unparse(n.func) in DUMPS]
            lax = [call for call in calls if not any(k.arg == "allow_nan" for k in call.keywords)]
            writes = any(
                isinstance(n, ast.Attribute) and n.attr in ("write", "write_text", "write_bytes", "open")
                for n in ast.walk(function)
            )
            assert not (lax and writes) or function.name in NOT_WRITTEN.get(path.stem, ()), f"{path}: {function.name}"


@pytest.fixture(scope="module")
def every_kind(tmp_path_factory: pytest.TempPathFactory) -> list[Kind]:
    return list(kinds(tmp_path_factory.mktemp("fuzz") / "seeds"))


class TestFuzzing:
    """A few mutants of every kind; `python tests/fuzz_inputs.py --n 2000` runs more."""

    @pytest.mark.parametrize(
        ("name", "n"),
        [("checkpoint", 15), ("safetensors", 12), ("pickle", 15), ("json", 20), ("gmt", 12), ("h5ad", 10), ("npy", 12),
         ("bin", 8)],
    )  # fmt: skip
    def test_mutants(self, every_kind: list[Kind], name: str, n: int, tmp_path: Path) -> None:
        (kind,) = (kind for kind in every_kind if kind.name == name)
        assert fuzz(kind, n, 0, tmp_path / "mutant").faults == []

    def test_faults_are_seen(self, tmp_path: Path) -> None:
        """The runner itself must notice what it looks for."""

        def loads(load: Callable[[], object]) -> str:
            return run_mutant(Kind("x", lambda folder, rng: load), 0, 0, tmp_path / "mutant").fault

        assert loads(lambda: None) == ""
        assert "ZeroDivisionError" in loads(lambda: 1 / 0)
        assert "canary" in str(tmp_path / "canary") and "ran" in loads((tmp_path / "mutant" / "canary").touch)
        assert "bytes" in loads(lambda: bytearray(os.urandom(1)) * (2_100 * 10**6))
        assert "ended with -9" in loads(lambda: os.kill(os.getpid(), signal.SIGKILL))
