# make setup   create .venv with the pinned dependencies (repeating it is cheap)
# make demo    the whole pipeline on the embedded default, ending in a table of results
# make demo-real  the same on SmolLM2-135M, a real language model, with the lab's shop in plain English; it says how long it takes
# make test    every test that needs no GPU
# make test-slow  what takes minutes: two processes, the whole pipeline on the lab; a skipped test fails
# make test-with MARKS="sandbox or slurm"  tests that need more than Python (bubblewrap, SLURM, a browser, ...); a skipped
#              one fails. MARKS are pytest's: sandbox, slurm, browser, netns, alfworld, scienceworld, reasoning_gym,
#              verifiers, trackers, harness
# make setup-worlds  adds ALFWorld and ScienceWorld to the environment (g++, cmake, Java), for their tests
# make setup-reasoning-gym  adds Reasoning Gym (a C compiler, Python's headers), for its tests
# make setup-verifiers  adds verifiers to the environment, for its tests
# make setup-trackers  adds TensorBoard and Weights & Biases to the environment, for their tests
# make setup-harnesses  makes an environment with lm-eval and inspect-ai, $(VENV)/harnesses, for their tests and docs/harnesses.md
# make bench-lab  every stage on the lab with its controls, over several seeds; docs/results/lab.md
# make bench-real  the same on SmolLM2-135M, a real language model; docs/results/real.md. Days of CPU time, kept cell by cell:
#              REAL_ARGS="--only shop --seeds 0 --text FOLDER_OF_GSM8K" makes a part
# make bench-performance  every figure of docs/performance.md, about 20 minutes
# make bench-gpu  what a GPU does, in less than 8 minutes, with the interpreter PYTHON as it is: it needs torch, triton,
#              transformers and peft, and no `make setup`. GPU_ARGS="--out FOLDER", or "--device cpu --tiny --out FOLDER"
#              to rehearse it
# make bench-scale  every stage under every strategy on two CPU processes, killed and resumed; the tables of docs/scale.md
# make docs    the documentation site, in site/; a warning is an error
# make check   lint, format, types, import directions, spelling
#
# Variables: PYTHON (an interpreter >= 3.11), VENV (where the environment goes), TORCH_INDEX (another package index
# for torch, for example PyTorch's CPU or CUDA wheels), WORKERS (test processes of test, test-slow and test-with),
# PYTEST_ARGS, DEMO_ARGS, REAL_ARGS, GPU_ARGS.

PYTHON ?= python3
VENV ?= .venv
TORCH_INDEX ?=
PYTEST_ARGS ?=
WORKERS ?= 2
DEMO_ARGS ?=
REAL_ARGS ?=
GPU_ARGS ?= --out docs/results/gpu

# A file's tests run in one process, for what they share; long files begin first (tests/conftest.py).
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
STAMP := $(VENV)/.setup-done
TORCH := $(shell sed -n 's/^\(torch==.*\)/\1/p' constraints.txt)
export MLFLOW_DISABLE_TELEMETRY ?= true
export DO_NOT_TRACK ?= true

