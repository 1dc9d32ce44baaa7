# Everything in one command each, from a clean clone: a virtual environment, the package built into it, the task.
#
#   make pretrain      train a dual encoder on the embedded pictures and names (about three minutes on two cores)
#   make test          the tests
#   make aot           compile every GPU kernel for every architecture; needs no GPU
#   make lint format   bench   wheel   clean
#
# PYTHON=python3.12 chooses an interpreter, VENV=path an environment, ARGS="..." is passed on. TORCH_SPEC is installed
# before the package, which itself asks for no torch release in particular.

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0 triton==3.7.1
ARGS ?=

BIN := $(VENV)/bin
PACKAGE := pyproject.toml CMakeLists.txt $(shell find cmake csrc mmkernels -type f -not -name '*.pyc' -not -name '*.so')
CSRC := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: pretrain test aot lint format bench wheel clean

pretrain: $(VENV)/installed-pretrain
	$(BIN)/mmkernels pretrain --recipe clip $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 -m "not aot" $(ARGS)

aot: $(VENV)/installed-dev
	$(BIN)/pytest -n 2 -m aot $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CSRC)

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CSRC)

bench: $(VENV)/installed-dev
	for bench in benches/bench_*.py; do $(BIN)/python $$bench $(ARGS) || exit 1; done

wheel: $(VENV)/installed-dev
	$(BIN)/pip wheel . --no-deps -w dist

clean:
	rm -rf $(VENV) build dist

$(VENV)/torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(TORCH_SPEC)
	touch $@

# The package itself is installed anew whenever one of its files changes.
$(VENV)/installed-%: $(VENV)/torch $(PACKAGE)
	$(BIN)/pip install --quiet ".[$*]"
	touch $@
