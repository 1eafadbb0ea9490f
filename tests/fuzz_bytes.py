"""Mutators that know no format: bytes, pickles by their opcodes, JSON by its values."""

import io
import itertools
import json
import pickle
import pickletools
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1, (1 << 64) - 1)


def mutate_bytes(content: bytes, rng: Random) -> bytes:
    """A few damages anywhere."""
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        content = rng.choice((flip, flip, cut, splice, length, insert))(bytearray(content), rng)
    return content


def flip(content: bytearray, rng: Random) -> bytes:
    for _ in range(rng.choice((1, 3, 20))):
        if content:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut(content: bytearray, rng: Random) -> bytes:
    if rng.random() < 0.5:
        return bytes(content[: rng.randrange(len(content) + 1)])
    first = rng.randrange(len(content) + 1)
    del content[first : first + rng.choice((1, 4, 64, 4096))]
    return bytes(content)


def splice(content: bytearray, rng: Random) -> bytes:
    n_bytes = rng.choice((1, 4, 8, 64, 1024))
    source, target = rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)
    content[target : target + n_bytes * rng.randrange(2)] = content[source : source + n_bytes]
    return bytes(content)


def length(content: bytearray, rng: Random) -> bytes:
    """Overwrite what may be a length field."""
    size, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
    place = rng.choice((rng.randrange(len(content) + 1), rng.randrange(64)))
    content[place : place + size] = (rng.choice(EXTREMES) % (1 << 8 * size)).to_bytes(size, order)
    return bytes(content)


def insert(content: bytearray, rng: Random) -> bytes:
    place = rng.randrange(len(content) + 1)
    content[place:place] = rng.randbytes(rng.choice((1, 8, 200)))
    return bytes(content)


def mutate_near(content: bytes, signs: bytes, reach: int, rng: Random) -> bytes:
    """Change a field or two in the `reach` bytes after a sign of the format's structure.

    Args:
        content: a sound file.
        signs: a pattern of the signs.
        reach: bytes.
        rng: decides.
    """
    places = [found.start() for found in re.finditer(signs, content)]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 3)) if places else 0):
        place = rng.choice(places) + rng.randrange(4, reach)
        size = rng.choice((1, 2, 4, 8))
        if rng.random() < 0.4:
            value = (
                int.from_bytes(changed[place : place + size], "little") + rng.choice((-8, -1, 1, 8, 256))
            ) % 256**size
        else:
            value = rng.choice(EXTREMES) % 256**size
        changed[place : place + size] = value.to_bytes(size, "little")
    return bytes(changed)


class Bomb:
    """Unpickled by an unsafe loader, it leaves the canary behind."""

    def __init__(self, canary: Path, rng: Random) -> None:
        self.canary, self.way = str(canary), rng.randrange(4)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        import os

        return (
            (os.system, (f"touch {self.canary}",)),
            (eval, (f"open({self.canary!r}, 'w')",)),
            (exec, (f"import pathlib; pathlib.Path({self.canary!r}).touch()",)),
            (Path.touch, (Path(self.canary),)),
        )[self.way]


def nasty(canary: Path, rng: Random) -> Any:
    """A value that a pickle can hold and a loader may not expect."""
    shared: Any = (1, 2)
    for _ in range(60):
        shared = (shared, shared)
    itself: list[Any] = []
    itself.append(itself)
    deep: Any = 0
    for _ in range(rng.choice((50, 400))):
        deep = [deep]
    return rng.choice(
        (
            lambda: Bomb(canary, rng), lambda: None, lambda: True, lambda: float("nan"), lambda: float("inf"),
            lambda: -1, lambda: 1 << 40, lambda: 1 << 70_000, lambda: b"bytes", lambda: "x" * 100_000,
            lambda: "\ud800", lambda: "../../x", lambda: {}, lambda: [1], lambda: (1, "a"), lambda: {"a"},
            lambda: np.float32(2), lambda: np.float64(np.nan), lambda: np.zeros(3), lambda: 1j,
            lambda: {"x": {"y": 1}}, lambda: slice(1), lambda: itself, lambda: deep, lambda: shared[0][0],
        )
    )()  # fmt: skip


def mutate_pickle(content: Any, canary: Path, rng: Random) -> bytes:
    """Change a dictionary and pickle it in some protocol, or change its pickle opcode by opcode."""
    protocol = rng.randrange(6)
    way = rng.random()
    if way < 0.35:
        content = dict(content)
        for _ in range(rng.choice((1, 2, 5))):
            key = rng.choice(list(content))
            if rng.random() < 0.6:
                content[key] = nasty(canary, rng)
            else:
                wrong = nasty(canary, rng)
                content[wrong if _hashes(wrong) else "<pad>"] = content.pop(key, 0)
        return _dumped(content, protocol)
    if way < 0.45:
        return _dumped(nasty(canary, rng), protocol)
    if way < 0.6:
        return _trap(canary, rng)
    dumped = pickle.dumps(content, protocol)
    return rng.choice((mutate_opcodes, mutate_opcodes, mutate_arguments, mutate_bytes))(dumped, rng)


