# make demo   sets up the environment, runs the three experiments on the demo inputs, into results/demo/, and says in
#             six lines what follows
# make all    from a folder of inputs to results, figures, claims and the paper; see README.md, "Your own inputs"
# make test   sets up the environment and runs the tests

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
# A machine without a GPU is served by the much smaller CPU build: see README.md, "Install".
TORCH ?= torch==2.13.0
# a folder with model, SAEs, cells and a settings.mk
INPUTS ?= demo
# where summaries, tables and the claims go
OUT ?= results
# where the experiments work: what they resume from, too large to keep
RUNS ?= $(OUT)/$(notdir $(abspath $(INPUTS)))
# where figures, the numbers of the text and the PDF go
PAPER ?= $(if $(filter results,$(OUT)),paper,$(OUT)/paper)
# the table of claims in README.md is of the results that are kept here
README = $(if $(filter results,$(OUT)),--readme README.md)

PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check
RUN = $(VENV)/bin/python src
-include $(INPUTS)/settings.mk
TRACE_INPUTS = $(MODEL_FLAGS) $(CELL_FLAGS)
TRAJECTORY_INPUTS = $(MODEL_FLAGS) $(TRAJECTORY_CELL_FLAGS)
DRAWN = exhaustive_tracing specificity higher_order_ablation trajectory_steering controlled_steering

.PHONY: help demo all experiments pictures results claims figures numbers paper pdf check test test-lowest lint demo-inputs clean

help:
	@echo "make demo         run the experiments on the demo inputs, into results/demo/, and say what follows"
	@echo "make all INPUTS=FOLDER OUT=FOLDER"
	@echo "                  run the experiments on these inputs, then make results, figures, claims and the paper"
	@echo "make claims       judge the study's claims again from the results in $(OUT)/"
	@echo "make paper        make figures, numbers and the PDF again from the results in $(OUT)/"
	@echo "make check        compare figures, numbers and claims with the results that they are made from"
	@echo "make test         run the tests"
	@echo "make test-lowest  run the tests with the oldest supported versions (transformers 4.57)"
	@echo "make lint         check style"
	@echo "make demo-inputs  rebuild everything in demo/ from public packages"
	@echo "make clean        remove the environments and $(RUNS)/"

$(VENV)/ready: requirements.txt
	@echo "Setting up $(VENV) with $(TORCH) (a few minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$(TORCH)"
	$(PIP) -r requirements.txt $(CONSTRAINTS)
	@touch $@

$(VENV)/ready-for-tests: $(VENV)/ready tests/requirements.txt tests/lowest.txt
	$(PIP) -r tests/requirements.txt $(CONSTRAINTS)
	@touch $@

demo: override INPUTS = demo
demo:
	$(MAKE) experiments pictures INPUTS=demo
	@echo "Look at one feature: $(RUN)/look_up_feature.py 114 --out-dir $(RUNS)/exhaustive_tracing"
	@$(MAKE) --no-print-directory results INPUTS=demo RUNS=$(RUNS) OUT=$(RUNS)/kept

all:
	$(MAKE) experiments
	$(MAKE) results
	$(MAKE) paper

# Every script goes on where it was stopped, and passes over what is there.
experiments: $(VENV)/ready
	@test -f $(INPUTS)/settings.mk || { echo "error: $(INPUTS)/settings.mk: no such file; see README.md, \"Your own inputs\"." >&2; exit 2; }
	@echo "1. Every feature of a layer, one at a time"
	$(RUN)/exhaustive_feature_tracing.py $(TRACE_INPUTS) $(TRACE_FLAGS) --out-dir $(RUNS)/exhaustive_tracing
	$(RUN)/analyse_graph.py --trace-dir $(RUNS)/exhaustive_tracing $(GRAPH_FLAGS)
	$(RUN)/specificity_controls.py --trace-dir $(RUNS)/exhaustive_tracing $(SPECIFICITY_FLAGS) \
		$(TRACE_INPUTS) --out-dir $(RUNS)/specificity
	@echo "2. Annotated features of several layers, then pairs of them, then triplets"
	$(RUN)/selective_feature_tracing.py $(TRACE_INPUTS) $(SELECTIVE_FLAGS) --out-dir $(RUNS)/selective_tracing
	$(RUN)/higher_order_ablation.py --order 2 --selective-dir $(RUNS)/selective_tracing $(PAIR_FLAGS) \
		$(TRACE_INPUTS) --out-dir $(RUNS)/pairwise_ablation
	$(RUN)/higher_order_ablation.py --pair-dir $(RUNS)/pairwise_ablation $(TRIPLET_FLAGS) \
		$(TRACE_INPUTS) --out-dir $(RUNS)/higher_order_ablation
	@echo "3. A trajectory, once more at equal depth, and steering along it"
	$(RUN)/trajectory_analysis.py $(TRAJECTORY_INPUTS) $(TRAJECTORY_FLAGS) --out-dir $(RUNS)/trajectory
	$(if $(EQUAL_DEPTH_FLAGS),$(RUN)/trajectory_analysis.py $(TRAJECTORY_INPUTS) $(TRAJECTORY_FLAGS) \
		$(EQUAL_DEPTH_FLAGS) --out-dir $(RUNS)/trajectory_equal_depth)
	$(RUN)/trajectory_steering.py $(TRAJECTORY_INPUTS) --traj-dir $(RUNS)/trajectory \
		--panel $(RUNS)/trajectory/switch_features.json $(STEERING_FLAGS) --out-dir $(RUNS)/trajectory_steering
	$(RUN)/controlled_steering.py $(TRAJECTORY_INPUTS) $(CONTROLLED_STEERING_FLAGS) --out-dir $(RUNS)/controlled_steering

pictures: $(VENV)/ready
	for folder in $(DRAWN); do $(RUN)/make_figures.py --out-dir $(RUNS)/$$folder || exit; done

# What is kept of the runs, and the claims that they decide.
results: $(VENV)/ready
	$(RUN)/collect_results.py --runs $(RUNS) --name "$(NAME)" --out-dir $(OUT)
	$(MAKE) claims

claims: $(VENV)/ready
	$(RUN)/check_claims.py --results $(OUT) $(README)

figures: $(VENV)/ready
	$(RUN)/make_figures.py --results $(OUT) --out-dir $(PAPER)/figures

numbers: $(VENV)/ready
	$(RUN)/make_paper_numbers.py --results $(OUT) --out-dir $(PAPER)

paper: figures numbers
	$(MAKE) pdf

TEX_PACKAGES = latexmk texlive-latex-recommended texlive-latex-extra texlive-fonts-recommended
pdf:
	@command -v latexmk > /dev/null || { echo "error: latexmk: not found; the PDF needs Debian's packages" \
		"$(TEX_PACKAGES); all else is made." >&2; exit 2; }
	cd paper && TEXINPUTS="$(abspath $(PAPER)):" FORCE_SOURCE_DATE=1 latexmk -pdf -silent -halt-on-error \
		-interaction=nonstopmode -outdir="$(abspath $(PAPER))/build" manuscript.tex > /dev/null
	@! grep -E "(Reference|Citation).*undefined|multiply defined" $(PAPER)/build/manuscript.log
	cp $(PAPER)/build/manuscript.pdf $(PAPER)/manuscript.pdf
	@echo "Paper: $(PAPER)/manuscript.pdf"

check: $(VENV)/ready
	$(RUN)/check_paper.py --results $(OUT) --paper $(PAPER) $(README)

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
	rm -rf .venv .venv-lowest $(RUNS)
