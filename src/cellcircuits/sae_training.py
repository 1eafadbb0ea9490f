"""Train one TopK SAE on rows of one layer's residual stream.

    loss = |x - x^|^2 / |x|^2  +  aux_coefficient * |e - e^|^2 / |e|^2,    x = (residual - mean) / rms

with e = x - x^ the error and e^ its reconstruction from the `k_aux` largest of the dead features alone
(AuxK), which is the cure for dead features here. Decoder directions W_dec[:, f] keep unit norm throughout.
The scaling is folded back at the end: the SAE given out takes the raw residual stream.
Source: Gao et al. (2024), "Scaling and evaluating sparse autoencoders", section 2 and appendix A.
"""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from cellcircuits.errors import UserError
from cellcircuits.preparation_state import SaveClock, Unfinished
from sae_model import TopKSAE

RMS_CHUNK_ROWS = 65_536
REFERENCE_FEATURES = 1 << 14
REFERENCE_RATE = 4e-4
N_LOGGED = 100
TRAINING = "training.npz"
ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class TrainingSettings:
    """How an SAE is trained.

    `lr` None takes 4e-4 / sqrt(n_features / 2^14): Gao et al.'s scaling, twice their rate, for batches and
    runs much smaller than theirs. `warmup` and `decay_from` are shares of the run. A feature counts as dead
    when it has not fired for `dead_after` of the rows of one epoch.
    """

    expansion: int = 4
    k: int = 32
    epochs: int = 10
    lr: float | None = None
    batch_size: int = 512
    seed: int = 42
    warmup: float = 0.05
    decay_from: float = 0.5
    dead_after: float = 0.1
    aux_coefficient: float = 1 / 32

    def learning_rate(self, n_features: int) -> float:
        """The peak learning rate for an SAE of this size."""
        return self.lr if self.lr is not None else REFERENCE_RATE / math.sqrt(n_features / REFERENCE_FEATURES)

    def rate_factor(self, progress: float) -> float:
        """Share of the peak rate at `progress` 0 to 1: linear warm-up, a plateau, linear decay to 0."""
        return min(1.0, progress / self.warmup, (1.0 - progress) / (1.0 - self.decay_from))


@dataclass
class TrainingRun:
    """State of one training: the SAE in scaled space, when each feature last fired, the steps and seconds taken."""

    sae: TopKSAE
    optimizer: torch.optim.Optimizer
    rows_since_fired: Tensor
    dead_after_rows: int
    k_aux: int
    log: list[dict[str, float]] = field(default_factory=list)
    n_done: int = 0
    seconds: float = 0.0


