"""The gene vocabulary of a Geneformer model: which token, median and symbol belong to which gene.

The dictionaries are pickles that come with the model. They are read by an unpickler that can build plain
containers, numbers and strings, and nothing else, so a prepared file cannot run code here.
"""

import io
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from cellcircuits.errors import UserError
from cellcircuits.files import read_bounded
from cellcircuits.pickle_check import DICTIONARY, require_harmless, shown

SUBFOLDERS = ("", "geneformer", "gene_dictionaries_30m", "geneformer/gene_dictionaries_30m")
MAX_FILE_BYTES = 100_000_000
MAX_ENTRIES = 1_000_000
MAX_TOKEN = 2**31 - 1
# Models may round their vocabulary up; a larger gap means another model's dictionary (V2 in V1: 5,151).
MAX_UNUSED_TOKENS = 1024
_NUMBER_DTYPES = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")


@dataclass(frozen=True)
class GeneVocabulary:
    """Tokens, medians and symbols of the genes one model knows.

    Attributes:
        token_of: Ensembl id -> token, special tokens left out.
        median_of: Ensembl id -> median of the expression where it is not zero.
        ensembl_of: symbol -> Ensembl id.
        pad: token of `<pad>`, None where the dictionary has none; `mask`, `cls` and `eos` alike.
        n_tokens: largest token + 1.
        files: the dictionaries read: tokens, medians, symbols.
    """

    token_of: Mapping[str, int]
    median_of: Mapping[str, float]
    ensembl_of: Mapping[str, str]
    pad: int | None
    mask: int | None
    cls: int | None
    eos: int | None
    n_tokens: int
    files: tuple[Path, ...]

    @property
    def special_tokens(self) -> frozenset[int]:
        """Tokens that are no gene."""
        return frozenset(token for token in (self.pad, self.mask, self.cls, self.eos) if token is not None)

    def symbol_of_token(self) -> dict[int, str]:
        """Symbol of every gene token; its Ensembl id where the dictionary has no symbol for it."""
        symbols = {ensembl: symbol for symbol, ensembl in self.ensembl_of.items()}
        return {token: symbols.get(ensembl, ensembl) for ensembl, token in self.token_of.items()}


def load_vocabulary(folders: Sequence[Path], vocab_size: int) -> GeneVocabulary:
    """Find and read the dictionaries that fit a model.

    Each folder is searched, then its `geneformer/` and `gene_dictionaries_30m/` subfolders. A dictionary
    whose largest token is the model's last one is preferred, then the one that leaves the fewest tokens
    unused; among equals, the first folder counts.

    Args:
        folders: places to search, the most trusted first.
        vocab_size: number of tokens the model embeds.

    Raises:
        UserError: nothing found, nothing fits, two different dictionaries of one folder fit equally well, a
            partner file is missing, or a file is not what it should be.
    """
    places = _places(folders)
    token_files = [file for place in places for file in sorted(place.glob("token_dictionary*.pkl"))]
    if not token_files:
        _raise_not_found(folders)
    tokens_of_file = {file: read_token_dictionary(file) for file in token_files}
    token_file = _best_fit(tokens_of_file, vocab_size)
    suffix = token_file.name.removeprefix("token_dictionary")
    median_file = _partner(token_file, f"gene_median_dictionary{suffix}")
    name_file = _partner(token_file, f"gene_name_id_dict{suffix}")
    tokens = tokens_of_file[token_file]
    return GeneVocabulary(
        token_of={key: token for key, token in tokens.items() if not _is_special(key)},
        median_of=read_median_dictionary(median_file),
        ensembl_of=read_name_dictionary(name_file),
        pad=tokens.get("<pad>"),
        mask=tokens.get("<mask>"),
        cls=tokens.get("<cls>"),
        eos=tokens.get("<eos>"),
        n_tokens=max(tokens.values()) + 1,
        files=(token_file, median_file, name_file),
    )


def read_token_dictionary(path: Path) -> dict[str, int]:
    """Read Ensembl id or special token -> token.

    Raises:
        UserError: not a dictionary of unique non-negative integers, or no gene in it.
    """
    content = _read_dictionary(path)
    for key, token in content.items():
        if type(token) is not int or not 0 <= token <= MAX_TOKEN:
            raise UserError(f"{path}: the token of {key!r:.80} is {shown(token)}, not a non-negative integer.")
    if len(set(content.values())) != len(content):
        raise UserError(f"{path}: several genes share one token; the file is not a token dictionary.")
    if all(_is_special(key) for key in content):
        raise UserError(f"{path}: holds no gene; the file is not a token dictionary.")
    return content


def read_median_dictionary(path: Path) -> dict[str, float]:
    """Read Ensembl id -> median.

    Raises:
        UserError: not a dictionary of finite positive numbers.
    """
    content = _read_dictionary(path)
    for key, median in content.items():
        if type(median) not in (int, float) or not 0 < median <= sys.float_info.max:  # an integer may be larger
            raise UserError(f"{path}: the median of {key!r:.80} is {shown(median)}, not a finite positive number.")
    return {key: float(median) for key, median in content.items()}


