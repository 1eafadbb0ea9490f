"""Library shared by the experiments: cells in, edited residual streams through, effects and edges out."""