def train_sae(
    rows: np.ndarray,
    settings: TrainingSettings,
    device: torch.device,
    what: str = "SAE",
    state: Unfinished | None = None,
) -> tuple[TopKSAE, dict[str, Any]]:
    """Train an SAE on rows of the raw residual stream.

    Args:
        rows: (n_rows, d_model) float32.
        settings: sizes, schedule and seed.
        device: where to train; the SAE comes back on it.
        what: what the progress bar and errors call it.
        state: where the training is kept every few minutes and gone on with; None keeps nothing.

    Returns:
        The SAE, whose `input_mean` is the mean of `rows`, and a JSON-able record of the training.

    Raises:
        UserError: too few rows, rows without variance, k over the number of features, or a loss gone NaN.
    """
    n_rows, d_model = rows.shape
    n_features = settings.expansion * d_model
    if n_rows < 2 or settings.k > n_features:
        raise UserError(f"{n_rows} rows cannot train {n_features} features with --k {settings.k}.")
    mean, rms = mean_and_rms(rows)
    batch_size = min(settings.batch_size, n_rows)
    n_steps = settings.epochs * (n_rows // batch_size)
    with _denormals_flushed():
        generator = torch.Generator().manual_seed(settings.seed)
        run = _start(rows.shape, settings, generator, device)
        if state is not None:
            _restore(run, state)
        batches = _batches(rows, (mean, rms), batch_size, (run.n_done, n_steps), generator)
        _train(run, batches, n_steps, settings, what, state)
    sae = fold_scaling(run.sae, mean, rms)
    n_dead = int((run.rows_since_fired >= run.dead_after_rows).sum())
    return sae, {
        "n_rows": n_rows, "n_steps": n_steps, "lr": settings.learning_rate(n_features), "input_rms": rms,
        "dead_after_rows": run.dead_after_rows, "n_dead_at_end": n_dead, "log": run.log,
        "elapsed_seconds": run.seconds,
    }  # fmt: skip


def _train(
    run: TrainingRun,
    batches: Iterator[Tensor],
    n_steps: int,
    settings: TrainingSettings,
    what: str,
    state: Unfinished | None,
) -> None:
    """Take all the steps that are left, saving on the way."""
    peak, log_every = settings.learning_rate(run.sae.n_features), max(1, n_steps // N_LOGGED)
    started, clock = time.monotonic() - run.seconds, SaveClock()
    for batch in tqdm(batches, desc=what, initial=run.n_done, total=n_steps, unit="step", disable=None):
        step = run.n_done
        rate = peak * settings.rate_factor((step + 1) / (n_steps + 1))
        losses = _step(run, batch.to(run.rows_since_fired.device), rate, settings.aux_coefficient)
        run.n_done, run.seconds = step + 1, time.monotonic() - started
        if step % log_every == 0 or step == n_steps - 1:
            run.log.append({"step": step, **{name: float(value) for name, value in losses.items()}})
            _require_finite(run, losses, what)
        if state is not None and clock.due():
            _require_finite(run, losses, what)  # what is kept can be gone on with
            _keep(run, state)
            clock.saved()


def mean_and_rms(rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Mean (d_model,) float32 of the rows and root mean square of their centred elements, summed in float64.

    Raises:
        UserError: the rows do not vary.
    """
    mean = rows.mean(axis=0, dtype=np.float64).astype(np.float32)
    squares = 0.0
    for start in range(0, len(rows), RMS_CHUNK_ROWS):
        squares += float(np.square(rows[start : start + RMS_CHUNK_ROWS] - mean, dtype=np.float64).sum())
    rms = math.sqrt(squares / rows.size)
    if not (math.isfinite(rms) and rms > 0):
        raise UserError("The residual stream does not vary between the sampled rows; use more cells.")
    return mean, rms


def fold_scaling(sae: TopKSAE, mean: np.ndarray, rms: float) -> TopKSAE:
    """Turn an SAE of (residual - mean) / rms into the same SAE of the raw residual stream.

    ReLU and TopK commute with a positive factor, so the latents come out times `rms` and the decoder
    directions keep their unit norm: only the two biases change.
    """
    folded = TopKSAE(sae.d_model, sae.n_features, sae.k).to(sae.W_enc.weight.device)
    folded.load_state_dict(sae.state_dict())
    with torch.no_grad():
        folded.W_enc.bias.mul_(rms)
        folded.W_dec.bias.mul_(rms)
        folded.input_mean.copy_(torch.from_numpy(mean))
    return folded.eval().requires_grad_(False)


def _start(
    shape: tuple[int, int], settings: TrainingSettings, generator: torch.Generator, device: torch.device
) -> TrainingRun:
    """Random unit decoder directions, the encoder their transpose, both biases 0."""
    n_rows, d_model = shape
    sae = TopKSAE(d_model, settings.expansion * d_model, settings.k)
    with torch.no_grad():
        sae.W_dec.weight.copy_(torch.randn(sae.W_dec.weight.shape, generator=generator))
        _normalise_directions(sae)
        sae.W_enc.weight.copy_(sae.W_dec.weight.T)
        sae.W_enc.bias.zero_()
        sae.W_dec.bias.zero_()
    sae.to(device)
    fused = device.type in ("cpu", "cuda")
    return TrainingRun(
        sae=sae,
        optimizer=torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.9, 0.999), fused=fused),
        rows_since_fired=torch.zeros(sae.n_features, dtype=torch.int64, device=device),
        dead_after_rows=max(1, int(settings.dead_after * n_rows)),
        k_aux=max(1, d_model // 2),
    )


def _kept_tensors(run: TrainingRun) -> dict[str, Tensor]:
    """Weights, what Adam knows about each, and when features last fired: all that the next step depends on."""
    named = dict(run.sae.state_dict())
    for name, parameter in run.sae.named_parameters():
        of_parameter = run.optimizer.state.get(parameter) or {
            key: torch.zeros(()) if key == "step" else torch.zeros_like(parameter) for key in ADAM_STATE
        }
        named |= {f"{name}.{key}": of_parameter[key] for key in ADAM_STATE}
    return named | {"rows_since_fired": run.rows_since_fired}


def _kept_arrays(run: TrainingRun) -> dict[str, np.ndarray]:
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in _kept_tensors(run).items()}
    facts = {"log": json.dumps(run.log), "n_done": run.n_done, "seconds": run.seconds}
    return arrays | {name: np.array(value) for name, value in facts.items()}


def _keep(run: TrainingRun, state: Unfinished) -> None:
    state.write(TRAINING, _kept_arrays(run))


def _restore(run: TrainingRun, state: Unfinished) -> None:
    """Go on with what `_keep` wrote, if there is something."""
    kept = state.read(TRAINING, _kept_arrays(run))
    if kept is None:
        return
    tensors = {name: torch.from_numpy(kept[name]) for name in _kept_tensors(run)}
    run.sae.load_state_dict({name: tensors[name] for name in run.sae.state_dict()})
    moments = {
        number: {key: tensors[f"{name}.{key}"] for key in ADAM_STATE}
        for number, (name, _) in enumerate(run.sae.named_parameters())
    }
    run.optimizer.load_state_dict({"state": moments, "param_groups": run.optimizer.state_dict()["param_groups"]})
    run.rows_since_fired.copy_(tensors["rows_since_fired"])
    run.log, run.n_done, run.seconds = json.loads(str(kept["log"])), int(kept["n_done"]), float(kept["seconds"])


def _batches(
    rows: np.ndarray,
    scale: tuple[np.ndarray, float],
    batch_size: int,
    steps: tuple[int, int],
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """Shuffled full batches of scaled rows, (batch_size, d_model), on the CPU, from one step up to another.

    What an epoch leaves over under a full batch is left out of it.
    """
    source, mean = torch.from_numpy(rows), torch.from_numpy(scale[0])
    per_epoch = len(rows) // batch_size
    for epoch in range(steps[1] // per_epoch):
        order = torch.randperm(len(rows), generator=generator)  # drawn also where the whole epoch is done
        for number in range(max(steps[0] - epoch * per_epoch, 0), per_epoch):
            yield (source[order[number * batch_size : (number + 1) * batch_size]] - mean) / scale[1]


def _step(run: TrainingRun, x: Tensor, rate: float, aux_coefficient: float) -> dict[str, Tensor]:
    """One optimiser step on x (batch, d_model); returns the losses, on the device."""
    sae = run.sae
    pre = sae.pre_activations(x)  # (batch, n_features)
    values, indices = pre.topk(sae.k, dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    error = x - sae.decode(latents)
    fvu = error.square().sum() / x.square().sum()
    dead = run.rows_since_fired >= run.dead_after_rows
    auxiliary = _aux_loss(run, pre, error.detach(), dead)
    run.optimizer.zero_grad(set_to_none=True)
    (fvu + aux_coefficient * auxiliary).backward()
    _remove_parallel_gradient(sae)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.optimizer.step()
    _normalise_directions(sae)
    fired = (latents > 0).any(dim=0)
    run.rows_since_fired = torch.where(fired, 0, run.rows_since_fired + len(x))
    return {"fvu": fvu.detach(), "aux": auxiliary.detach(), "n_dead": dead.sum()}


def _aux_loss(run: TrainingRun, pre: Tensor, error: Tensor, dead: Tensor) -> Tensor:
    """Share of the error that the `k_aux` largest dead features leave unexplained; 0 where none is dead."""
    n_dead = int(dead.sum())
    if n_dead == 0:
        return error.new_zeros(())
    k_aux = min(run.k_aux, n_dead)
    values, indices = pre.masked_fill(~dead, -torch.inf).topk(k_aux, dim=-1)
    latents = torch.zeros_like(pre).scatter(-1, indices, values.relu())
    rebuilt = latents @ run.sae.decoder_directions  # (batch, d_model); the bias is no dead feature's
    return (error - rebuilt).square().sum() / error.square().sum().clamp_min(torch.finfo(error.dtype).tiny)


def _normalise_directions(sae: TopKSAE) -> None:
    with torch.no_grad():
        sae.W_dec.weight.div_(sae.W_dec.weight.norm(dim=0, keepdim=True).clamp_min(1e-12))


def _remove_parallel_gradient(sae: TopKSAE) -> None:
    """Take out of the decoder's gradient what only changes the length of a direction."""
    weight, gradient = sae.W_dec.weight, sae.W_dec.weight.grad
    if gradient is not None:
        with torch.no_grad():
            gradient.sub_((gradient * weight).sum(dim=0, keepdim=True) * weight)


def _require_finite(run: TrainingRun, losses: dict[str, Tensor], what: str) -> None:
    """Stop a training that computes no numbers any more; the weights are those after the step of the losses."""
    values = [*losses.values(), *(parameter.detach() for parameter in run.sae.parameters())]
    if not all(bool(torch.isfinite(value).all()) for value in values):
        raise UserError(
            f"{what}: training diverged, NaN or infinite values by step {run.n_done}; choose a smaller --lr."
        )


@contextmanager
def _denormals_flushed() -> Iterator[None]:
    """Flush denormals: Adam's second moments of silent features decay into them, and crawl."""
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
