"""What the fuzzing mutates and which loader reads it: one maker per kind of input."""

import argparse
import io
import json
import pickle
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from cell_fixtures import GENES, vocabulary
from cellcircuits import trajectory
from cellcircuits.catalog import load_catalog
from cellcircuits.cells import Cell, CellSelection, load_cells
from cellcircuits.gene_sets import read_gmt, resolve
from cellcircuits.geneformer import load_model
from cellcircuits.loading import load_vector
from cellcircuits.panel import read_panel
from cellcircuits.sae_store import find_sae, open_sae
from cellcircuits.vocabulary import read_median_dictionary, read_name_dictionary, read_token_dictionary
from conftest import random_model, random_sae, write_sae
from fuzz_bytes import Bomb, mutate_bytes, mutate_json, mutate_npy, mutate_opcodes, mutate_pickle, nasty
from fuzz_hdf5 import mutate_h5ad, write_seeds

Maker = Callable[[Path, Random], Callable[[], object]]
N_FEATURES = 24


def makers(seeds: Path) -> Iterator[tuple[str, Maker]]:
    """Every kind with the function that writes a mutant and returns its loader; sound files go to `seeds`."""
    seeds.mkdir(parents=True)
    torch.set_num_threads(1)
    sae_folder = write_sae(seeds, 5, random_sae(0, 12, N_FEATURES, 3))
    random_model(n_layers=2).save_pretrained(seeds / "model")
    cells = write_seeds(seeds)
    yield "checkpoint", lambda folder, rng: _checkpoint(sae_folder, folder, rng)
    yield "safetensors", lambda folder, rng: _safetensors(seeds / "model", folder, rng)
    yield "pickle", _dictionary
    yield "json", lambda folder, rng: _json(seeds / "model", sae_folder, folder, rng)
    yield "gmt", _gmt
    yield "h5ad", lambda folder, rng: _h5ad(cells, folder, rng)
    yield "npy", _npy
    yield "bin", lambda folder, rng: _bin(seeds / "model", folder, rng)


def _checkpoint(sae_folder: Path, folder: Path, rng: Random) -> Callable[[], object]:
    copy = folder / "sae_models" / sae_folder.name
    shutil.copytree(sae_folder, copy)
    path = copy / "sae_final.pt"
    path.write_bytes(_mutated_archive(path.read_bytes(), folder / "canary", rng))
    return lambda: open_sae(find_sae(folder, 5))


def _mutated_archive(sound: bytes, canary: Path, rng: Random) -> bytes:
    way = rng.random()
    if way < 0.3:
        return mutate_bytes(sound, rng)
    if way < 0.6:
        return _repacked(sound, canary, rng)
    content = torch.load(io.BytesIO(sound), weights_only=True)
    holder = content["model_state_dict"] if rng.random() < 0.5 and "model_state_dict" in content else content
    with warnings.catch_warnings(action="ignore"):
        for _ in range(rng.choice((1, 2))):
            key = rng.choice(list(holder))
            holder[key] = _odd_tensor(rng) if rng.random() < 0.6 else nasty(canary, rng)
    if rng.random() < 0.1:
        content = nasty(canary, rng)
    elif rng.random() < 0.2:  # sizes that fit a tensor of strides 0
        n = rng.choice((10**6, 10**9, 10**12))
        shapes = {"W_enc.weight": (n, 1), "W_enc.bias": (n,), "W_dec.weight": (1, n), "W_dec.bias": (1,)}
        state = {name: torch.zeros(1).as_strided(shape, (0,) * len(shape)) for name, shape in shapes.items()}
        content = {"model_state_dict": state, "d_model": 1, "n_features": n, "k": 1}
    stream = io.BytesIO()
    try:
        torch.save(
            content, stream, _use_new_zipfile_serialization=rng.random() < 0.8, pickle_protocol=rng.choice((2, 2, 4))
        )
    except Exception:
        return pickle.dumps(Bomb(canary, rng))
    return stream.getvalue()


