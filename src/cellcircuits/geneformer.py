"""Geneformer itself: load it, read its residual streams, run it with edited ones.

The only file that knows how `transformers` lays a BERT out. "Residual stream at layer l" is the output
of encoder block l, counted from 0. Edits and captures are hooks on the blocks and exist only inside a
`with`: `hidden_states` of transformers show an edit in version 4 and not in version 5.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM
from transformers.activations import ACT2FN
from transformers.utils import cached_file, extract_commit_hash
from transformers.utils import logging as transformers_logging

from cellcircuits.errors import UserError
from cellcircuits.jsonio import read_json
from cellcircuits.model_files import SIZES, WEIGHTS, model_fields, require_possible_sizes, weight_file

log = logging.getLogger(__name__)
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LoadedModel:
    """A Geneformer and where it came from.

    `folder` is the local folder that holds its files (dictionaries may lie with it), `fingerprint` a
    SHA-256 over its configuration and weights.
    """

    model: BertForMaskedLM
    source: str
    subfolder: str | None
    revision: str | None
    fingerprint: str
    folder: Path | None


def load_model(source: str, subfolder: str | None = None, revision: str | None = None) -> LoadedModel:
    """Load a `BertForMaskedLM` from a local folder or the Hugging Face hub, in eval mode, float32, on the CPU.

    Raises:
        UserError: not found, not a BERT, an architecture detail the engine does not know, or weights missing or not
            finite.
    """
    folder = Path(source)
    if folder.exists() and not (folder / (subfolder or "") / "config.json").is_file():
        raise UserError(f"{folder / (subfolder or '')}: no config.json there; --model takes the folder that holds it.")
    where: dict[str, Any] = {"subfolder": subfolder or "", "revision": revision or "main"}
    try:
        config = _read_config(source, folder / (subfolder or "") if folder.exists() else None, where)
        with _quiet_transformers():
            model, info = BertForMaskedLM.from_pretrained(
                source,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                weights_only=True,
                trust_remote_code=False,
                **where,
            )
    except UserError:
        raise
    except Exception as error:  # a damaged folder makes transformers and its parsers raise almost anything
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if "mismatched" in str(error):
            reason = "its weights and its config.json are of different sizes"
        what = "cannot be loaded" if folder.exists() else "no such folder, and as a name on the hub it cannot be loaded"
        raise UserError(f"--model {source}: {what} ({reason}).") from None
    _require_all_weights(source, info)
    _require_finite_weights(source, folder / (subfolder or "") if folder.exists() else None, model)
    model.eval().requires_grad_(False)
    return LoadedModel(
        model=model,
        source=source,
        subfolder=subfolder,
        revision=getattr(config, "_commit_hash", None) or revision,
        fingerprint=fingerprint(model),
        folder=folder if folder.exists() else None,
    )


def dictionary_folders(loaded: LoadedModel) -> list[Path]:
    """Folders in which the gene dictionaries of a model may lie; fetches them for a model from the hub.

    Raises:
        UserError: the hub repository cannot be read.
    """
    if loaded.folder is not None:
        return [loaded.folder / (loaded.subfolder or ""), loaded.folder, loaded.folder.resolve().parent]
    try:
        patterns = ["geneformer/*.pkl", "geneformer/gene_dictionaries_30m/*.pkl"]
        return [Path(snapshot_download(loaded.source, revision=loaded.revision, allow_patterns=patterns))]
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {loaded.source}: its gene dictionaries cannot be fetched ({reason}); name a folder "
            "that holds them with --dicts."
        ) from None


def fingerprint(model: BertForMaskedLM) -> str:
    """SHA-256 over the weights and the settings that shape the forward pass."""
    config = model.config
    digest = hashlib.sha256(f"{config.num_attention_heads} {config.hidden_act} {config.layer_norm_eps}".encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def encoder_blocks(model: BertForMaskedLM) -> nn.ModuleList:
    """The encoder blocks in order; block l writes the residual stream of layer l."""
    return model.bert.encoder.layer


@dataclass(frozen=True)
class BlockParts:
    """The modules of one post-layer-norm encoder block, in the order in which they act."""

    n_heads: int
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    intermediate: nn.Linear
    activation: Callable[[Tensor], Tensor]
    output: nn.Linear
    output_norm: nn.LayerNorm


def block_parts(model: BertForMaskedLM, layer: int) -> BlockParts:
    """The modules of encoder block `layer`."""
    block = encoder_blocks(model)[layer]
    attention = block.attention
    return BlockParts(
        n_heads=model.config.num_attention_heads,
        query=attention.self.query,
        key=attention.self.key,
        value=attention.self.value,
        attention_output=attention.output.dense,
        attention_norm=attention.output.LayerNorm,
        intermediate=block.intermediate.dense,
        activation=block.intermediate.intermediate_act_fn,
        output=block.output.dense,
        output_norm=block.output.LayerNorm,
    )


@dataclass(frozen=True)
class HeadParts:
    """The language-model head: logits = transform(x) weight^T + bias.

    `transform` is dense, activation and layer norm, (..., d_model) -> (..., d_model); `weight` (n_vocab, d_model),
    `bias` (n_vocab,).
    """

    transform: Callable[[Tensor], Tensor]
    weight: Tensor
    bias: Tensor


def head_parts(model: BertForMaskedLM) -> HeadParts:
    """The parts of the language-model head."""
    head = model.cls.predictions
    return HeadParts(head.transform, head.decoder.weight, head.decoder.bias)


def n_positions(model: BertForMaskedLM) -> int:
    """The longest sequence the model takes, special tokens included."""
    return model.config.max_position_embeddings


@contextmanager
def edited(model: BertForMaskedLM, edits: Mapping[int, Edit]) -> Iterator[None]:
    """Inside the `with`, the output x of block l becomes edits[l](x), x of shape (batch, n_pos, d_model)."""

    def hook(edit: Edit) -> Callable[..., Any]:
        def replace(_block: nn.Module, _inputs: Any, output: Any) -> Any:
            # transformers 4 returns a tuple here, transformers 5 a bare tensor
            return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

        return replace

    with ExitStack() as stack:
        for layer, edit in edits.items():
            handle = encoder_blocks(model)[layer].register_forward_hook(hook(edit))
            stack.callback(handle.remove)
        yield


@contextmanager
def captured(model: BertForMaskedLM, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Inside the `with`, a forward pass fills the yielded {layer: (batch, n_pos, d_model)}, edits included."""
    streams: dict[int, Tensor] = {}

    def keep(layer: int) -> Edit:
        def edit(residual: Tensor) -> Tensor:
            streams[layer] = residual
            return residual

        return edit

    with edited(model, {layer: keep(layer) for layer in layers}):
        yield streams


