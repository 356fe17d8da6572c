# Two commands do everything on a fresh machine: `make demo` and `make test`. Both set up .venv themselves, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
LOWEST := .venv-lowest
# a worker that dies fails its test and ends the run: pytest-xdist hangs after it has started another one
TESTS  := -m pytest -n 2 --dist loadfile --max-worker-restart 0

# Threads that spin beside any other process cost 10 to 40 times: one each.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
export PYTHONUNBUFFERED = 1

# no installation: machines with a GPU often have their own torch, and no network
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

.PHONY: help install demo test test-slow test-lowest test-matrix lint format docs bench results gpu clean

help:
	@echo "make demo         train SGD, SAM and ASAM on real digits, measure all, write runs/demo/report.html (5 minutes)"
	@echo "make test         lint, types and tests (under 15 minutes on 2 cores)"
	@echo "make test-slow    the tests that take minutes or need data that is not embedded"
	@echo "make test-lowest  the tests with the lowest versions that pyproject.toml allows, in .venv-lowest"
	@echo "make test-matrix  the tests as other processors, threads, orders and loads have them (hours; goes on where it was)"
	@echo "make docs         the documentation as a site, build/site/index.html; runs the examples in docstrings"
	@echo "make bench        cost of a SAM step against davda54/sam's algorithm, and on the host (CPU)"
	@echo "make results      what of the published results can be run again, at what cost, and what is done"
	@echo "make gpu          tests and costs on a CUDA device (under 8 minutes; needs torch, Triton, timm and pytest, no network)"
	@echo "make install      .venv with everything from pyproject.toml"

install: $(STAMP)

$(STAMP): pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a few minutes the first time: torch is large) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $(STAMP)

demo: install
	$(BIN)/python -m benchmarks.demo --out runs/demo

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python $(TESTS)

test-slow: install
	$(BIN)/python $(TESTS) -m slow

test-lowest:
	@test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	@$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c tests/lowest.txt -e ".[dev]"
	$(LOWEST)/bin/python $(TESTS)

# ARGS="--python 2.8=PATH/bin/python --only order" and more: python tests/matrix.py --help
test-matrix: install
	$(BIN)/python tests/matrix.py $(ARGS)

docs: install
	$(BIN)/python -m sphinx -q -W --keep-going -b html -c docs . build/site
	$(BIN)/python -m sphinx -q -W --keep-going -b doctest -c docs . build/doctest
	@echo "build/site/index.html"

bench: install
	$(BIN)/python -m benchmarks.speed.step
	$(BIN)/python -m benchmarks.speed.host --json runs/speed/host_cpu.json

results: install
	$(BIN)/python -m benchmarks.catalogue

gpu:
	@$(GPU_PYTHON) -m benchmarks.gpu

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(LOWEST) build runs .mypy_cache .pytest_cache .ruff_cache
