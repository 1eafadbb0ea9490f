"""How much arithmetic a pass needs: linear maps and the two products of attention, a multiply-add counted as two.

Norms, softmax, the choice of the k latents and everything else are left out: at Geneformer's size they are less than a
hundredth. Numbers of rows may be arrays. Standard library only.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelShape:
    """Widths of a Geneformer: residual stream, feed-forward layer, vocabulary."""

    d_model: int
    d_feed_forward: int
    n_vocab: int

    @classmethod
    def of(cls, config: Any) -> "ModelShape":
        """Those of a `transformers` configuration."""
        return cls(config.hidden_size, config.intermediate_size, config.vocab_size)

    def row(self, n_keys: Any) -> Any:
        """Query, attention over `n_keys` keys, its output and the feed-forward layer, at one position of one block."""
        return 4 * self.d_model**2 + 4 * self.d_model * self.d_feed_forward + 4 * n_keys * self.d_model

    def key_value(self) -> int:
        """Key and value of one position in one block."""
        return 4 * self.d_model**2

    def encoding(self, n_features: int) -> int:
        """An SAE's pre-activations at one position."""
        return 2 * self.d_model * n_features

    def head(self) -> int:
        """The head's transform at one position, without the logits."""
        return 2 * self.d_model**2

    def logits(self) -> int:
        """The logits of one position."""
        return 2 * self.d_model * self.n_vocab


def block_flops(shape: ModelShape, n_pos: int, n_rows: Any = None) -> Any:
    """One encoder block on one stream.

    Args:
        shape: the model's.
        n_pos: tokens of the cell.
        n_rows: positions at which it is computed, but for keys and values; None means all.
    """
    return n_pos * shape.key_value() + (n_pos if n_rows is None else n_rows) * shape.row(n_pos)


def tail_flops(shape: ModelShape, n_blocks: int, n_pos: int, n_rows: Any) -> Any:
    """One ablated or steered pass through the blocks after the edited layer, the last one at `n_rows` positions only.

    Args:
        shape: the model's.
        n_blocks: blocks after the edited layer, the last target being the last.
        n_pos: tokens of the cell.
        n_rows: measured positions.
    """
    return (n_blocks - 1) * block_flops(shape, n_pos) + block_flops(shape, n_pos, n_rows)


def same_position_flops(shape: ModelShape, n_blocks: int, n_pos: int, n_rows: Any) -> Any:
    """One pass of `n_rows` positions alone, which attend to the clean keys and values and to one another's."""
    return n_blocks * n_rows * (shape.key_value() + shape.row(n_pos + n_rows))


def training_step_flops(shape: ModelShape, n_features: int, batch_size: int) -> int:
    """One training step of an SAE in which no feature is dead: encoder, decoder, and the gradients of both."""
    return 5 * batch_size * shape.encoding(n_features)