def _odd_tensor(rng: Random) -> Any:
    return rng.choice(
        (
            lambda: torch.zeros(1).expand(10**12), lambda: torch.zeros(3).to_sparse(),
            lambda: torch.zeros(3, device="meta"),
            lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8), lambda: torch.zeros(0),
            lambda: torch.full((24, 12), torch.nan), lambda: torch.zeros(24, 12, dtype=torch.complex64),
            lambda: torch.zeros(24, 12, dtype=torch.int8), lambda: torch.nn.Parameter(torch.zeros(24, 12)),
            lambda: torch.zeros(24, 12).to(torch.float8_e4m3fn), lambda: torch.zeros(()), lambda: torch.float32,
            lambda: torch.Size([3]), lambda: torch.device("cpu"), lambda: torch.zeros(24).conj(),
            lambda: torch.Generator(),
        )
    )()  # fmt: skip


def _repacked(sound: bytes, canary: Path, rng: Random) -> bytes:
    """The same archive with a part changed, missing, repeated or packed."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(sound)) as old, zipfile.ZipFile(stream, "w") as new:
        parts = [(entry.filename, old.read(entry)) for entry in old.infolist()]
        chosen = rng.randrange(len(parts))
        for number, (name, content) in enumerate(parts):
            packing = zipfile.ZIP_STORED
            if name.endswith("data.pkl") and rng.random() < 0.7:
                way = rng.random()
                content = mutate_opcodes(content, rng) if way < 0.6 else mutate_pickle({"a": 1, "k": 3}, canary, rng)
                if way > 0.8:
                    kinds = (b"torch\nTensor", b"builtins\nbytearray", b"torch\nUntypedStorage", b"torch\nFloatStorage")
                    content = b"\x80\x02c" + rng.choice(kinds) + b"\nJ\xff\xff\xff\x7f\x85R."  # of 2^31 - 1 values
            elif number == chosen:
                way = rng.randrange(5)
                if way == 0:
                    continue
                if way == 1:
                    content, packing = bytes(50_000_000), zipfile.ZIP_DEFLATED
                if way == 2:
                    content = mutate_bytes(content, rng)
                if way == 3:
                    name = rng.choice(("../../x", "/etc/x", parts[0][0], "archive/constants.pkl", name.upper()))
                if way == 4:
                    packing = rng.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
            new.writestr(name, content, packing)
    return mutate_bytes(stream.getvalue(), rng) if rng.random() < 0.1 else stream.getvalue()


def _safetensors(model: Path, folder: Path, rng: Random) -> Callable[[], object]:
    shutil.copytree(model, folder / "model")
    path = folder / "model" / "model.safetensors"
    sound = path.read_bytes()
    (n_header,) = struct.unpack("<Q", sound[:8])
    if rng.random() < 0.4:
        path.write_bytes(mutate_bytes(sound, rng))
    else:
        header = json.loads(sound[8 : 8 + n_header])
        text = mutate_json(header, rng) if rng.random() < 0.4 else json.dumps(_odd_header(header, rng)).encode()
        claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) + 1, 10**8, 1 << 62))
        path.write_bytes(struct.pack("<Q", claimed) + text + sound[8 + n_header :])
    return lambda: load_model(str(folder / "model"))


def _odd_header(header: dict[str, Any], rng: Random) -> dict[str, Any]:
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry = dict(header[name])
    field = rng.choice(("dtype", "shape", "data_offsets"))
    entry[field] = rng.choice(
        {
            "dtype": ("F16", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "X", "F64", 3),
            "shape": ([], [0], [10**12], [1 << 32, 1 << 32], [-1], [2.5], entry["shape"][::-1], [1, *entry["shape"]]),
            "data_offsets": (
                [0, 4],
                [0, 10**12],
                [4, 0],
                [-4, 0],
                [0],
                [1 << 63, 1 << 63],
                header[name]["data_offsets"],
            ),
        }[field]
    )
    changed = {**header, name: entry}
    if rng.random() < 0.2:
        changed[rng.choice(("__metadata__", "../x", "extra", "bert.encoder.layer.9.x"))] = changed.pop(name)
    return changed


def _bin(model: Path, folder: Path, rng: Random) -> Callable[[], object]:
    """A model whose weights are a PyTorch file, in one part or listed by an index."""
    shutil.copytree(model, folder / "model")
    (folder / "model" / "model.safetensors").unlink()
    stream = io.BytesIO()
    torch.save(random_model(n_layers=2).state_dict(), stream)
    index = {"metadata": {}, "weight_map": {name: "part.bin" for name in random_model(n_layers=2).state_dict()}}
    if rng.random() < 0.3:
        (folder / "model" / "part.bin").write_bytes(stream.getvalue())
        if rng.random() < 0.5:
            first = next(iter(index["weight_map"]))
            index["weight_map"][first] = rng.choice(
                ("../x.bin", "/etc/passwd", "absent.bin", 3, "", "..", "config.json")
            )
            text = json.dumps(index).encode()
        else:
            text = mutate_json(index, rng)
        (folder / "model" / "pytorch_model.bin.index.json").write_bytes(text)
    else:
        content = _mutated_archive(stream.getvalue(), folder / "canary", rng)
        (folder / "model" / "pytorch_model.bin").write_bytes(content)
    return lambda: load_model(str(folder / "model"))


def _dictionary(folder: Path, rng: Random) -> Callable[[], object]:
    read = rng.choice((read_token_dictionary, read_median_dictionary, read_name_dictionary))
    content: dict[str, Any] = {
        read_token_dictionary: {"<pad>": 0, "<cls>": 2} | {gene: n + 4 for n, gene in enumerate(GENES)},
        read_median_dictionary: {
            gene: rng.choice((float, np.float32, np.float64))(n + 0.5) for n, gene in enumerate(GENES)
        },
        read_name_dictionary: {f"GENE{n}": gene for n, gene in enumerate(GENES)},
    }[read]
    path = folder / "dictionary.pkl"
    path.write_bytes(mutate_pickle(content, folder / "canary", rng))
    return lambda: read(path)


def _json(model: Path, sae_folder: Path, folder: Path, rng: Random) -> Callable[[], object]:
    kind = rng.choice(("catalog", "annotations", "config", "metadata", "panel"))
    catalog, labels = folder / "feature_catalog.json", folder / "feature_annotations.json"
    for path in (catalog, labels):
        shutil.copy(sae_folder / path.name, path)
    if kind == "config":
        shutil.copytree(model, folder / "model")
        path = folder / "model" / "config.json"
        content = json.loads(path.read_text()) | rng.choice(_CONFIG_TRAPS)
        (folder / "model" / "evil.py").write_text(f"open({str(folder / 'canary')!r}, 'w')")
        path.write_bytes(mutate_json(content, rng) if rng.random() < 0.7 else json.dumps(content).encode())
        return lambda: load_model(str(folder / "model"))
    if kind == "panel":
        path = folder / "panel.json"
        path.write_bytes(mutate_json([{"layer": 0, "idx": 25, "d": 1.1, "label": "a"}, {"layer": 1, "idx": 2}], rng))
        return lambda: read_panel(path)
    if kind == "metadata":
        return _metadata(folder, rng)
    mutated = catalog if kind == "catalog" else labels
    mutated.write_bytes(mutate_json(json.loads(mutated.read_text()), rng))
    return lambda: load_catalog(catalog, labels, N_FEATURES)


_CODE = "evil.Evil"
_CONFIG_TRAPS: tuple[dict[str, Any], ...] = (
    {}, {"auto_map": {"AutoConfig": _CODE, "AutoModelForMaskedLM": _CODE}},
    {"auto_map": {"AutoConfig": _CODE}, "model_type": "evil"}, {"auto_map": {"AutoConfig": f"stranger/repo--{_CODE}"}},
    {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, {"model_type": "gpt2"},
    {"attn_implementation": "kernels-community/evil"}, {"_attn_implementation": "stranger/evil:evil"},
    {"vocab_size": 10**12}, {"hidden_size": 10**6, "num_attention_heads": 1}, {"num_hidden_layers": 10**6},
    {"hidden_act": "__import__"}, {"hidden_act": "gelu_python"}, {"pad_token_id": 10**6}, {"dtype": "evil.float"},
    {"architectures": ["Evil"]}, {"custom_pipelines": {"x": {"impl": _CODE}}},
    {"configuration_files": ["config.99.json"]}, {"layer_norm_eps": -1.0}, {"num_attention_heads": 0},
    {"num_attention_heads": 7}, {"max_position_embeddings": -5},
)  # fmt: skip


def _metadata(folder: Path, rng: Random) -> Callable[[], object]:
    names = [f"cell{n}" for n in range(5)]
    cells = [Cell(name, n, np.arange(4), np.arange(1, 3)) for n, name in enumerate(names)]
    content = {
        "pseudotime": [0.1, 0.2, None, 0.4, 0.5],
        "cell_types": ["a", "b", "a", "b", "a"],
        "tissues": [""] * 5,
        "cell_ids": names[::-1],
        "root": "cell0",
        "downsample_to": None,
    }
    (folder / trajectory.METADATA).write_bytes(mutate_json(content, rng))
    args = argparse.Namespace(
        traj_dir=folder,
        downsample_to=None,
        disconnected=rng.choice(("drop", "refuse")),
        root_cell_type="x",
        root_tissue="y",
        root_markers=(),
    )
    types = tuple(content["cell_types"])
    return lambda: (
        trajectory._read_metadata(folder / trajectory.METADATA) and trajectory._from_metadata(args, cells, types, types)
    )


def _gmt(folder: Path, rng: Random) -> Callable[[], object]:
    lines = [f"term {n}\thttp://x\t" + "\t".join(f"GENE{n + i},1.0" for i in range(5)) for n in range(6)]
    for _ in range(rng.choice((1, 2, 4))):
        place = rng.randrange(len(lines))
        lines[place] = rng.choice(
            (
                lambda text: text.replace("\t", " "), lambda text: text + "\t" * 1000, lambda text: text[:1000] * 2000,
                lambda text: "", lambda text: "\t\t\t", lambda text: "term 0\tx\tGENE1", lambda text: "a\tb",
                lambda text: text + "\x00\x0c\x85\u2028", lambda text: "ENS" + "G" * 50_000 + "1",
                lambda text: "\u0130\ufb01\u1e9e\t\t\u0130", lambda text: text + "\r",
                lambda text: "ENSG" + "1" * 50_000 + ".5.5\tx\tENS" + "G1" * 20_000,
                lambda text: "t" * 10**6 + "\tx\tGENE1", lambda text: "../../etc\tx\tGENE1",
            )
        )(lines[place])  # fmt: skip
    content = "\n".join(lines).encode()
    way = rng.random()
    if way < 0.3:
        content = mutate_bytes(content, rng)
    elif way < 0.4:
        import gzip

        content = gzip.compress(content + bytes(10**6))
    elif way < 0.5:
        content = rng.choice(
            (b"", b"\xff\xfe" + content, b"\n" * 10**6, content.decode().encode("utf-16"), b"\t" * 10**6)
        )
    path = folder / "sets.gmt"
    path.write_bytes(content)
    known = {f"GENE{n}": n for n in range(20)}
    return lambda: resolve(read_gmt(path, "GO_BP"), known)


def _h5ad(seeds: list[Path], folder: Path, rng: Random) -> Callable[[], object]:
    path = folder / "cells.h5ad"
    shutil.copy(rng.choice(seeds), path)
    mutate_h5ad(path, rng)
    counts = rng.choice(("auto", "auto", "X", "raw", "layer:counts"))
    selection = CellSelection(
        cells="all", min_median_tokens=1, counts=counts, n_cells=rng.choice((5, 50)), min_mapped=0.0
    )
    return lambda: load_cells(path, vocabulary(), selection, 64)


def _npy(folder: Path, rng: Random) -> Callable[[], object]:
    path = folder / "mean.npy"
    path.write_bytes(mutate_npy(np.arange(12, dtype=np.float32), folder / "canary", rng))
    return lambda: load_vector(path, 12)
