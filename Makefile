PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TESTS := $(BIN)/python -m pytest -n 2
# Beside the environment, not in it: peft imports bitsandbytes wherever it finds it.
EXTRAS := bitsandbytes trl datasets dill multiprocess pandas pyarrow xxhash

.PHONY: demo test test-all test-extras lint types arrows docs wheel ci

demo: $(READY) ; HF_HUB_OFFLINE=1 $(BIN)/dare-hf demo
test: $(READY) ; $(TESTS) -m "not slow"
test-all: $(READY) ; $(TESTS)
test-extras: .venv/extras ; HF_HUB_OFFLINE=1 PYTHONPATH=.venv/extras $(TESTS) -m extras
lint: $(READY) ; $(BIN)/ruff check . && $(BIN)/ruff format --check .
types: $(READY) ; $(BIN)/ty check
arrows: $(READY) ; $(BIN)/lint-imports --no-cache
docs: $(READY) ; NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
wheel: $(READY) ; rm -rf dist && $(BIN)/python -m build --no-isolation --wheel && .ci/check_wheel
ci: lint types arrows docs wheel test-all test-extras

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

.venv/extras: $(READY)
	$(BIN)/python -m pip install -c constraints.txt --no-deps --target $@ $(EXTRAS)
	touch $@