def _dumped(content: Any, protocol: int) -> bytes:
    try:
        return pickle.dumps(content, protocol)
    except ValueError:  # protocol 0 writes integers as text, which Python does for short ones only
        return pickle.dumps(content, 4)


def _hashes(value: Any) -> bool:
    return type(value) in (str, int, float, bytes, bool, type(None))


def mutate_opcodes(dumped: bytes, rng: Random) -> bytes:
    """Drop, repeat or exchange whole opcodes, or slip a foreign one in."""
    places = [place for _, _, place in pickletools.genops(dumped)] + [len(dumped)]
    parts = [dumped[first:last] for first, last in itertools.pairwise(places)]
    foreign = [code.code.encode("latin-1") + rng.randbytes(rng.choice((0, 1, 4))) for code in pickletools.opcodes]
    for _ in range(rng.choice((1, 2, 8))):
        place = rng.randrange(len(parts))
        way = rng.randrange(4)
        if way == 0 and len(parts) > 1:
            del parts[place]
        elif way == 1:
            parts.insert(place, rng.choice(parts))
        elif way == 2:
            parts.insert(place, rng.choice(foreign))
        else:
            parts[place] = parts[rng.randrange(len(parts))]
    return b"".join(parts)


def mutate_arguments(dumped: bytes, rng: Random) -> bytes:
    """Other numbers and texts in an otherwise sound pickle: sizes, offsets, keys, names."""
    found = list(pickletools.genops(dumped))
    places = [place for *_, place in found] + [len(dumped)]
    parts = [dumped[first:last] for first, last in itertools.pairwise(places)]
    numbers = [n for n, (code, *_) in enumerate(found) if code.name in ("BININT", "BININT1", "BININT2", "LONG1")]
    texts = [n for n, (code, *_) in enumerate(found) if code.name in ("BINUNICODE", "SHORT_BINUNICODE", "GLOBAL")]
    for _ in range(rng.choice((1, 1, 2, 4))):
        if numbers and (rng.random() < 0.7 or not texts):
            n = rng.choice(numbers)
            old = found[n][1]
            new = rng.choice((*EXTREMES, -1, -(1 << 31), old + 1, old - 1, 2 * old, 1 << 63, 10**12))
            parts[n] = pickle.dumps(new, 2)[2:-1]
        elif texts:
            n = rng.choice(texts)
            same = [other for other in texts if found[other][0].name == found[n][0].name]
            parts[n] = parts[rng.choice(same)]
    return b"".join(parts)


def _trap(canary: Path, rng: Random) -> bytes:
    """Hand-written pickles that are small and want much."""
    command = f"touch {canary}".encode()
    pairs = (b"0h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(60))
    twice = b"K\x01q\x00" + b"".join(pairs)  # a pair of the pair before, 60 times
    modulus = (1 << 61) - 1  # of the hash of an integer
    alike = b"".join(b"\x8a\x0c" + (n * modulus).to_bytes(12, "little") + b"N" for n in range(1, 200_000))
    deep = b"K\x01" + b"\x85" * rng.choice((90, 30_000, 1_000_000))
    return rng.choice(
        (
            b"cos\nsystem\n(S'" + command + b"'\ntR.",
            b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(command)]) + command + b"\x85R.",
            b"(S'" + command + b"'\nios\nsystem\n.",
            b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'x'\ntR.",
            b"}q\x00X\x01\x00\x00\x00ar" + (rng.choice(EXTREMES) % (1 << 32)).to_bytes(4, "little") + b"K\x01s.",
            b"\x80\x04\x95" + rng.choice(EXTREMES).to_bytes(8, "little") + b"}.",
            b"\x80\x04}\x8e" + rng.choice(EXTREMES).to_bytes(8, "little") + b"abc.",
            b"\x80\x04}\x8d" + rng.choice(EXTREMES).to_bytes(8, "little") + b"abc.",
            b"\x80\x05}\x96" + rng.choice(EXTREMES).to_bytes(8, "little") + b"abc.",
            b"}" + twice + b"K\x01s.",
            b"}X\x01\x00\x00\x00a" + twice + b"s.",
            b"}(" + alike + b"u.", b"}" + deep + b"K\x01s.", b"}" + deep.replace(b"\x85", b"\x85q\x00") + b"K\x01s.",
            b"}" + b"K\x01" + b"K\x01\x86" * 200_000 + b"K\x01s.",
            b"]" * rng.choice((10, 100_000)) + b"a" * rng.choice((9, 99_999)) + b".",
            b"(" * 200_000 + b".",
            b"}X\x01\x00\x00\x00aI" + b"9" * 100_000 + b"\ns.",
            b"}X\x01\x00\x00\x00a\x8b" + (200_000).to_bytes(4, "little") + b"\x7f" * 200_000 + b"s.",
            b"cnumpy\ndtype\n(S'O8'\nI00\nI01\ntR.",
            b"\x82\x01.", b"P1\n.", b"Q.", b".",
        )
    )  # fmt: skip


