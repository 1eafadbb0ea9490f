# make demo   sets up the environment and traces the demo inputs into results/demo/
# make test   sets up the environment and runs the tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A machine without a GPU is served by the much smaller CPU build: see README.md, "Install".
TORCH ?= torch==2.13.0
OUT ?= results/demo

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
DEMO_INPUTS = --model demo/model --data-root demo --data-path demo/cells.h5ad
DEMO_CELLS = --cells all --obs-filter split=held_out --n-cells 20

.PHONY: help demo test test-lowest lint demo-inputs clean

help:
	@echo "make demo         trace the demo inputs, results and figure in $(OUT)/"
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
	$(VENV)/bin/python src/exhaustive_feature_tracing.py $(DEMO_INPUTS) $(DEMO_CELLS) --out-dir $(OUT)
	$(VENV)/bin/python src/make_figures.py --out-dir $(OUT)
	@echo "Look at one feature: $(VENV)/bin/python src/look_up_feature.py 114 --out-dir $(OUT)"

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
