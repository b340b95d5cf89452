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
LIT := $(BIN)/lit-distill
# The demo trains and samples in the precision that is faster on this machine, measured once.
PRECISION := $(RUNS)/precision
IN_PRECISION = --trainer.precision $$(cat $(PRECISION))
ALL_IN_PRECISION = --overrides "{trainer.precision: $$(cat $(PRECISION))}" \
	--evaluation.precision $$(cat $(PRECISION))

.PHONY: help demo demo-text compare methods test test-ci test-full lint clean
.DELETE_ON_ERROR:

help:
	@echo "make demo       train a teacher on digits, distill it to one step, measure, draw ($(RUNS))"
	@echo "make demo-text  a small text-to-image model of digits, distilled by LCM-LoRA ($(TEXT))"
	@echo "make compare    all methods at 45 s of training each, one table and page (runs/compare/digits)"
	@echo "make methods    all methods at full length on the demo's teacher, the same report ($(RUNS))"
	@echo "make test       the tests of every day"
	@echo "make test-ci    what CI runs beside them: notebooks, second settings of each method"
	@echo "make test-full  all of these, and the long bars"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove caches and build products (neither $(VENV) nor runs)"

$(STAMP): pyproject.toml constraints.txt
	@if [ -z "$(PYTHON)" ]; then \
		echo "make: no Python 3.11, 3.12 or 3.13 found: name one, make PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@if [ ! -x $(BIN)/python ]; then echo "$(PYTHON) -m venv $(VENV)"; "$(PYTHON)" -m venv $(VENV); fi
	$(BIN)/python -m pip install --disable-pip-version-check --progress-bar off --quiet \
		$(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@

# Each stage is skipped once it is done, and goes on where it stopped: pairs at the next missing
# shard, training at its last checkpoint.
TEACHER := $(RUNS)/teacher/pipeline
STUDENT := $(RUNS)/dmd/pipeline
METRICS := $(RUNS)/dmd/metrics.json
DISTILL = --config configs/digits/dmd.yaml --trainer.default_root_dir $(RUNS)/dmd \
	--model.init_args.teacher $(TEACHER) --data.init_args.folder $(RUNS)/pairs $(IN_PRECISION)

demo: $(METRICS)
	@$(BIN)/python -c "import json; from lit_distill.callbacks.report import format_table; \
		print(format_table(json.load(open('$(METRICS)')), 'digits'))"
	@echo
	@echo "Picture:      $(RUNS)/dmd/comparison.png"
	@echo "Numbers:      $(METRICS)"
	@echo "Student:      $(STUDENT) (opens in stock diffusers, see README.md)"
	@echo "More images:  $(LIT) sample $(STUDENT) --num-images 100 --out digits.png"
	@echo "TensorBoard:  $(BIN)/tensorboard --logdir $(RUNS)"

# All methods, 45 seconds of training each; more options: make compare ARGS="--only cd dmd"
ARGS ?=
compare: $(PRECISION)
	$(LIT) compare configs/compare/digits.yaml --seed $(SEED) $(ALL_IN_PRECISION) $(ARGS)

# Text to image: a small Stable Diffusion of digits, and its few-step student.
TEXT ?= runs/captions
TEXT_FIT = $(LIT) fit --config configs/captions/$(1).yaml --seed_everything $(SEED) --ckpt_path last \
	--trainer.default_root_dir $(TEXT)/$(1)
TEXT_STUDENT = --model.init_args.teacher $(TEXT)/teacher/pipeline --data.init_args.cache $(TEXT)/latents
TEXT_METRICS := $(TEXT)/lcm_lora/metrics.json

demo-text: $(TEXT_METRICS)
	@$(BIN)/python -c "import json; from lit_distill.callbacks.report import format_table; \
		print(format_table(json.load(open('$(TEXT_METRICS)')), 'digits'))"
	@echo
	@echo "Picture:      $(TEXT)/lcm_lora/comparison.png"
	@echo "Numbers:      $(TEXT_METRICS)"
	@echo "Student:      $(TEXT)/lcm_lora/pipeline (StableDiffusionPipeline), adapter/ (load_lora_weights)"
	@echo "More images:  $(LIT) sample $(TEXT)/lcm_lora/pipeline --prompts \"a handwritten seven\" --out seven.png"

$(TEXT)/autoencoder/pipeline/model_index.json: | $(STAMP)
	$(call TEXT_FIT,autoencoder)

$(TEXT)/teacher/pipeline/model_index.json: | $(TEXT)/autoencoder/pipeline/model_index.json
	$(call TEXT_FIT,teacher) --model.init_args.denoiser $(TEXT)/autoencoder/pipeline \
		--data.init_args.cache $(TEXT)/latents

$(TEXT)/%/pipeline/model_index.json: | $(TEXT)/teacher/pipeline/model_index.json
	$(call TEXT_FIT,$*) $(TEXT_STUDENT)

.PRECIOUS: $(TEXT)/%/pipeline/model_index.json
$(TEXT)/%/metrics.json: | $(TEXT)/%/pipeline/model_index.json
	$(LIT) test --config configs/captions/$*.yaml --trainer.default_root_dir $(TEXT)/$* $(TEXT_STUDENT)

# The same at full length, on the demo's teacher and pairs, with further variants.
methods: $(STUDENT)/model_index.json
	$(LIT) compare configs/compare/digits.yaml --config configs/compare/digits_full.yaml \
		--folder $(RUNS) --seed $(SEED) $(ALL_IN_PRECISION) $(ARGS)

$(PRECISION): | $(STAMP)
	@mkdir -p $(RUNS)
	@$(BIN)/python benchmarks/precision.py > $@

$(TEACHER)/model_index.json: | $(PRECISION)
	$(LIT) fit --config configs/digits/teacher.yaml --seed_everything $(SEED) --ckpt_path last \
		--trainer.default_root_dir $(RUNS)/teacher $(IN_PRECISION)

$(STUDENT)/model_index.json: | $(TEACHER)/model_index.json
	$(LIT) predict --config configs/digits/pairs.yaml --trainer.default_root_dir $(RUNS)/pairs \
		--model.init_args.denoiser $(TEACHER) $(IN_PRECISION)
	$(LIT) fit $(DISTILL) --seed_everything $(SEED) --ckpt_path last

$(METRICS): | $(STUDENT)/model_index.json
	$(LIT) test $(DISTILL)

# One worker a core, one thread a worker: threads that compete are slower than no threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

test: $(STAMP)
	$(PYTEST)

test-ci: $(STAMP)
	$(PYTEST) -m ci

test-full: $(STAMP)
	$(PYTEST) -m ""

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find lit_distill tests -type d -name __pycache__ -prune -exec rm -rf {} +
