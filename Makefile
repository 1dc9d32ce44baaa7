# One command per task, from a clean clone: creates a virtual environment, builds the package into it, runs the task.
#
#   make pretrain      train a dual encoder on the embedded pictures and names (three to five minutes on two cores)
#   make test          the tests
#   make test-torch    the ops' tests only, for another torch: VENV=.venv-2.6 TORCH_SPEC=torch==2.6.0
#   make test-clients  the package inside open_clip, transformers, sentence-transformers, Lightning, Accelerate, TRL and
#                      Energon, the newest of each: VENV=.venv-clients TORCH_SPEC=torch; torchvision pins one torch
#   make aot           compile every Triton kernel for every architecture, inspect the built CUDA kernels; no GPU needed.
#                      ARGS=--pairs compiles only configurations in which every two options meet
#   make docs          the documentation as a site, in build/site: any warning fails, and so does what it would fetch
#   make lint format   bench   wheel   clean
#
# PYTHON=python3.12 chooses the interpreter, VENV=path the environment; ARGS="..." is passed on. TORCH_SPEC is installed
# before the package, which pins no torch release. WHEELS=path shares the built package with another environment of the
# same interpreter. WORKERS=3 is the number of processes that run tests, of one thread each.

PYTHON ?= python3
VENV ?= .venv
TORCH_SPEC ?= torch==2.13.0 triton==3.7.1
WHEELS ?= $(VENV)/wheels
WORKERS ?= 2
EXTRAS ?= test
ARGS ?=

BIN := $(VENV)/bin
PACKAGE := pyproject.toml CMakeLists.txt $(shell find cmake csrc mmkernels -type f -not -name '*.pyc' -not -name '*.so')
CSRC := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Tests that depend on torch itself: opcheck, torch.compile, torch.func, autograd, modules, gradient caching, backends.
# Of Triton, whose kernels torch only calls, those of second derivatives, for which every kernel runs.
TORCH_TESTS := $(wildcard tests/ops/*/test_contract.py tests/ops/*/test_second.py) tests/ops/test_tracing.py \
	tests/ops/test_flops.py tests/ops/contrastive/test_options.py tests/ops/contrastive/test_lse.py \
	tests/ops/contrastive/test_false_negatives.py tests/ops/attention/test_mask_metadata.py \
	tests/ops/attention/test_additive.py tests/ops/attention/test_calls.py tests/ops/attention/test_rope.py \
	tests/ops/attention/test_gate.py \
	tests/batch/test_batch.py tests/ops/packing/test_vision.py tests/nn tests/runtime \
	tests/gradcache/test_step.py tests/gradcache/test_autocast.py tests/gradcache/test_loss.py \
	tests/gradcache/test_backward.py tests/test_import.py
CLIENTS := accelerate, datasets, lightning, megatron.energon, open_clip, open_clip_train.main, sentence_transformers, \
	transformers, trl

.PHONY: pretrain test test-torch test-clients aot docs lint format bench wheel clean

pretrain: $(VENV)/installed-pretrain
	$(BIN)/mmkernels pretrain --recipe clip $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/pytest -n $(WORKERS) -m "not aot and not clients and not site" $(ARGS)

test-torch: $(VENV)/installed-$(EXTRAS)
	$(BIN)/pytest -n $(WORKERS) -m "not aot and not gpu and not slow" -k "not triton and not interpreted or test_second" $(TORCH_TESTS) $(ARGS)

test-clients: $(VENV)/installed-clients
	$(BIN)/python -c "import $(CLIENTS)"  # a test that lacks one skips
	$(BIN)/pytest -n $(WORKERS) -m "clients and not gpu" tests/integrations tests/test_blocks.py tests/test_examples.py $(ARGS)

aot: $(VENV)/installed-dev
	$(BIN)/pytest -n $(WORKERS) -m aot tests/aot $(ARGS)

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/pytest -m site tests/test_site.py $(ARGS)

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
	$(BIN)/mmkernels bench $(ARGS)

wheel: $(WHEELS)/built
	mkdir -p dist
	cp $(WHEELS)/*.whl dist

clean:
	rm -rf $(VENV) build dist

$(VENV)/created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/torch: | $(VENV)/created
	$(BIN)/pip install --quiet $(TORCH_SPEC)
	touch $@

$(WHEELS)/built: $(PACKAGE) | $(VENV)/created
	rm -rf $(WHEELS)
	$(BIN)/pip wheel --quiet --no-deps -w $(WHEELS) .
	touch $@

# The package is reinstalled whenever one of its files changes: pip would skip an equal version.
$(VENV)/installed-%: $(VENV)/torch $(WHEELS)/built
	$(BIN)/pip install --quiet --no-deps --force-reinstall $(WHEELS)/*.whl
	$(BIN)/pip install --quiet "$$(echo $(WHEELS)/*.whl)[$*]"
	touch $@
