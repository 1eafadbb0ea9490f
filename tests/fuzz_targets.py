"""What the fuzzing mutates and which loader reads it: one maker per kind of input."""

import argparse
import io
import json
import shutil
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
from cellcircuits.combinations import choose_triplets, read_combinations, read_pair_summary
from cellcircuits.gene_sets import read_gmt, resolve
from cellcircuits.geneformer import load_model
from cellcircuits.loading import load_vector
from cellcircuits.panel import read_panel
from cellcircuits.pathways import read_pathways
from cellcircuits.sae_store import find_sae, open_sae
from cellcircuits.selection import choose_pairs, read_selective_summary
from cellcircuits.vocabulary import read_median_dictionary, read_name_dictionary, read_token_dictionary
from conftest import random_model, random_sae, write_sae
from fuzz_bytes import mutate_bytes, mutate_json, mutate_npy, mutate_pickle
from fuzz_hdf5 import mutate_h5ad, write_seeds
from fuzz_weights import mutate_archive, mutate_safetensors

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
    path.write_bytes(mutate_archive(path.read_bytes(), folder / "canary", rng))
    return lambda: open_sae(find_sae(folder, 5))


def _safetensors(model: Path, folder: Path, rng: Random) -> Callable[[], object]:
    shutil.copytree(model, folder / "model")
    path = folder / "model" / "model.safetensors"
    path.write_bytes(mutate_safetensors(path.read_bytes(), rng))
    return lambda: load_model(str(folder / "model"))


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
        content = mutate_archive(stream.getvalue(), folder / "canary", rng)
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
    kind = rng.choice(("catalog", "annotations", "config", "metadata", "listed", "listed"))
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
    if kind == "listed":
        path = folder / "listed.json"
        content, read = rng.choice(_LISTED)
        path.write_bytes(mutate_json(content, rng))
        return lambda: read(path)
    if kind == "metadata":
        return _metadata(folder, rng)
    mutated = catalog if kind == "catalog" else labels
    mutated.write_bytes(mutate_json(json.loads(mutated.read_text()), rng))
    return lambda: load_catalog(catalog, labels, N_FEATURES)


_TRACED = [
    {"layer": 5 * n, "idx": n, "label": "a", "n_edges": 3, "pathway": "ddr", "activation_freq": 0.1, "best_term": "b"}
    for n in range(3)
]
_PAIRS = [
    {"feature_A": a, "feature_B": b, "pathway": "ddr", "pair_type": "same_pathway"} for a in _TRACED for b in _TRACED
]
_LISTED: tuple[tuple[Any, Callable[[Path], object]], ...] = (
    ([{"layer": 0, "idx": 25, "d": 1.1, "label": "a"}, {"layer": 1, "idx": 2}], read_panel),
    ({"ddr": ["dna repair"], "rna": {"any": ["mrna"], "none": ["trna"]}}, read_pathways),
    ([{"features": [[0, 1], [5, 2, "x"]], "type": "listed"}, *_PAIRS[1:2]], lambda path: read_combinations(path, 2)),
    ({"per_pair_results": _PAIRS}, lambda path: choose_triplets(read_pair_summary(path), 6, (0, 5, 10))),
    ({"features": _TRACED, "pathways": {"ddr": {}}}, lambda path: choose_pairs(read_selective_summary(path), 11, 0)),
)
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