def mutate_json(content: Any, rng: Random) -> bytes:
    """Change values of a JSON document, its text, or its nesting."""
    way = rng.random()
    if way < 0.6:
        for _ in range(rng.choice((1, 1, 3))):
            content = _with_other_value(content, rng)
        return json.dumps(content).encode()
    text = json.dumps(content)
    if way < 0.75:
        return mutate_bytes(text.encode(), rng)
    if way < 0.9:
        return rng.choice(
            (
                lambda: text.replace(":", rng.choice((": NaN, ", ": Infinity ", ": -Infinity", "::")), 1).encode(),
                lambda: ("[" * 100_000 + "]" * 100_000).encode(),
                lambda: ('{"a":' * rng.choice((90, 110, 900, 20_000)) + "1" + "}" * 900).encode(),
                lambda: text.encode("utf-16"),
                lambda: b"\xef\xbb\xbf" + text.encode(),
                lambda: b"\x1f\x8b" + rng.randbytes(50),
                lambda: b"[" + rng.choice((b"[],", b"{},", b'{"a":1},')) * 10**6 + b"1]", lambda: b"9" * 10**6,
                lambda: b"", lambda: b"null", lambda: b"9" * 10_000, lambda: b"1e999", lambda: b"[" * 5,
                lambda: text.encode() + text.encode(),
                lambda: (text[:-1] + "," + text[1:]).encode() if text.startswith("{") else b"{}",
            )
        )()  # fmt: skip
    return json.dumps(_odd_json(rng)).encode()


def _odd_json(rng: Random) -> Any:
    deep: Any = "x"
    for _ in range(rng.choice((3, 60, 98, 101, 500, 980))):
        deep = {"a": deep} if rng.random() < 0.5 else [deep]
    return rng.choice(
        (
            None, True, -1, 0, 1.5, 1e308, float("nan"), float("inf"), 10**30, 10**4000, -(10**400), "", "text",
            "\ud800", "../../../tmp/x", "/etc/passwd", "a\nb\x1b[31m", "x" * 100_000, [], {}, [1],
            {"term": 3}, [[]], deep, "1e5",
            "NaN", "bert", "gelu", 2**31, 2**63, 10**12, [None] * 1000, {"": ""},
        )
    )  # fmt: skip


def _with_other_value(content: Any, rng: Random) -> Any:
    if isinstance(content, dict) and content and rng.random() < 0.85:
        changed, key = dict(content), rng.choice(list(content))
        way = rng.random()
        if way < 0.1:
            del changed[key]
        elif way < 0.2:
            changed[rng.choice(("x", "\ud800", "__class__", "../x", "-1", "99999"))] = changed.pop(key)
        else:
            changed[key] = _with_other_value(content[key], rng)
        return changed
    if isinstance(content, list) and content and rng.random() < 0.85:
        changed, place = list(content), rng.randrange(len(content))
        if rng.random() < 0.15:
            changed.insert(place, changed[rng.randrange(len(changed))])
        else:
            changed[place] = _with_other_value(content[place], rng)
        return changed
    return _odd_json(rng)


def mutate_npy(array: np.ndarray, canary: Path, rng: Random) -> bytes:
    """An .npy file with another header, other values or a pickle."""
    stream = io.BytesIO()
    way = rng.random()
    if way < 0.2:
        values = np.empty(12, dtype=object)
        values[3] = Bomb(canary, rng)
        np.save(stream, values, allow_pickle=True)
    elif way < 0.4:
        values = array.copy()
        values[rng.randrange(len(values))] = rng.choice((np.nan, np.inf, -np.inf, 3e38, 0))
        kind = rng.choice(("f4", ">f8", "i8", "?", "c16", "S3", "U2", "M8[s]", "f2"))
        with np.errstate(all="ignore"):
            np.save(stream, np.nan_to_num(values).astype(kind) if kind != "f4" else values)
    elif way < 0.5:
        np.savez_compressed(stream, array, np.zeros(10**6))
    else:
        np.save(stream, array)
        content = stream.getvalue()
        if way < 0.8:
            shape = rng.choice(
                ("(1000000000000,)", "(-12,)", "(12,12)", "()", "(2**40,)", "(0,)", "(99999999999999999999,)")
            )
            return content.replace(b"(12,)", shape.encode(), 1)
        return mutate_bytes(content, rng)
    return stream.getvalue()