class _LastLayerReached(Exception):
    """Ends a forward pass whose remaining blocks nobody asked for."""


def residuals(model: BertForMaskedLM, tokens: Tensor, layers: Sequence[int]) -> dict[int, Tensor]:
    """Residual streams of one forward pass with the edits now active; it stops after the last layer asked for.

    Args:
        model: the Geneformer.
        tokens: (batch, n_pos) int64, no padding.
        layers: block indices to read.

    Returns:
        {layer: (batch, n_pos, d_model)} on the model's device.
    """

    def stop(*_: Any) -> None:
        raise _LastLayerReached

    with captured(model, layers) as streams, suppress(_LastLayerReached), ExitStack() as stack:
        stack.callback(encoder_blocks(model)[max(layers)].register_forward_hook(stop).remove)
        model.bert(input_ids=tokens)
    return streams


def masked_logits(model: BertForMaskedLM, tokens: Tensor) -> Tensor:
    """Language-model logits of a full forward pass: (batch, n_pos) int64 -> (batch, n_pos, n_vocab)."""
    return model(input_ids=tokens).logits


def _read_config(source: str, folder: Path | None, where: Mapping[str, Any]) -> BertConfig:
    """The model's settings, none but those that shape a BERT; its weight files are checked against them."""
    path = folder / "config.json" if folder else Path(cached_file(source, "config.json", **where))
    config = BertConfig(**model_fields(source, read_json(path)))
    if config.hidden_act not in ACT2FN:
        raise UserError(
            f"--model {source}: config.json has hidden_act = {config.hidden_act!r}, which is no activation."
        )
    require_possible_sizes(source, folder or _fetched(source, where), {name: getattr(config, name) for name in SIZES})
    config._commit_hash = None if folder else extract_commit_hash(str(path), None)
    return config


def _fetched(source: str, where: Mapping[str, Any]) -> Path | None:
    """The local copy of a model from the hub, once its weights are there; None where they come in several files."""
    for name in WEIGHTS:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False, **where)
        if path:
            return Path(path).parent
    return None


def _require_all_weights(source: str, info: Mapping[str, Any]) -> None:
    missing = [name for name in info["missing_keys"] if not name.startswith("cls.predictions.decoder")]
    if missing or info["mismatched_keys"]:
        names = ", ".join(sorted(map(str, [*missing, *info["mismatched_keys"]]))[:3])
        raise UserError(
            f"--model {source}: the weights lack or misfit {names}; this is not a complete BertForMaskedLM."
        )
    used = ("bert.encoder.", "bert.embeddings.")
    left_over = [name for name in info["unexpected_keys"] if name.startswith(used) and "position_ids" not in name]
    if left_over:
        raise UserError(
            f"--model {source}: the weights hold {sorted(left_over)[0]}, for which config.json has no place; take the "
            "config.json that belongs to them."
        )


def _require_finite_weights(source: str, folder: Path | None, model: BertForMaskedLM) -> None:
    """Check every weight: one that no token of a run needs would otherwise wait for another run."""
    tensors = model.state_dict().items()
    name = next((name for name, tensor in tensors if not torch.isfinite(tensor).all()), None)
    if name is not None:
        file = weight_file(folder, name) if folder else f"--model {source}"
        raise UserError(f"{file}: {name} holds NaN or infinite values; fetch the model again.")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence the loading report and bars of transformers; missing weights are checked by ourselves."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
