"""Train the demo's small Geneformer on the train cells as a masked gene model.

Same form as Geneformer (18 blocks, post-layer-norm, ReLU, learned absolute positions), other sizes. A few hundred cells
and minutes on two cores would not teach the embeddings anything, so they START from statistics of the train
cells: co-expression components, the rank of the gene's median, and a wave code of the position. All weights are
trained from there. Called by `build_demo.py`; `model_quality.py` measures the result on the held-out cells.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import anndata
import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM

from cellcircuits.cells import CellSelection, CellSet, load_cells
from cellcircuits.tokenizer import PUBLISHED, GeneColumns, rank_tokens, wrap
from cellcircuits.vocabulary import GeneVocabulary

N_POSITIONS = 320
IGNORED = -100


@dataclass(frozen=True)
class TrainSettings:
    """Sizes, schedule and seeds of the demo model; the defaults made the committed one.

    Attributes:
        d_model: width of the residual stream; `n_heads` heads share it, the feed-forward has 4 times as many units.
        n_steps: optimizer steps of `batch` cells each.
        warmup: share of the steps in which the learning rate rises.
        selected: share of the gene positions the loss is taken at; of these 80% show `<mask>`, 10% a random gene,
            10% the gene itself, as in BERT.
        thinned: share of the views whose counts are thinned binomially, with a rate between `thin_low` and 1.
        n_components: co-expression components in the first embedding.
        n_median_waves: waves that code the rank of the gene's median there.
        n_position_waves: waves that code the position there.
        embedding_scale: standard deviation of that embedding.
    """

    d_model: int = 64
    n_layers: int = 18
    n_heads: int = 4
    n_steps: int = 1400
    batch: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    warmup: float = 0.1
    selected: float = 0.3
    thinned: float = 0.5
    thin_low: float = 0.4
    n_components: int = 20
    n_median_waves: int = 8
    n_position_waves: int = 12
    embedding_scale: float = 0.05
    n_threads: int = 1
    seed: int = 0


@dataclass(frozen=True)
class TrainCells:
    """Raw counts of the train cells, (n_cells, n_genes) CSR, and the genes of their columns."""

    counts: sp.csr_matrix
    genes: GeneColumns


def split_of(path: Path, vocabulary: GeneVocabulary, split: str) -> CellSet:
    """Tokens of the `train` or `held_out` cells, as the experiments read them."""
    selection = CellSelection(cells="all", n_cells=10**9, pool=10**9, obs_filters=(("split", split),))
    return load_cells(path, vocabulary, selection, N_POSITIONS)


def read_train_cells(path: Path, vocabulary: GeneVocabulary) -> TrainCells:
    """Counts of the train cells, for views of other depths than the file's."""
    cells = anndata.read_h5ad(path)
    known = [i for i, gene in enumerate(cells.var_names) if gene in vocabulary.token_of]
    gene_of_column = np.full(cells.n_vars, -1, dtype=np.int64)
    gene_of_column[known] = np.arange(len(known))
    ids = [cells.var_names[i] for i in known]
    tokens = np.array([vocabulary.token_of[gene] for gene in ids], dtype=np.int64)
    medians = np.array([vocabulary.median_of[gene] for gene in ids], dtype=np.float32)
    train = (cells.obs["split"] == "train").to_numpy()
    return TrainCells(sp.csr_matrix(cells.X[train]), GeneColumns(gene_of_column, tokens, medians))


# ---------------------------------------------------------------- the model before training


def new_model(settings: TrainSettings, cells: TrainCells, tokens: CellSet, n_vocab: int) -> BertForMaskedLM:
    """A model whose embeddings and output bias hold what simple statistics of the train cells say."""
    torch.manual_seed(settings.seed)
    config = BertConfig(
        vocab_size=n_vocab,
        hidden_size=settings.d_model,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        intermediate_size=4 * settings.d_model,
        hidden_act="relu",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=N_POSITIONS,
        type_vocab_size=2,
        pad_token_id=0,
    )
    model = BertForMaskedLM(config)
    rng = np.random.default_rng(settings.seed)
    embeddings = model.bert.embeddings
    with torch.no_grad():
        first = settings.embedding_scale * torch.from_numpy(_gene_embedding(settings, cells, n_vocab, rng))
        first[0] = 0
        embeddings.word_embeddings.weight.copy_(first)
        waves = settings.embedding_scale * torch.from_numpy(_position_embedding(settings, rng))
        embeddings.position_embeddings.weight.copy_(waves)
        model.cls.predictions.bias.copy_(torch.from_numpy(np.log(gene_frequency(tokens, n_vocab, 1.0))))
    return model


def gene_frequency(cells: CellSet, n_vocab: int, pseudocount: float) -> np.ndarray:
    """Share of each gene among all gene positions, (n_vocab,); next to nothing for the special tokens."""
    counts = np.full(n_vocab, pseudocount)
    counts[: len(("pad", "mask", "cls", "eos"))] = 1e-6
    for cell in cells.cells:
        counts[cell.tokens[cell.gene_positions]] += 1
    return counts / counts.sum()


