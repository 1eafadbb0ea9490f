"""What the files of a model folder ask for, checked before transformers sees them. No torch model is built here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cellcircuits.device import host_memory
from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json
from cellcircuits.loading import require_sound_archive

FLOAT32_BYTES = 4
MAX_HEADER_BYTES = 1 << 20  # of a safetensors file; Geneformer's largest has a thirtieth of that
MAX_LAYERS = 512
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
# what shapes a BertForMaskedLM; nothing else of a config.json is handed on, and so none of it can import or fetch code
SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "type_vocab_size",
)  # fmt: skip
_OTHERS: Mapping[str, tuple[type, ...]] = {
    "hidden_act": (str,),
    "layer_norm_eps": (float,),
    "pad_token_id": (int, type(None)),
    "tie_word_embeddings": (bool,),
}
_EXPECTED = {"model_type": "bert", "position_embedding_type": "absolute", "is_decoder": False}
# code beside the model, weights in another form, weights of another folder
_FOREIGN = ("auto_map", "quantization_config", "base_model_name_or_path")


def model_fields(source: str, content: Any) -> dict[str, Any]:
    """The settings of a `config.json` that shape the model.

    Args:
        source: the model, for errors.
        content: the parsed file.

    Raises:
        UserError: it asks for code, is of no BERT that the engine knows, or holds impossible values.
    """
    if not isinstance(content, dict):
        raise UserError(f"--model {source}: config.json is not an object; fetch the model again.")
    for field, value in _EXPECTED.items():
        found = content.get(field, value)
        if found != value:
            raise UserError(f"--model {source}: config.json has {field} = {found!r:.80}; a Geneformer has {value!r}.")
    for field in _FOREIGN:
        if content.get(field) is not None:
            raise UserError(
                f"--model {source}: config.json has `{field}`; only plain weights of a BertForMaskedLM are loaded, and "
                "code that comes with a model is never run."
            )
    fields = {name: content[name] for name in (*SIZES, *_OTHERS) if name in content}
    for name, value in fields.items():
        if name in SIZES:
            sound = type(value) is int and 0 < value < 2**31
        else:
            sound = type(value) in _OTHERS[name] and not (name == "layer_norm_eps" and not 0 < value < 1)
        if not sound:
            raise UserError(f"--model {source}: config.json has {name} = {value!r:.80}, which is no possible value.")
    return fields


def require_possible_sizes(source: str, folder: Path | None, sizes: Mapping[str, int]) -> None:
    """Check, before any weight is made, that a model of these sizes is what the files hold and fits in memory.

    Args:
        source: the model, for errors.
        folder: its local folder; None for one from the hub whose weights come in several files.
        sizes: every one of `SIZES`.

    Raises:
        UserError: it does not, or a weight file is refused.
    """
    n_layers, needed = sizes["num_hidden_layers"], _n_parameters(sizes)
    if n_layers > MAX_LAYERS or needed * FLOAT32_BYTES > host_memory():
        raise UserError(
            f"--model {source}: config.json describes {n_layers} blocks with {needed:,} weights in all, more than this "
            "machine's memory holds."
        )
    if folder is None:
        return
    n_bytes = sum(_checked_weights(path) for path in _weight_files(source, folder))
    if n_bytes and needed > n_bytes:
        raise UserError(
            f"--model {source}: cannot be loaded (config.json describes {needed:,} weights, but the weight files hold "
            f"{n_bytes:,} bytes); fetch the model again."
        )


def _n_parameters(sizes: Mapping[str, int]) -> int:
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    n_rows = sizes["vocab_size"] + sizes["max_position_embeddings"] + sizes["type_vocab_size"]
    return width * n_rows + sizes["num_hidden_layers"] * width * (4 * width + 2 * inner)


def _weight_files(source: str, folder: Path) -> list[Path]:
    """The files transformers would take the weights from; none where there are none, which it says itself."""
    if (folder / "adapter_config.json").exists():
        raise UserError(f"--model {source}: holds an adapter (adapter_config.json), not a whole model.")
    for name in WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _shards(index)
    return []


def _shards(index: Path) -> list[Path]:
    content = read_json(index)
    names = content.get("weight_map") if isinstance(content, dict) else None
    shards = set(names.values()) if isinstance(names, dict) and all(type(n) is str for n in names.values()) else set()
    if not shards or any(not name or Path(name).name != name or "\\" in name for name in shards):
        raise UserError(f"{index}: `weight_map` must name files of this folder; fetch the model again.")
    missing = sorted(name for name in shards if not (index.parent / name).is_file())
    if missing:
        raise UserError(f"{index}: {missing[0]!r:.80} is not there; fetch the model again.")
    return [index.parent / name for name in sorted(shards)]


def _checked_weights(path: Path) -> int:
    """Bytes of a weight file, which its library may read."""
    if path.suffix == ".bin":
        require_sound_archive(path)
    else:
        with path.open("rb") as stream:
            n_header = int.from_bytes(stream.read(8), "little")
        if n_header > MAX_HEADER_BYTES:  # the library admits a hundred times as much, of names of weights that none has
            raise UserError(f"{path}: cannot be loaded (it claims a header of {n_header:,} bytes); fetch it again.")
    return path.stat().st_size


def weight_file(folder: Path, name: str) -> Path:
    """The file of a checked model folder that a weight comes from, for errors."""
    for file in WEIGHTS:
        index = folder / f"{file}.index.json"
        if (folder / file).is_file():
            return folder / file
        if index.is_file():
            return folder / read_json(index)["weight_map"].get(name, index.name)
    return folder
