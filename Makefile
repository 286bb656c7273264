PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# The other minor version that pyproject.toml allows, beside the one in constraints.txt; both have the same requirements.
OTHER_TRANSFORMERS := 5.24.0
OTHER := $(CURDIR)/.other/transformers-$(OTHER_TRANSFORMERS)
OTHER_TESTS := cli/chat/conversation engine/engine generation/enable generation/equality generation/options generation/outputs \
	kernels/prepared kernels/stack package/warnings training/exits tree_model/cache tree_model/masks

# As many workers as cores that we count on, each with one thread. A worker that has nothing left takes tests of the other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

.PHONY: demo demo-full test test-all test-other-transformers conformance docs wheel check clean

# One thread: on busy cores two wait for each other, and the same run takes more than three times as long.
BENCH := $(BIN)/specdec bench --model demo --threads 1

demo: $(READY)  ## fetch the demo model and see how much faster it is, and that its output is the same: minutes, once installed
	$(BIN)/specdec pull demo
	$(BENCH) --quick

demo-full: $(READY)  ## the same with more drafters and prompts, and what was chosen: about 9 minutes on 2 cores
	$(BIN)/specdec pull demo
	$(BENCH) --methods prompt-lookup,quantized-self,auto --explain --limit 2

test: $(READY)  ## what shows that it works: in minutes, on 2 cores; fetches the demo model if it is not there yet
	-$(BIN)/specdec pull demo  # here, as two workers would both fetch it; without a network its tests are skipped
	$(PYTEST) -m "not slow and not ray and not ranks"

# Ray (half a gigabyte, installed), Triton (a whole one; its interpreter needs no GPU) and llama.cpp are for these tests only:
# what no run covers is not known to work.
test-all: test  ## everything that a user can run: every drafter with every family and every sampler, llama.cpp, Ray, several processes
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[bench,peers,ray,triton]"
	$(PYTEST) -m "slow and not ray and not ranks"
	$(BIN)/python -m pytest -m "ray or ranks" tests/batch tests/decoding

test-other-transformers: $(READY) $(OTHER)  ## what touches a model, on the other transformers
	PYTHONPATH=$(OTHER) $(BIN)/python -c "import transformers as t; assert t.__version__ == '$(OTHER_TRANSFORMERS)', t.__file__"
	PYTHONPATH=$(OTHER) $(PYTEST) $(foreach test,$(OTHER_TESTS),tests/$(dir $(test))test_$(notdir $(test)).py)

conformance: $(READY)  ## 2,000 random calls against model.generate(): about 10 minutes
	$(BIN)/python -m pytest tests/generation/test_conformance.py --hypothesis-profile=nightly

docs: $(READY)  ## the pages as a site, in site/; needs no network once the extra is installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

wheel: $(READY)  ## dist/*.whl, with the native kernels if there is a compiler
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

check: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .other build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(OTHER):
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@ transformers==$(OTHER_TRANSFORMERS)

# Not --quiet: this takes minutes.
$(READY): pyproject.toml constraints.txt
	@echo "installing into $(VENV): minutes the first time, most of it torch"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev,serve]"
	touch $@