def _gene_embedding(settings: TrainSettings, cells: TrainCells, n_vocab: int, rng: np.random.Generator) -> np.ndarray:
    """(n_vocab, d_model) float32: co-expression components, then waves of the median's rank, then noise."""
    embedding = rng.normal(0, 0.1, (n_vocab, settings.d_model))
    tokens, n_components = cells.genes.tokens, settings.n_components
    scaled = cells.counts.toarray()
    scaled = np.log1p(scaled / scaled.sum(axis=1, keepdims=True) * 10_000)[:, cells.genes.gene_of_column >= 0]
    scaled = (scaled - scaled.mean(axis=0)) / (scaled.std(axis=0) + 0.05)
    scaled -= scaled.mean(axis=1, keepdims=True)
    _, singular, right = np.linalg.svd(scaled, full_matrices=False)
    components = right[:n_components].T * np.sqrt(singular[:n_components])  # (n_genes, n_components)
    embedding[tokens, :n_components] = components / np.sqrt((components**2).mean())
    rank = cells.genes.medians.argsort(kind="stable").argsort(kind="stable") / len(tokens)
    for wave in range(settings.n_median_waves):
        column = n_components + 2 * wave
        embedding[tokens, column] = np.sqrt(2) * np.cos(np.pi * rank * 2**wave)
        embedding[tokens, column + 1] = np.sqrt(2) * np.sin(np.pi * rank * 2**wave)
    return embedding.astype(np.float32)


def _position_embedding(settings: TrainSettings, rng: np.random.Generator) -> np.ndarray:
    """(N_POSITIONS, d_model) float32: waves of 4 to 2 * N_POSITIONS positions in the last columns, noise elsewhere."""
    embedding = rng.normal(0, 0.1, (N_POSITIONS, settings.d_model))
    position = np.arange(N_POSITIONS)
    lengths = np.geomspace(4, 2 * N_POSITIONS, settings.n_position_waves)
    for wave, length in enumerate(lengths):
        column = settings.d_model - 2 * (wave + 1)
        embedding[:, column] = np.sqrt(2) * np.cos(2 * np.pi * position / length)
        embedding[:, column + 1] = np.sqrt(2) * np.sin(2 * np.pi * position / length)
    return embedding.astype(np.float32)


# ---------------------------------------------------------------- training


def train(settings: TrainSettings, cells_path: Path, vocabulary: GeneVocabulary, folder: Path) -> dict[str, object]:
    """Train, save `config.json` and `model.safetensors` into `folder`, and return how it went."""
    torch.set_num_threads(settings.n_threads)
    torch.set_flush_denormal(True)
    rng = np.random.default_rng(settings.seed + 1)
    cells = read_train_cells(cells_path, vocabulary)
    tokens = split_of(cells_path, vocabulary, "train")
    model = new_model(settings, cells, tokens, vocabulary.n_tokens).train()
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, settings))
    losses, start = [], time.perf_counter()
    with tqdm(total=settings.n_steps, desc="masked gene model", unit="step", mininterval=2) as progress:
        for _ in range(settings.n_steps):
            rows = rng.integers(0, cells.counts.shape[0], settings.batch)
            batch = _pad([_view(cells, row, vocabulary, settings, rng) for row in rows])
            loss = _loss(model, *_hide(batch, vocabulary, settings, rng))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            progress.update()
            progress.set_postfix_str(f"loss {np.mean(losses[-100:]):.3f}", refresh=False)
    model.eval().save_pretrained(folder)
    return {
        "settings": asdict(settings),
        "seconds": time.perf_counter() - start,
        "train_loss_last_100_steps": float(np.mean(losses[-100:])),
        "n_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": (folder / "model.safetensors").stat().st_size,
    }


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim > 1 and "embeddings" not in name else free).append(parameter)
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": free, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.99), fused=True)


def _rate(step: int, settings: TrainSettings) -> float:
    """Linear warm-up (18 post-norm blocks diverge without), then half a cosine down to 3%."""
    done = step / settings.n_steps
    return min(1.0, (done + 1 / settings.n_steps) / settings.warmup) * (0.03 + 0.97 * 0.5 * (1 + np.cos(np.pi * done)))


def _view(
    cells: TrainCells, row: int, vocabulary: GeneVocabulary, settings: TrainSettings, rng: np.random.Generator
) -> np.ndarray:
    """Tokens of one train cell, as it is or as if it had been sequenced less deeply."""
    counts = cells.counts[row]
    columns, values = counts.indices, counts.data
    if rng.random() < settings.thinned:
        values = rng.binomial(values.astype(np.int64), rng.uniform(settings.thin_low, 1)).astype(np.float32)
        columns, values = columns[values > 0], values[values > 0]
    ranked = rank_tokens(columns, values, cells.genes, PUBLISHED)
    return wrap(ranked, N_POSITIONS - 2, (vocabulary.cls, vocabulary.eos))[0]


def _pad(views: list[np.ndarray]) -> np.ndarray:
    """(batch, n_pos) int64, padded with 0, the token of `<pad>`."""
    batch = np.zeros((len(views), max(len(view) for view in views)), dtype=np.int64)
    for row, view in enumerate(views):
        batch[row, : len(view)] = view
    return batch


def _hide(
    batch: np.ndarray, vocabulary: GeneVocabulary, settings: TrainSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """What the model sees and what it is to say, both (batch, n_pos); IGNORED where no loss is taken."""
    genes = ~np.isin(batch, list(vocabulary.special_tokens))
    selected = genes & (rng.random(batch.shape) < settings.selected)
    kind = rng.random(batch.shape)
    seen = np.where(selected & (kind < 0.8), vocabulary.mask, batch)
    replaced = selected & (kind >= 0.9)
    all_genes = np.array(sorted(vocabulary.token_of.values()))
    seen[replaced] = rng.choice(all_genes, int(replaced.sum()))
    return torch.from_numpy(seen), torch.from_numpy(np.where(selected, batch, IGNORED))


def _loss(model: BertForMaskedLM, seen: Tensor, wanted: Tensor) -> Tensor:
    """Mean cross-entropy at the selected positions; the LM head runs there only."""
    padded = seen == 0
    mask = (~padded).long() if padded.any() else None
    stream = model.bert(seen, attention_mask=mask)[0]  # (batch, n_pos, d_model)
    chosen = wanted != IGNORED
    return functional.cross_entropy(model.cls(stream[chosen]), wanted[chosen])
