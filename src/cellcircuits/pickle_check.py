"""Look through a pickle before anything is built from it. Standard library only.

A restricted unpickler builds nothing but plain values, but even those can be a trap: a few bytes make a table of
2^31 notes, a tuple of tuples that share their parts and takes years to hash, one nested so deeply that hashing it ends
the process, or integers that all have the same hash.
"""

import pickletools
from dataclasses import dataclass
from typing import Any

from cellcircuits.errors import UserError

MAX_OPCODES = 5_000_000
MAX_INTEGER = 1 << 64  # Python hashes integers modulo 2^61 - 1: larger ones can be made to collide without end
_FRAMEWORK = frozenset({"PROTO", "FRAME", "STOP", "MARK"})
_TEXTS = frozenset(
    {
        "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8",
        "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    }
)  # fmt: skip
_NUMBERS = frozenset(
    {
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "NONE", "NEWTRUE",
        "NEWFALSE",
    }
)  # fmt: skip
_TUPLES = frozenset({"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_TABLES = _TUPLES | {"EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"}
_NOTES_IN = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_NOTES_OUT = frozenset({"GET", "BINGET", "LONG_BINGET"})
_TUPLE_USERS = frozenset({"REDUCE", "BUILD", "BINPERSID"})  # what takes a tuple and puts something else in its place


@dataclass(frozen=True)
class Plain:
    """What a pickle of plain data may hold.

    Attributes:
        opcodes: those that it may use.
        scalars_by: those that make something without parts, of `REDUCE` and `BUILD`.
        max_reused: how often it may use a container again; each time can double what the whole stands for.
        max_tuples: how many tuples it may have besides arguments of `REDUCE` and the like; that is how deep they nest.
    """

    opcodes: frozenset[str]
    scalars_by: frozenset[str] = frozenset()
    max_reused: int = 0
    max_tuples: int = 0


_BOTH = _FRAMEWORK | _TEXTS | _NUMBERS | _TABLES | _NOTES_IN | _NOTES_OUT
DICTIONARY = Plain(_BOTH | {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"}, frozenset({"REDUCE", "BUILD"}))
CHECKPOINT = Plain(
    _BOTH | {"GLOBAL", "REDUCE", "BUILD", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "BINPERSID"},
    max_reused=20,
    max_tuples=10_000,
)


def shown(value: object) -> str:
    """A value out of a pickle for an error: some have no end when printed, and Python prints no very long integer."""
    plain = type(value) in (str, float, bool, type(None)) or (type(value) is int and abs(value) <= 2**64)
    return f"{value!r:.80}" if plain else f"a {type(value).__name__}"


def require_harmless(content: bytes, where: str, plain: Plain) -> set[str]:
    """Refuse a pickle that would take more memory or time than its size says.

    Args:
        content: the pickle.
        where: its file, for errors.
        plain: what it may hold.

    Returns:
        The globals it asks for by name, `module name`; not those of `STACK_GLOBAL`.

    Raises:
        UserError: damaged, or refused.
    """
    found = _Found(_TEXTS | {"GLOBAL", "STACK_GLOBAL"} | plain.scalars_by)
    why = ""
    try:
        for n_opcodes, (opcode, argument, _) in enumerate(pickletools.genops(content), start=1):
            if opcode.name not in plain.opcodes or n_opcodes > MAX_OPCODES:
                why = f"is no plain data ({opcode.name})"
            elif type(argument) is int and abs(argument) >= MAX_INTEGER:
                why = f"holds an integer of {argument.bit_length()} bits"
            elif opcode.name in _NOTES_IN and (argument or 0) > n_opcodes:
                why = f"asks for {argument} notes"
            if why:
                break
            found.add(opcode.name, argument)
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeError) as error:
        raise UserError(f"{where}: is damaged or not a pickle ({error!s:.200}); fetch it again.") from None
    if found.n_reused > plain.max_reused:
        why = why or f"holds parts that hold each other {found.n_reused} times"
    if found.n_tuples > plain.max_tuples:
        why = why or f"holds {found.n_tuples} tuples"
    if why:
        raise UserError(f"{where}: refused, it {why}; fetch it again from its origin.")
    return found.names


class _Found:
    """What the opcodes seen so far have in them."""

    def __init__(self, single: frozenset[str]) -> None:
        self.names: set[str] = set()
        self.n_reused = self.n_tuples = 0
        self._single, self._before = single, ""
        self._is_single: dict[int, bool] = {}  # per note: whether it has no parts

    def add(self, name: str, argument: Any) -> None:
        if name in _NOTES_IN:  # does not count as what comes before: it stands between a tuple and what takes it
            self._is_single[len(self._is_single) if argument is None else argument] = self._before in self._single
            return
        self.n_tuples += self._before in _TUPLES and name not in _TUPLE_USERS
        if name in _NOTES_OUT:
            self.n_reused += not self._is_single[argument]
        elif name == "GLOBAL":
            self.names.add(argument)
        self._before = name
