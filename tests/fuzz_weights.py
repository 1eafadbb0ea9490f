"""Mutators of files of weights: archives of torch.save and safetensors files."""

import io
import json
import pickle
import struct
import warnings
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import safetensors.torch
import torch

from fuzz_bytes import (
    Bomb,
    mutate_arguments,
    mutate_bytes,
    mutate_json,
    mutate_near,
    mutate_opcodes,
    mutate_pickle,
    nasty,
)


def mutate_archive(sound: bytes, canary: Path, rng: Random) -> bytes:
    """Change an archive: its bytes, parts, lists of parts, pickle or tensors; some hold a bomb."""
    way = rng.random()
    if way < 0.1:
        return mutate_bytes(sound, rng)
    if way < 0.2:
        return mutate_near(sound, rb"PK\x01\x02|PK\x05\x06|PK\x06\x06|PK\x06\x07|PK\x03\x04", 46, rng)
    if way < 0.6:
        return _repacked(sound, canary, rng)
    if way < 0.65:
        return _two_lists(sound, rng)
    content = torch.load(io.BytesIO(sound), weights_only=True)
    holder = content["model_state_dict"] if rng.random() < 0.5 and "model_state_dict" in content else content
    with warnings.catch_warnings(action="ignore"):
        for _ in range(rng.choice((1, 2))):
            key = rng.choice(list(holder))
            holder[key] = _odd_tensor(rng) if rng.random() < 0.6 else nasty(canary, rng)
    if rng.random() < 0.2:
        holder["extra"] = Bomb(canary, rng)
    elif rng.random() < 0.1:
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
                content = _other_pickle(content, canary, rng)
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


def _other_pickle(content: bytes, canary: Path, rng: Random) -> bytes:
    way = rng.random()
    if way < 0.4:
        return mutate_arguments(content, rng)
    if way < 0.8:
        return mutate_opcodes(content, rng) if way < 0.6 else mutate_pickle({"a": 1, "k": 3}, canary, rng)
    kinds = (b"torch\nTensor", b"builtins\nbytearray", b"torch\nUntypedStorage", b"torch\nFloatStorage")
    return b"\x80\x02c" + rng.choice(kinds) + b"\nJ\xff\xff\xff\x7f\x85R."  # of 2^31 - 1 values


def _two_lists(sound: bytes, rng: Random) -> bytes:
    """An archive with a second list of parts, so that what one reader has checked another does not read."""
    with zipfile.ZipFile(io.BytesIO(sound)) as archive:
        start = archive.start_dir
    end = sound.rindex(b"PK\x05\x06")
    hidden = sound[:start] + mutate_near(sound[start:end], rb"PK\x01\x02", 46, rng)
    return hidden + sound[start:] if rng.random() < 0.5 else sound[:end] + hidden + sound[end:]


def mutate_safetensors(sound: bytes, rng: Random) -> bytes:
    """Change bytes, the weights, or what the header says of them."""
    (n_header,) = struct.unpack("<Q", sound[:8])
    way = rng.random()
    if way < 0.2:
        return mutate_bytes(sound, rng)
    if way < 0.6:
        return _other_state(sound, rng)
    header = json.loads(sound[8 : 8 + n_header])
    text = mutate_json(header, rng) if rng.random() < 0.4 else json.dumps(_odd_header(header, rng)).encode()
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1, len(text) + 1, 10**8, 1 << 62))
    return struct.pack("<Q", claimed) + text + sound[8 + n_header :]


def _other_state(sound: bytes, rng: Random) -> bytes:
    """A sound file of other weights: of other names, types, shapes and values."""
    state = safetensors.torch.load(sound)
    for _ in range(rng.choice((1, 1, 3))):
        name = rng.choice(list(state))
        tensor = state.pop(name)
        n = rng.choice((1, 7, 1000))
        names = (name, name, name, "bert.x", "../x", "", "\x1b[2J", "bert.embeddings.position_ids")
        state[rng.choice(names)] = rng.choice(
            (
                lambda t=tensor: t.to(rng.choice((torch.float16, torch.int64, torch.bool, torch.float64, torch.int8))),
                lambda t=tensor: t.flatten(), lambda t=tensor: t[:0], lambda t=tensor: t[None],
                lambda t=tensor: torch.full_like(t, rng.choice((torch.nan, torch.inf, 3e38, -1e-45))),
                lambda t=tensor, n=n: torch.zeros((n, *t.shape[1:])), lambda t=tensor: torch.cat([t, t]),
                lambda t=tensor: t.to(torch.float8_e4m3fn), lambda t=tensor: t.double() * 1e300,
            )
        )()  # fmt: skip
        if rng.random() < 0.3:
            state.pop(rng.choice(list(state)))
    kept = {name: tensor.contiguous() for name, tensor in state.items()}
    metadata = rng.choice(
        ({"format": "pt"}, {"format": "pt"}, None, {"format": "tf"}, {"format": "evil", "x": "y" * 9999})
    )
    return safetensors.torch.save(kept, metadata)


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
    if rng.random() < 0.3:  # still sound to the library: names, types or shapes exchanged
        other = rng.choice([key for key in header if key != "__metadata__"])
        changed = {**header, name: header[other], other: header[name]}
    elif rng.random() < 0.1:
        text = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        changed = {**header, **{f"bert.encoder.{n}": text for n in range(rng.choice((1, 1000, 50_000)))}}
    if rng.random() < 0.2:
        changed[rng.choice(("__metadata__", "../x", "extra", "bert.encoder.layer.9.x"))] = changed.pop(name)
    return changed