.PHONY: setup setup-worlds setup-reasoning-gym setup-verifiers setup-trackers setup-harnesses demo demo-real test test-slow test-with check docs test-gpu bench-lab bench-real bench-performance bench-gpu bench-scale format

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { \
	  echo "make setup: $(PYTHON) was not found; install Python 3.11 or newer, or name one: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "make setup: needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make setup PYTHON=python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "make setup: $(PYTHON) cannot create a virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $@

# Packages of extras, without installing this one again: tests may be running.
extras = $(BIN)/python -c 'import sys, tomllib; \
  known = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
  print(*(line for name in sys.argv[1:] for line in known[name]), sep="\n")' $(1) \
  | $(BIN)/python -m pip install --quiet -c constraints.txt -r /dev/stdin

setup-worlds: setup
	$(call extras,alfworld scienceworld)

setup-reasoning-gym: setup
	$(call extras,reasoning-gym)

setup-verifiers: setup
	$(call extras,verifiers)

setup-trackers: setup
	$(call extras,tensorboard wandb)

# All pins but those of fsspec and openai: inspect-ai wants an older and a newer one.
setup-harnesses: setup
	test -x $(VENV)/harnesses/bin/python || $(PYTHON) -m venv $(VENV)/harnesses
	sed '/^fsspec==/d; /^openai==/d' constraints.txt > $(VENV)/harnesses/constraints.txt
	$(VENV)/harnesses/bin/python -m pip install --quiet -c $(VENV)/harnesses/constraints.txt "lm-eval[api]" inspect-ai "openai==3.57.0"

demo: setup
	$(BIN)/memgen demo $(DEMO_ARGS)

demo-real: setup
	$(BIN)/memgen demo --backbone lab:smollm2 $(DEMO_ARGS)

# Test processes share the cores, and two threads of each would wait for one another.
test test-slow test-with: export OMP_NUM_THREADS ?= 1

test: setup
	$(BIN)/python -m pytest -m "not slow and not gpu and not slurm and not browser and not netns and not alfworld and not scienceworld and not reasoning_gym and not verifiers and not trackers and not harness and not sandbox" $(PARALLEL) $(PYTEST_ARGS)

test-slow: setup
	MEMGEN_NO_SKIPS=1 $(BIN)/python -m pytest -m "slow and not gpu and not slurm and not browser and not netns and not alfworld and not scienceworld and not reasoning_gym and not verifiers and not trackers and not harness and not sandbox" $(PARALLEL) $(PYTEST_ARGS)

test-with: setup
	@test -n "$(MARKS)" || { echo 'make test-with: name the tests: make test-with MARKS="sandbox or slurm"' >&2; exit 1; }
	MEMGEN_NO_SKIPS=1 $(BIN)/python -m pytest -m "($(MARKS)) and not gpu" $(PARALLEL) $(PYTEST_ARGS)

test-gpu: setup
	$(BIN)/python -m pytest -m gpu $(PYTEST_ARGS)

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

# Nothing is fetched to build the site, nor to view it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@! grep -rlE '(src|href)="(https?:)?//[^"]*\.(js|css|woff2?)' site --include=*.html || { \
	  echo "make docs: these pages fetch scripts, styles or fonts from elsewhere" >&2; exit 1; }

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-lab: setup
	$(BIN)/python -m benchmarks.lab

bench-real: setup
	$(BIN)/python -m benchmarks.real $(REAL_ARGS)

# All figures of docs/performance.md, and the document's tables from them. Let the machine do nothing else meanwhile.
PERFORMANCE := docs/results/performance
bench-performance: export OMP_NUM_THREADS = 1
bench-performance: setup
	mkdir -p $(PERFORMANCE)
	$(BIN)/memgen bench generation --model small --batch 1 8 32 --json $(PERFORMANCE)/generation_small.json
	$(BIN)/memgen bench generation --model medium --batch 8 --json $(PERFORMANCE)/generation_medium.json
	$(BIN)/python -m benchmarks.sweeps all --json $(PERFORMANCE)/sweeps.json
	$(BIN)/memgen bench training --model small --json $(PERFORMANCE)/training_small.json
	$(BIN)/memgen bench training --model medium --json $(PERFORMANCE)/training_medium.json
	$(BIN)/memgen bench memory --json $(PERFORMANCE)/memory.json
	$(BIN)/memgen bench kernels --json $(PERFORMANCE)/kernels.json
	$(BIN)/python -m benchmarks.performance_report

# On a machine that has what the model imports, and need not have the rest.
bench-gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu $(GPU_ARGS)

# Every stage under every strategy, and the tables of docs/scale.md. Two CPU processes; about 10 minutes.
bench-scale: setup
	$(BIN)/python -m benchmarks.scale_runs
	$(BIN)/python -m benchmarks.scale_report
