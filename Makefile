# Short names for commands that the README also shows in full.
# Needs git, make, pip and Python 3.11 or newer; everything else goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PINS := pyproject.toml constraints.txt
NOT_IN_TEST := not gpu and not slow and not soak
TEST_ENV := HF_HUB_OFFLINE=1
WORKERS ?= 2
# A worker per core, one thread each; tests of a file share its fixtures.
IN_PARALLEL := --numprocesses $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test quick check soak mutants official-check formats-check drafter \
  serve-check llama-check engines \
  bench-train bench-growth bench-plan bench-ingest bench-privacy bench-store bench-collect \
  bench-online bench-decode bench-kernels kernel-tables bench-drift bench-tune clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.stamp-demo  ## set up, then logs -> drafter -> report on a CPU in half an hour
	$(BIN)/dflash-train run recipe=smollm2

test: $(VENV)/.stamp-dev  ## set up, then every test that needs no GPU and no long run
	$(TEST_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(NOT_IN_TEST)" $(IN_PARALLEL)

quick: $(VENV)/.stamp-dev  ## the same without tests/not_in_quick.txt (what takes long), up to the first failure
	$(TEST_ENV) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "$(NOT_IN_TEST)" $(IN_PARALLEL) \
	  @tests/not_in_quick.txt -x -q

check: $(VENV)/.stamp-dev  ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright --pythonpath $(BIN)/python

engines: $(VENV)/.stamp-engines  ## DeepSpeed on one CPU process: the losses of the plain run, resumed runs
	$(TEST_ENV) $(BIN)/python -m pytest -m slow tests/test_train/test_deepspeed.py

soak: $(VENV)/.stamp-dev  ## kill real runs at random moments and compare their ends
	$(TEST_ENV) $(BIN)/python -m pytest -m soak

mutants: $(VENV)/.stamp-dev  ## break the code on purpose; which test notices? some: ONLY=mask
	$(BIN)/python tests/mutants/mutants.py $(if $(ONLY),--only "$(ONLY)")

official-check: $(VENV)/.stamp-dev  ## after demo: our decoder against the PyPI package dflash
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/official dflash==0.1.0
	PYTHONPATH=$(VENV)/official $(TEST_ENV) $(BIN)/python tests/end_to_end/official_package.py

formats-check: $(VENV)/.stamp-rivals  ## do others load what we export, and we theirs? CHECKPOINT=DIR TARGET=NAME
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/official dflash==0.1.0
	PYTHONPATH=$(VENV)/official:$(VENV)/rivals/speculators:$(VENV)/rivals/specforge $(TEST_ENV) \
	  $(BIN)/python tests/end_to_end/formats_check.py \
	  $(if $(CHECKPOINT),--checkpoint $(CHECKPOINT) --target "$(TARGET)")

drafter: $(VENV)/.stamp-demo  ## train the best SmolLM2 drafter into the cache: GSM8K=DIR
	$(BIN)/python benchmarks/gsm8k.py drafter $(if $(GSM8K),--gsm8k "$(GSM8K)") $(SETTINGS)

serve-check: $(VENV)/.stamp-dev  ## after drafter: both dialects in a real vLLM: GSM8K=DIR
	$(BIN)/dflash-train serve-check recipe=gsm8k dialects=zlab,speculators demand=true \
	  checkpoint="$$($(BIN)/python benchmarks/gsm8k.py drafter | tail -n 1)" \
	  prompts="$(GSM8K)/gsm8k_smollm2/test-64.jsonl" $(SETTINGS)

llama-check: $(VENV)/.stamp-dev  ## after drafter: llama.cpp's own converter; SETTINGS=--run runs it, too
	$(BIN)/python tests/end_to_end/llama_check.py $(SETTINGS)

bench-train: $(VENV)/.stamp-rivals  ## one optimiser step beside three rivals, on an idle machine
	$(BIN)/python -m benchmarks.bench_train --rivals $(VENV)/rivals

bench-growth: $(VENV)/.stamp-dev  ## time and memory of a step against T, A and V
	$(BIN)/python -m benchmarks.bench_growth

bench-plan: $(VENV)/.stamp-dev  ## the plan of a training run beside what it takes, on an idle machine
	$(BIN)/python -m benchmarks.bench_plan

bench-ingest: $(VENV)/.stamp-dev  ## a million logged calls through ingest, on an idle machine
	$(BIN)/python -m benchmarks.bench_ingest

bench-privacy: $(VENV)/.stamp-dev  ## private values: found, mistaken, left behind; SEED=N repeats
	$(BIN)/python -m benchmarks.bench_privacy $(if $(SEED),--seed $(SEED))

bench-store: $(VENV)/.stamp-dev  ## after demo: the three number formats of features; RUN=DIR
	$(BIN)/python -m benchmarks.bench_store $(if $(RUN),--run "$(RUN)") $(SETTINGS)

bench-collect: $(VENV)/.stamp-dev  ## after demo: collect beside the bare target; RUN=DIR
	$(BIN)/python -m benchmarks.bench_collect $(if $(RUN),--run "$(RUN)") $(SETTINGS)

bench-online: $(VENV)/.stamp-dev  ## a target pass beside a drafter's step, and what prefetching hides
	$(BIN)/python -m benchmarks.bench_online

bench-decode: $(VENV)/.stamp-dev  ## after drafter: our decoder beside two others: GSM8K=DIR
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/official dflash==0.1.0
	PYTHONPATH=$(VENV)/official $(BIN)/python -m benchmarks.bench_decode \
	  --prompts "$(GSM8K)/gsm8k_smollm2/test-64.jsonl" $(SETTINGS)

bench-kernels: $(VENV)/.stamp-dev  ## on a GPU: the Triton kernels beside torch, FlexAttention and Liger
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/liger liger-kernel==0.8.5
	PYTHONPATH=$(VENV)/liger $(BIN)/python -m benchmarks.bench_kernels $(SETTINGS)

kernel-tables: $(VENV)/.stamp-dev  ## compile the kernels without a GPU; rooflines; into kernels/README.md
	$(BIN)/python -m benchmarks.kernel_tables --write

bench-drift: $(VENV)/.stamp-dev  ## falls of acceptance: noticed after how many requests, false alarms
	$(BIN)/python -m benchmarks.bench_drift $(SETTINGS)

bench-tune: $(VENV)/.stamp-dev  ## hours: what tuning gains and others lose: DATA=DIR, see docs/protocols
	$(BIN)/python -m benchmarks.bench_tune $(if $(DATA),--data "$(DATA)") $(SETTINGS)

clean:  ## remove .venv and what tools leave behind; keeps runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

# An unfinished set-up has no stamp and is repeated. `dev` holds everything that `demo` needs.
$(VENV)/.stamp-demo: $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable . --constraint constraints.txt
	touch $@

$(VENV)/.stamp-dev: $(PINS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --constraint constraints.txt
	touch $(VENV)/.stamp-demo $@

# Its CPU engine needs none of the operations that it could compile.
$(VENV)/.stamp-engines: $(VENV)/.stamp-dev
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --editable ".[deepspeed]" \
	  --constraint constraints.txt
	touch $@

# Without their dependencies: both pin other versions of torch and transformers.
$(VENV)/.stamp-rivals: $(VENV)/.stamp-dev
	rm -rf $(VENV)/rivals
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/rivals/speculators \
	  speculators==0.9.0 hs-connectors==0.9.0 openai==3.54.0 datasets==5.1.0 \
	  pydantic-settings==2.16.3 loguru==0.7.3
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/rivals/specforge specforge==0.2.0
	touch $@

# Debian's python3 without python3-venv cannot put pip into a new environment by itself.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'Python 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV) || { $(PYTHON) -m venv --clear --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $@ install --quiet pip; }
	@echo 'Installing into $(VENV); with PyPI'"'"'s CUDA build of torch this takes some gigabytes.'