def read_name_dictionary(path: Path) -> dict[str, str]:
    """Read symbol -> Ensembl id.

    Raises:
        UserError: not a dictionary of strings.
    """
    content = _read_dictionary(path)
    for key, ensembl in content.items():
        if type(ensembl) is not str:
            raise UserError(f"{path}: the gene id of {key!r:.80} is {shown(ensembl)}, not a string.")
    return content


def _is_special(key: str) -> bool:
    return key.startswith("<") and key.endswith(">")


def _places(folders: Sequence[Path]) -> list[Path]:
    """Existing folders to search, in order, each once."""
    found: dict[Path, Path] = {}
    for folder in folders:
        for subfolder in SUBFOLDERS:
            place = Path(folder) / subfolder
            if place.is_dir():
                found.setdefault(place.resolve(), place)
    return list(found.values())


def _raise_not_found(folders: Sequence[Path]) -> NoReturn:
    searched = ", ".join(str(folder) for folder in folders) or "none given"
    raise UserError(
        f"No gene dictionaries found: searched {searched} (and their subfolders geneformer/ and "
        "gene_dictionaries_30m/) for token_dictionary*.pkl with gene_median_dictionary*.pkl and "
        "gene_name_id_dict*.pkl; name the folder that holds them with --dicts."
    )


def _best_fit(tokens_of_file: Mapping[Path, dict[str, int]], vocab_size: int) -> Path:
    unused = {file: vocab_size - 1 - max(tokens.values()) for file, tokens in tokens_of_file.items()}
    fitting = [file for file, n_unused in unused.items() if 0 <= n_unused <= MAX_UNUSED_TOKENS]
    if not fitting:
        sizes = ", ".join(f"{file} has {vocab_size - n_unused}" for file, n_unused in unused.items())
        raise UserError(
            f"No gene dictionary fits the model, whose vocabulary has {vocab_size} tokens: {sizes}; "
            "name the folder of the model's own dictionaries with --dicts."
        )
    best = min(fitting, key=lambda file: unused[file])  # the first of equals
    for rival in fitting:
        same_rank = rival.parent == best.parent and unused[rival] == unused[best]
        if same_rank and tokens_of_file[rival] != tokens_of_file[best]:
            raise UserError(
                f"{best.parent}: {best.name} and {rival.name} fit the model equally well and differ; name a "
                "folder that holds only the model's own dictionaries with --dicts."
            )
    return best


def _partner(token_file: Path, name: str) -> Path:
    partner = token_file.with_name(name)
    if not partner.is_file():
        raise UserError(
            f"{token_file.parent}: {name} is missing beside {token_file.name}; put it there, or name the "
            "folder that holds all three dictionaries with --dicts."
        )
    return partner


def _read_dictionary(path: Path) -> dict[str, Any]:
    content = _unpickle(path)
    if type(content) is not dict or not all(type(key) is str for key in content):
        raise UserError(f"{path}: is not a dictionary with strings as keys.")
    try:
        "".join([*content, *(value for value in content.values() if type(value) is str)]).encode()
    except UnicodeEncodeError:  # lone surrogates, which no result file could hold
        raise UserError(f"{path}: holds text that is no Unicode; fetch it again.") from None
    if not 0 < len(content) <= MAX_ENTRIES:
        raise UserError(f"{path}: holds {len(content)} entries; expected 1 to {MAX_ENTRIES}.")
    return content


def _unpickle(path: Path) -> Any:
    raw = read_bounded(path, MAX_FILE_BYTES, "a gene dictionary")
    try:
        require_harmless(raw, str(path), DICTIONARY)
        return _PlainUnpickler(io.BytesIO(raw), path).load()
    except UserError:
        raise
    except Exception as error:  # damaged bytes make an unpickler raise almost any exception
        raise UserError(f"{path}: is damaged or not a pickle ({error!s:.200}); fetch it again.") from None


class _PlainUnpickler(pickle.Unpickler):
    """Builds containers, numbers and strings; NumPy scalars become Python numbers without NumPy's code."""

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Stand-ins for the two NumPy constructors of a scalar; no other global."""
        if (module, name) == ("numpy", "dtype"):
            return _PlainDtype
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "scalar":
            return _PlainScalar
        raise UserError(
            f"{self._path}: refused, because it asks for {module}.{name}; a gene dictionary holds only "
            "strings and numbers. Do not open it with anything else; fetch the dictionaries again."
        )


class _PlainDtype:
    """Stand-in for `numpy.dtype`: the kinds of number a gene dictionary may hold."""

    __slots__ = ("code", "order")

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in _NUMBER_DTYPES:
            raise ValueError(f"NumPy type {code!r:.40} is no plain number")
        self.code = code
        self.order = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise ValueError("unknown byte order")
        self.order = state[1]


class _PlainScalar:
    """Stand-in for `numpy.core.multiarray.scalar`; gives the Python number."""

    def __new__(cls, dtype: _PlainDtype, raw: bytes) -> Any:
        if type(dtype) is not _PlainDtype or type(raw) is not bytes:
            raise TypeError("damaged NumPy scalar")
        (number,) = np.frombuffer(raw, dtype=dtype.order + dtype.code)
        return number.item()

    def __setstate__(self, state: Any) -> NoReturn:
        # Without it, a pickle could set attributes of this class.
        raise TypeError("a NumPy scalar has no state")
