"""Reading the gene dictionaries: what fits the model, and what must never run."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from cell_fixtures import DICTS, N_V1, N_V2, ensembl, write_dictionaries
from cellcircuits.errors import UserError
from cellcircuits.vocabulary import load_vocabulary, read_median_dictionary, read_token_dictionary

needs_dicts = pytest.mark.skipif(not DICTS.is_dir(), reason="the published dictionaries are not here")
CANARY: list[str] = []


def sing() -> None:
    CANARY.append("executed")


class Bomb:
    def __reduce__(self):
        return sing, ()


def test_reads_plain_dictionaries(tmp_path):
    vocabulary = load_vocabulary([write_dictionaries(tmp_path, "_gc9M", 5)], 9)
    assert vocabulary.token_of == {ensembl(number): number + 3 for number in range(1, 6)}
    assert vocabulary.median_of[ensembl(2)] == 1.5
    assert (vocabulary.pad, vocabulary.mask, vocabulary.cls, vocabulary.eos) == (0, 1, 2, 3)
    assert vocabulary.special_tokens == {0, 1, 2, 3}
    assert vocabulary.n_tokens == 9
    assert [file.name for file in vocabulary.files] == [
        "token_dictionary_gc9M.pkl",
        "gene_median_dictionary_gc9M.pkl",
        "gene_name_id_dict_gc9M.pkl",
    ]


def test_symbol_falls_back_to_the_ensembl_id(tmp_path):
    write_dictionaries(tmp_path, "", 2, names={"GENE1": ensembl(1), "OTHER": ensembl(77)})
    assert load_vocabulary([tmp_path], 6).symbol_of_token() == {4: "GENE1", 5: ensembl(2)}


@pytest.mark.parametrize("subfolder", ["", "geneformer", "gene_dictionaries_30m", "geneformer/gene_dictionaries_30m"])
def test_finds_dictionaries_in_subfolders(tmp_path, subfolder):
    write_dictionaries(tmp_path / subfolder, "_gc9M", 5)
    assert load_vocabulary([tmp_path / "nothing", tmp_path], 9).n_tokens == 9


def test_prefers_the_dictionary_of_the_model(tmp_path):
    write_dictionaries(tmp_path / "geneformer", "_small", 5)
    write_dictionaries(tmp_path / "gene_dictionaries_30m", "_large", 8)
    assert load_vocabulary([tmp_path], 12).n_tokens == 12
    assert load_vocabulary([tmp_path], 9).n_tokens == 9
    assert load_vocabulary([tmp_path], 13).n_tokens == 12  # one token unused


def test_first_of_equal_folders_counts(tmp_path):
    first = write_dictionaries(tmp_path / "a", "", 5)
    second = write_dictionaries(tmp_path / "b", "", 5)
    assert load_vocabulary([second, first], 9).files[0].parent == second


def test_refuses_to_guess_between_two_that_fit(tmp_path):
    write_dictionaries(tmp_path, "_old", 5)
    write_dictionaries(tmp_path, "_new", 5, tokens={ensembl(number): 9 - number for number in range(1, 6)})
    with pytest.raises(UserError, match=r"_new.pkl and token_dictionary_old.pkl fit .* equally well.*--dicts"):
        load_vocabulary([tmp_path], 9)


def test_names_folders_files_and_flag_when_missing(tmp_path):
    with pytest.raises(UserError) as caught:
        load_vocabulary([tmp_path / "here", tmp_path / "there"], 9)
    for part in (
        "here",
        "there",
        "token_dictionary*.pkl",
        "gene_median_dictionary",
        "gene_name_id_dict",
        "--dicts",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("name", ["gene_median_dictionary_x.pkl", "gene_name_id_dict_x.pkl"])
def test_names_a_missing_partner(tmp_path, name):
    write_dictionaries(tmp_path, "_x", 5)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing beside token_dictionary_x.pkl.*--dicts"):
        load_vocabulary([tmp_path], 9)


@pytest.mark.parametrize("vocab_size", [8, 9 + 1025])
def test_names_sizes_when_nothing_fits(tmp_path, vocab_size):
    write_dictionaries(tmp_path, "_x", 5)
    with pytest.raises(UserError, match=rf"{vocab_size} tokens: .*token_dictionary_x.pkl has 9"):
        load_vocabulary([tmp_path], vocab_size)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("wrapped", [False, True])
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, protocol, wrapped):
    path = tmp_path / "token_dictionary.pkl"
    path.write_bytes(pickle.dumps({"ENSG1": Bomb()} if wrapped else Bomb(), protocol=protocol))
    with pytest.raises(UserError, match=r"token_dictionary.pkl: refused.*test_vocabulary.sing"):
        read_token_dictionary(path)
    assert CANARY == []


@pytest.mark.parametrize(
    "module, name",
    [
        ("builtins", "eval"),
        ("os", "system"),
        ("numpy", "load"),
        ("builtins", "getattr"),
        ("numpy.core.multiarray", "_reconstruct"),
    ],
)
def test_other_globals_are_refused(tmp_path, module, name):
    path = tmp_path / "token_dictionary.pkl"
    path.write_bytes(f"c{module}\n{name}\n.".encode())
    with pytest.raises(UserError, match=f"asks for {module}.{name}"):
        read_token_dictionary(path)


def test_stand_ins_cannot_be_altered(tmp_path):
    path = tmp_path / "token_dictionary.pkl"
    for target in ("cnumpy\ndtype\n", "cnumpy.core.multiarray\nscalar\n"):
        path.write_bytes(f"{target}(dVx\nI1\nsb.".encode())  # BUILD: set the state of the class itself
        with pytest.raises(UserError, match="damaged"):
            read_token_dictionary(path)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16, np.uint8])
def test_numpy_scalars_become_numbers(tmp_path, dtype):
    path = tmp_path / "gene_median_dictionary.pkl"
    path.write_bytes(pickle.dumps({"ENSG1": dtype(3)}, protocol=4))
    assert read_median_dictionary(path) == {"ENSG1": 3.0}


def test_numpy_text_and_objects_are_refused(tmp_path):
    path = tmp_path / "gene_median_dictionary.pkl"
    for value in (np.str_("text"), np.datetime64("2020-01-01"), np.zeros(2)):
        path.write_bytes(pickle.dumps({"ENSG1": value}, protocol=4))
        with pytest.raises(UserError, match=r"gene_median_dictionary.pkl"):
            read_median_dictionary(path)


@pytest.mark.parametrize("content", [b"", b"not a pickle", pickle.dumps({"a": 4})[:-3], b"\x80\x04}."])
def test_damaged_file_is_one_sentence(tmp_path, content):
    path = tmp_path / "token_dictionary.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"token_dictionary.pkl"):
        read_token_dictionary(path)


@pytest.mark.parametrize(
    "tokens",
    [
        [1, 2],
        {3: 4},
        {"ENSG1": -1},
        {"ENSG1": 1.5},
        {"ENSG1": True},
        {"ENSG1": "2"},
        {"ENSG1": 5, "ENSG2": 5},
        {"<pad>": 0},
        {"ENSG1": 2**40},
    ],
)
def test_wrong_token_content(tmp_path, tokens):
    write_dictionaries(tmp_path, "", 5, tokens=tokens)
    with pytest.raises(UserError, match=r"token_dictionary.pkl"):
        load_vocabulary([tmp_path], 9)


@pytest.mark.parametrize("median", [0.0, -1.0, float("nan"), float("inf"), "1", None])
def test_wrong_median_content(tmp_path, median):
    write_dictionaries(tmp_path, "", 5, medians={"ENSG1": median})
    with pytest.raises(UserError, match=r"gene_median_dictionary.pkl: the median of 'ENSG1'"):
        load_vocabulary([tmp_path], 9)


def test_wrong_name_content(tmp_path):
    write_dictionaries(tmp_path, "", 5, names={"GENE1": 4})
    with pytest.raises(UserError, match=r"gene_name_id_dict.pkl: the gene id of 'GENE1' is 4"):
        load_vocabulary([tmp_path], 9)


@needs_dicts
def test_published_dictionaries_of_both_versions():
    first = load_vocabulary([DICTS / "V2", DICTS / "V1"], N_V1)
    assert (len(first.token_of), first.n_tokens, first.cls, first.eos) == (25_424, N_V1, None, None)
    assert first.special_tokens == {0, 1}
    assert min(first.token_of.values()) == 2  # a gene, not <cls>
    second = load_vocabulary([DICTS / "V1", DICTS / "V2"], N_V2)
    assert (len(second.token_of), second.n_tokens, second.cls, second.eos) == (20_271, N_V2, 2, 3)
    assert second.symbol_of_token()[second.token_of["ENSG00000121410"]] == "A1BG"
    assert all(type(token) is int for token in first.token_of.values())


@needs_dicts
def test_dictionary_of_the_other_version_is_refused():
    with pytest.raises(UserError, match=r"25426 tokens: .*gc104M.pkl has 20275"):
        load_vocabulary([Path(DICTS / "V2")], N_V1)
