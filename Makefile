# make demo   sets up the environment and runs the three experiments on the demo inputs, into results/demo/
# make test   sets up the environment and runs the tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A machine without a GPU is served by the much smaller CPU build: see README.md, "Install".
TORCH ?= torch==2.13.0
OUT ?= results/demo

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
DEMO_INPUTS = --model demo/model --data-root demo --data-path demo/cells.h5ad
DEMO_CELLS = --cells all --obs-filter split=held_out --n-cells 20
# monocytes to macrophages; cells that the neighbour graph does not reach from the root are left out
DEMO_TRAJECTORY = --cell-type-column marker_group --cell-types "monocyte;macrophage_like" --tissues all --disconnected drop
DEMO_ANALYSIS = $(DEMO_TRAJECTORY) --root-cell-type monocyte --root-markers S100A8,VCAN --follow-genes APOE --n-on 4 --n-off 3
RUN = $(VENV)/bin/python src

.PHONY: help demo test test-lowest lint demo-inputs clean

help:
	@echo "make demo         run the three experiments on the demo inputs, results and figures in $(OUT)/"
	@echo "make test         run the tests"
	@echo "make test-lowest  run the tests with the oldest supported versions (transformers 4.57)"
	@echo "make lint         check style"
	@echo "make demo-inputs  rebuild everything in demo/ from public packages"
	@echo "make clean        remove the environments and $(OUT)/"

$(VENV)/ready: requirements.txt
	@echo "Setting up $(VENV) with $(TORCH) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -r requirements.txt $(CONSTRAINTS)
	@touch $@

$(VENV)/ready-for-tests: $(VENV)/ready tests/requirements.txt tests/lowest.txt
	$(PIP) -r tests/requirements.txt $(CONSTRAINTS)
	@touch $@

demo: $(VENV)/ready
	@echo "1. Every feature of layer 5, one at a time"
	$(RUN)/exhaustive_feature_tracing.py $(DEMO_INPUTS) $(DEMO_CELLS) --out-dir $(OUT)/exhaustive_tracing
	$(RUN)/make_figures.py --out-dir $(OUT)/exhaustive_tracing
	$(RUN)/analyse_graph.py --trace-dir $(OUT)/exhaustive_tracing --p-precision 0.05
	@echo "2. Annotated features of three layers, then pairs of them, then triplets"
	$(RUN)/selective_feature_tracing.py $(DEMO_INPUTS) $(DEMO_CELLS) --out-dir $(OUT)/selective_tracing
	$(RUN)/higher_order_ablation.py --order 2 --selective-dir $(OUT)/selective_tracing --features-per-layer 2 \
		$(DEMO_INPUTS) $(DEMO_CELLS) --out-dir $(OUT)/pairwise_ablation
	$(RUN)/higher_order_ablation.py --pair-dir $(OUT)/pairwise_ablation \
		$(DEMO_INPUTS) $(DEMO_CELLS) --out-dir $(OUT)/higher_order_ablation
	$(RUN)/make_figures.py --out-dir $(OUT)/higher_order_ablation
	@echo "3. A trajectory, once more at equal depth, and steering along it"
	$(RUN)/trajectory_analysis.py $(DEMO_INPUTS) $(DEMO_ANALYSIS) --out-dir $(OUT)/trajectory
	$(RUN)/trajectory_analysis.py $(DEMO_INPUTS) $(DEMO_ANALYSIS) --downsample-to 2000 \
		--out-dir $(OUT)/trajectory_equal_depth
	$(RUN)/trajectory_steering.py $(DEMO_INPUTS) $(DEMO_TRAJECTORY) --traj-dir $(OUT)/trajectory \
		--panel $(OUT)/trajectory/switch_features.json --out-dir $(OUT)/trajectory_steering
	$(RUN)/make_figures.py --out-dir $(OUT)/trajectory_steering
	@echo "Look at one feature: $(RUN)/look_up_feature.py 114 --out-dir $(OUT)/exhaustive_tracing"

test: $(VENV)/ready-for-tests
	$(VENV)/bin/python -m pytest
	@echo "Tests passed in $(VENV); temporary files went to the system's temporary folder."

test-lowest:
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS="-c tests/lowest.txt"

lint: $(VENV)/ready-for-tests
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

demo-inputs: $(VENV)/ready
	$(VENV)/bin/python demo/build_demo.py

clean:
	rm -rf .venv .venv-lowest $(OUT)
