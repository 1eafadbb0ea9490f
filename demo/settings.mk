# The demo as inputs of `make all`: what they are called, and the flags of every step. README.md, "Your own inputs",
# says what each line is for.

NAME = demo model
MODEL_FLAGS = --model $(INPUTS)/model --data-root $(INPUTS)
CELL_FLAGS = --data-path $(INPUTS)/cells.h5ad --cells all --obs-filter split=held_out --n-cells 20
GRAPH_FLAGS = --p-precision 0.05
SPECIFICITY_FLAGS = --n-features 50 --draws 2
PAIR_FLAGS = --features-per-layer 2

# monocytes to macrophages; cells that the neighbour graph does not reach from the root are left out
TRAJECTORY_CELL_FLAGS = --data-path $(INPUTS)/cells.h5ad --cell-type-column marker_group \
	--cell-types "monocyte;macrophage_like" --tissues all --disconnected drop
TRAJECTORY_FLAGS = --root-cell-type monocyte --root-markers S100A8,VCAN --follow-genes APOE --n-on 4 --n-off 3
EQUAL_DEPTH_FLAGS = --downsample-to 2000
# early and late cells choose the features in one half, and are steered in the other
CONTROLLED_STEERING_FLAGS = --root-cell-type monocyte --root-markers S100A8,VCAN --n-cells 240 \
	--markers $(INPUTS)/markers.json --probe-labels monocyte macrophage_like --n-on 4 --n-off 4 --n-steered 20 --draws 2
