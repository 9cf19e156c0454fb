# Every target makes .venv by itself where it is missing or out of date.
#   PYTHON=python3.12   the interpreter a new .venv is made with (>= 3.10)
#   TORCH=cpu|cuda      which PyTorch to install; default: cuda where nvidia-smi finds a GPU
#   WORKERS=N           test processes
#   ARGS="..."          more arguments for the command that the target runs
#   PY=python           use this environment as it is; no .venv is made

PYTHON ?= python3
ifndef TORCH
TORCH := $(shell nvidia-smi -L 2>/dev/null | grep -q '^GPU ' && echo cuda || echo cpu)
endif
ifeq ($(filter $(TORCH),cpu cuda),)
$(error TORCH must be cpu or cuda, got '$(TORCH)')
endif
ifndef PY
PY := .venv/bin/python
READY := .venv/.ready-$(TORCH)
endif

# test processes: one a core, but a GPU is not shared
WORKERS ?= $(if $(filter cuda,$(TORCH)),0,auto)

# where `make first`, `make gpu` and `make paper` leave their results, and how long a call of the first two takes
OUT ?= bench/results/h200
MINUTES ?= 8

.DEFAULT_GOAL := help
.PHONY: help demo train bench first gpu paper test test-long machine mutants fuzz soak matrix sanitize audit lint format inspect clean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1 /p' Makefile | while read -r target text; do printf '%-10s %s\n' "$$target" "$$text"; done
	@echo && sed -n '2,6s/^#   //p' Makefile

demo: $(READY) ## fuse a model, check it, time it; the report is written to out/
	$(PY) -m demo --out out $(ARGS)

train: $(READY) ## train a network: digits in half a minute; ARGS="--data DIR" for CIFAR
	$(PY) -m models.train $(ARGS)

bench: $(READY) ## the benchmark: every layer next to its peers; ARGS="layers --quick" for a first look
	$(PY) -m bench $(ARGS)

first: $(READY) ## on a GPU, its first minutes: compiled, exact, how fast; OUT=DIR MINUTES=8, ARGS=--dry without one
	$(PY) -m bench first --out $(OUT) --minutes $(MINUTES) $(ARGS)

gpu: $(READY) ## on a GPU: everything measured into OUT, in pieces of MINUTES: call it again until nothing is missing
	$(PY) -m bench gpu --out $(OUT) --minutes $(MINUTES) $(ARGS)
	$(PY) -m bench report $(OUT)

paper: $(READY) ## on a GPU: the paper's networks on DATA, into OUT, in pieces: call it again until it says no run is missing
	$(PY) -m models.reproduce --data $(DATA) --graphs --peers --minutes 9 --out $(OUT)/paper $(ARGS)

# without a GPU the kernels run in Triton's interpreter first, and then a part of the tests on compiled code
test: $(READY) ## the tests, without those marked long
	$(PY) -m pytest -q -n $(WORKERS) --dist loadgroup $(or $(ARGS),tests)
ifeq ($(TORCH)$(ARGS),cpu)
	$(PY) -m pytest -q -n $(WORKERS) --dist loadgroup --emulated --sample 24 tests
endif

test-long: $(READY) ## all tests
	$(PY) -m pytest -q -n $(WORKERS) --dist loadgroup --long $(or $(ARGS),tests)

machine: $(READY) ## the compiled kernels, executed on this CPU: all that a GPU's tests can show there; hours, ARGS=quick minutes
	$(PY) -m tests.machine $(ARGS)

mutants: $(READY) ## kernels and fuse_ broken on purpose, one fault at a time: do their tests see it? ARGS="--list"
	$(PY) -m tests.mutants $(ARGS)

fuzz: $(READY) ## 2,000 random calls of "torch", 300 of the kernels, a quarter as many layers, against fp64; 2,000 models, fused
	HYPOTHESIS_PROFILE=long $(PY) -m pytest -q tests/fuzz $(ARGS)

soak: $(READY) ## train, kill, resume, fuse, unfuse, save, load at random: ARGS="--minutes 60"
	$(PY) -m tests.soak $(ARGS)

matrix: $(READY) ## a part of the tests under other versions of torch, Triton, Python and NumPy; ONLY=NAME,NAME; gigabytes
	$(PY) -m bench.tools.matrix $(if $(ONLY),--only $(ONLY)) $(ARGS)

sanitize: $(READY) ## on a GPU: the kernels' tests under compute-sanitizer, logs into OUT
	scripts/sanitize.sh $(PY) $(OUT)/sanitizer $(ARGS)

audit: $(READY) ## known vulnerabilities of the installed packages; needs the network
	scripts/audit.sh $(PY) $(ARGS)

lint: $(READY) ## ruff: rules and formatting; mypy: types of rir_kernels
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(READY) ## ruff: fix what it can fix, and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

inspect: $(READY) ## the compile gate: every kernel compiled for a GPU that need not be here
	$(PY) -m rir_kernels.triton.inspect --arch sm_90 $(ARGS)

clean: ## remove build outputs, reports and caches; keeps .venv
	rm -rf out dist build .audit .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -path ./.venv -prune -o -type d -name __pycache__ -print | xargs rm -rf

.venv/.ready-%: pyproject.toml requirements/%.txt scripts/setup-venv.sh Makefile
	PYTHON="$(PYTHON)" scripts/setup-venv.sh $*
