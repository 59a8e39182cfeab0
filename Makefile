# Every target sets up what it needs in .venv from a fresh clone, given python3 with venv and make (and, for speed, a C++
# compiler). PYTHON=python3.12 picks another interpreter, VENV=dir another place.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/demo
# Test processes: one a core, at most four, each with a gigabyte or two.
JOBS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); [ $$n -gt 4 ] && echo 4 || echo $$n)
# A machine without a C++ compiler tests the reference path; with one, a missing extension is a failure.
NATIVE := $(if $(shell command -v c++ || command -v g++ || command -v clang++),require,auto)
SOURCES := setup.py pyproject.toml CMakeLists.txt constraints.txt $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)

.PHONY: help demo test drills recipes-smoke lint bench aot sanitize fuzz gpu-check clean
help:
	@echo "make demo               progressive training on encoded video, report in $(OUT)/report.html"
	@echo "make demo CLIPS=DIR     the same on a folder of labelled videos, in runs/clips"
	@echo "make test               the test suite"
	@echo "make drills             kills, byte flips, lost ranks and machines, full disks, signals, in full numbers"
	@echo "make recipes-smoke      every recipe, shrunk, from data to weights"
	@echo "make lint               ruff and mypy"
	@echo "make bench              microbenchmarks beside the honest alternatives; VMAE2_BENCH=all: at every model size"
	@echo "make aot                compile every GPU kernel without a GPU, print registers, shared memory and spills"
	@echo "make sanitize           native kernels under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzz               500 mutated video files: none may crash, hang or be decoded wrong"
	@echo "make gpu-check          everything that needs a GPU, with the running interpreter; needs no network"
	@echo "make clean              remove builds and caches, keep runs"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python $(SOURCES)
	@echo "installing torch and tools into $(VENV): some hundred MB, a few minutes"
	$(BIN)/pip install -q -c constraints.txt -e ".[report]"
	@touch $@

$(VENV)/.dev: $(BIN)/python $(SOURCES)
	@echo "installing torch and tools into $(VENV): some hundred MB, a few minutes"
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo
ifdef CLIPS
	$(BIN)/vmae2 launch demo:progressive --clips "$(CLIPS)" --out $(if $(filter runs/demo,$(OUT)),runs/clips,$(OUT)) $(if $(SHORT),--short) --json
else
	$(BIN)/vmae2 launch demo:progressive --out $(OUT) $(if $(SHORT),--short) --json
endif

test: $(VENV)/.dev
	OMP_NUM_THREADS=1 VMAE2_NATIVE=$(NATIVE) $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile $(ARGS)

drills: $(VENV)/.dev
	OMP_NUM_THREADS=1 VMAE2_DRILLS=full VMAE2_NATIVE=$(NATIVE) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/drills --durations=0 -rP $(ARGS)

recipes-smoke: $(VENV)/.dev
	OMP_NUM_THREADS=1 VMAE2_RECIPES=all VMAE2_NATIVE=$(NATIVE) $(BIN)/python -m pytest -q -n $(JOBS) --dist worksteal tests/recipes

# C++ and the CUDA kernels, these emulated on the CPU (tests/cuda_emulator).
sanitize: $(VENV)/.dev
	$(BIN)/python -m tests.cuda_emulator.sanitize

fuzz: $(VENV)/.dev
	VMAE2_FUZZ=500 $(BIN)/python -m pytest -q tests/data/test_fuzz.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/mypy vmae2_fast recipes

aot: $(VENV)/.dev
	VMAE2_AOT=all $(BIN)/python -m pytest -q -s tests/test_cuda_compiles.py tests/test_aot.py

clean:
	rm -rf build dist *.egg-info vmae2_fast/_C*.so .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

# ARGS: for bench, arguments of pytest (-k gather); for gpu-check, of the GPU entry point (--only, --budget-s, --dry-run, --force).
ARGS ?=
RESULTS := benchmarks/results-local

bench: $(VENV)/.dev
	@mkdir -p $(RESULTS)
	$(BIN)/python -m pytest -q benchmarks/test_ops.py --benchmark-json=$(RESULTS)/ops.json --benchmark-columns=median,iqr,rounds $(ARGS)
	$(BIN)/python -m vmae2_fast.benchmarks.report $(RESULTS)/ops.json
	$(BIN)/python -m pytest -q benchmarks/test_manifest.py --benchmark-json=$(RESULTS)/manifest.json --benchmark-columns=median,iqr,rounds
	$(BIN)/python -m pytest -q benchmarks/test_data.py --benchmark-json=$(RESULTS)/data.json --benchmark-columns=median,iqr,rounds

# The running interpreter with its own torch; nothing is downloaded. In place, so that the tests see the built extension.
gpu-check:
	$(if $(findstring --dry-run,$(ARGS)),,VMAE2_CUDA=require) $(PYTHON) -m pip install -q --no-build-isolation --no-deps --no-index -e .
	VMAE2_NATIVE=require $(PYTHON) -m vmae2_fast.benchmarks.gpu $(ARGS)
