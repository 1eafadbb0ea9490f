"""How exactly the engine multiplies: the modes by name. Standard library only.

Only the products of the blocks after the source layer are touched. Streams, norms, softmax, the run up to the source
layer and the SAEs stay in float32, so what a mode costs is the engine's alone; `benchmarks/precision.py` measures what
it does to edges.
"""

FP32, TF32, BF16, MIXED = "fp32", "tf32", "bf16", "mixed"
PRECISIONS = (FP32, TF32, BF16, MIXED)
