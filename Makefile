# Each target sets .venv up by itself where it is absent or out of date.
# Another Python: make demo PYTHON=/path/to/python3.12
# More options for pip, e.g. CPU wheels: make demo PIP_ARGS="--extra-index-url https://download.pytorch.org/whl/cpu"

# Asked for its version, as a pyenv shim may stand in the PATH without a Python behind it.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13; do \
	if $$p --version >/dev/null 2>&1; then echo $$p; break; fi; done)
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Where the demo runs, and its seed: make demo SEED=1 RUNS=runs/digits-1
RUNS ?= runs/digits
SEED ?= 0
RUN = $(BIN)/lit-distill
LIT := $(BIN)/lit-distill

.PHONY: help demo test test-full lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       train a teacher on digits, distill it to one step, measure, draw ($(RUNS))"
	@echo "make test       the tests of every day"
	@echo "make test-full  and the long bars"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove caches and build products (neither $(VENV) nor runs)"

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11, 3.12 or 3.13 found: name one, make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ]; then echo "$(PYTHON) -m venv $(VENV)"; "$(PYTHON)" -m venv $(VENV); fi
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet \
		$(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# Every stage stands in its own folder and is made once; a demo that was stopped goes on where it was.
TEACHER := $(RUNS)/teacher/pipeline/model_index.json
PAIRS := $(RUNS)/pairs/.complete
STUDENT := $(RUNS)/dmd/pipeline/model_index.json
METRICS := $(RUNS)/dmd/metrics.json

demo: $(METRICS)
	@$(BIN)/python -c "import json; from lit_distill.callbacks.report import format_table; \
		print(format_table(json.load(open('$(METRICS)')), 'digits'))"
	@echo
	@echo "Picture:  $(RUNS)/dmd/comparison.png"
	@echo "Samples:  $(LIT) sample $(RUNS)/dmd/pipeline --num-images 100 --out digits.png"
	@echo "Curves:   $(BIN)/tensorboard --logdir $(RUNS)"

$(TEACHER): | $(STAMP)
	$(LIT) fit --config configs/digits/teacher.yaml --ckpt_path last

$(PAIRS): | $(TEACHER)
	$(LIT) predict --config configs/digits/pairs.yaml
	@touch $@

$(STUDENT): | $(PAIRS)
	$(LIT) fit --config configs/digits/dmd.yaml --ckpt_path last

$(METRICS): | $(STUDENT)
	$(LIT) test --config configs/digits/dmd.yaml

# Each stage is skipped once it is done, and goes on where it stopped: pairs at the next missing
# shard, training at its last checkpoint. `make demo` a second time measures and draws only.
demo: $(RUNS)/dmd/pipeline/model_index.json
	$(RUN) test --config configs/digits/dmd.yaml --trainer.default_root_dir $(RUNS)/dmd \
		--model.init_args.teacher $(RUNS)/teacher/pipeline --data.init_args.folder $(RUNS)/pairs
	@echo
	@echo "Picture:      $(RUNS)/dmd/comparison.png"
	@echo "Numbers:      $(RUNS)/dmd/metrics.json"
	@echo "Student:      $(RUNS)/dmd/pipeline (opens in stock diffusers, see README.md)"
	@echo "TensorBoard:  $(BIN)/tensorboard --logdir $(RUNS)"

$(RUNS)/teacher/pipeline/model_index.json: | $(STAMP)
	$(RUN) fit --config configs/digits/teacher.yaml --seed_everything $(SEED) --ckpt_path last \
		--trainer.default_root_dir $(RUNS)/teacher

$(RUNS)/dmd/pipeline/model_index.json: $(RUNS)/teacher/pipeline/model_index.json
	$(RUN) predict --config configs/digits/pairs.yaml --trainer.default_root_dir $(RUNS)/pairs \
		--model.init_args.denoiser $(RUNS)/teacher/pipeline
	$(RUN) fit --config configs/digits/dmd.yaml --seed_everything $(SEED) --ckpt_path last \
		--trainer.default_root_dir $(RUNS)/dmd \
		--model.init_args.teacher $(RUNS)/teacher/pipeline --data.init_args.folder $(RUNS)/pairs

# One worker a core, one thread a worker: threads that compete are slower than no threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4

test: $(STAMP)
	$(PYTEST)

test-full: $(STAMP)
	$(PYTEST) -m "full or not full"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find lit_distill tests -type d -name __pycache__ -prune -exec rm -rf {} +
