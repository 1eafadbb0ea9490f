"""Look through a pickle before anything is built from it. Standard library only.

A restricted unpickler builds nothing but plain values, but even those can be a trap: a few bytes make a table of
2^31 notes, or a tuple of tuples that share their parts and that takes years to hash or to print.
"""

import pickletools
from collections.abc import Collection

from cellcircuits.errors import UserError

MAX_OPCODES = 5_000_000
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
_TABLES = frozenset({"EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"})
_NOTES_IN = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_NOTES_OUT = frozenset({"GET", "BINGET", "LONG_BINGET"})
_OBJECTS = frozenset({"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD"})
DICTIONARY = _FRAMEWORK | _TEXTS | _NUMBERS | _TABLES | _NOTES_IN | _NOTES_OUT | _OBJECTS
CHECKPOINT = (DICTIONARY | {"EMPTY_LIST", "LIST", "APPEND", "APPENDS", "BINPERSID"}) - {"STACK_GLOBAL"}


def shown(value: object) -> str:
    """A value out of a pickle for an error: some have no end when printed, and Python prints no very long integer."""
    plain = type(value) in (str, float, bool, type(None)) or (type(value) is int and abs(value) <= 2**64)
    return f"{value!r:.80}" if plain else f"a {type(value).__name__}"


def require_harmless(
    content: bytes, where: str, admitted: Collection[str], scalars_by: Collection[str], max_reused: int
) -> set[str]:
    """Refuse a pickle that would take more memory or time than its size says.

    Args:
        content: the pickle.
        where: its file, for errors.
        admitted: opcodes it may use, `DICTIONARY` or `CHECKPOINT`.
        scalars_by: those that make something without parts, of `REDUCE` and `BUILD`.
        max_reused: how often it may use a container again; each time can double what the whole stands for.

    Returns:
        The globals it asks for by name, `module name`; not those of `STACK_GLOBAL`.

    Raises:
        UserError: damaged, or refused.
    """
    single = _TEXTS | {"GLOBAL", "STACK_GLOBAL"} | frozenset(scalars_by)
    is_single: dict[int, bool] = {}  # per note: whether it has no parts
    names, n_opcodes, n_reused, before = set(), 0, 0, ""
    try:
        for opcode, argument, _ in pickletools.genops(content):
            name, n_opcodes = opcode.name, n_opcodes + 1
            if name not in admitted or n_opcodes > MAX_OPCODES:
                raise UserError(f"{where}: refused, it is no plain data ({name}); fetch it again from its origin.")
            if name in _NOTES_IN:
                note = len(is_single) if argument is None else argument
                if note > n_opcodes:
                    raise UserError(f"{where}: refused, it asks for {note} notes; fetch it again from its origin.")
                is_single[note] = before in single
            elif name in _NOTES_OUT:
                n_reused += not is_single[argument]
            elif name == "GLOBAL":
                names.add(argument)
            before = name
    except (ValueError, KeyError, IndexError, OverflowError, UnicodeError) as error:
        raise UserError(f"{where}: is damaged or not a pickle ({error!s:.200}); fetch it again.") from None
    if n_reused > max_reused:
        raise UserError(
            f"{where}: refused, its parts hold each other {n_reused} times; fetch it again from its origin."
        )
    return names
