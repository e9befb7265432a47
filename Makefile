# `make demo` and `make test` set up everything they need in .venv.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := hatch_build.py experts/native_build.py $(wildcard experts/native/*.[ch])
STORE := .stores/stories
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: setup demo demo-kill serve test test-gpu lint unit chaos bench bench-peers bench-transport bench-extract clean

setup: $(STAMP)

# The install compiles experts/native where there is a C compiler.
$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

$(STORE): | setup
	mkdir -p $(dir $(STORE))
	$(BIN)/sage-moe extract stories $(STORE)

# Streams one story through HTTP, Ray Serve, the router and two expert actors, prints a table, stops everything.
demo: setup $(STORE)
	@$(BIN)/python -m gateway.demo.story $(STORE)

# Streams a story, kills an expert actor in the middle of it, and shows that the answer is the same.
demo-kill: setup $(STORE)
	@$(BIN)/python -m gateway.demo.kill $(STORE)

# Leaves the service running until Ctrl-C.
serve: setup $(STORE)
	@$(BIN)/sage-moe serve $(STORE) --actors 2 --served-model-name stories

test: lint unit

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

unit: setup
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile -m "not ray and not slow"
	$(BIN)/python -m pytest -m "ray and not slow"

# On a machine with an NVIDIA GPU and a CUDA build of PyTorch in .venv; elsewhere tests say why they are skipped, and
# the benchmark what it needs.
test-gpu: setup
	$(BIN)/python -m pytest -m "gpu and not slow" -rs
	$(BIN)/python -m benchmarks.bench_device --quick --folder .bench

# Kills extractions, batches and every part of a running service, which takes long; `make test` has the quick ones.
chaos: setup $(STORE)
	$(BIN)/python -m tests.chaos.extract_kills models/stories-moe --kills 100
	rm -f .stores/chaos_kills.json
	for part in 0 1 2 3; do $(BIN)/python -m tests.chaos.kill_trials $(STORE) .stores/chaos_kills.json --part $$part/4 || exit 1; done
	$(BIN)/python -m pytest -m "chaos or slow"

# Measures again what benchmarks/results keeps, and keeps it: two hours on an idle machine. bench-peers builds llama.cpp.
bench: bench-peers $(STORE)
	$(BIN)/python -m benchmarks.bench_transport --keep
	$(BIN)/python -m benchmarks.bench_exactness --keep
	$(BIN)/python -m benchmarks.bench_exactness --dtype float32 --layers 2 --keep
	$(BIN)/python -m benchmarks.bench_extract --keep
	$(BIN)/python -m benchmarks.bench_batch --keep
	$(BIN)/python -m benchmarks.bench_budget --rounds 5 --tokens 48 --keep
	$(BIN)/python -m benchmarks.bench_chunks --keep
	$(BIN)/python -m benchmarks.bench_prefetch --rounds 3 --tokens 24 --keep
	$(BIN)/python -m benchmarks.bench_rss --keep
	$(BIN)/python -m benchmarks.bench_scoring --layers 4 --steps 30 --keep
	$(BIN)/python -m benchmarks.bench_start --keep
	$(BIN)/python -m benchmarks.bench_speech --folder .bench --budgets 0.25 --peer --keep
	$(BIN)/python -m benchmarks.bench_vocoder --keep
	$(BIN)/python -m benchmarks.bench_trust --layers 2 --keep
	$(BIN)/python -m benchmarks.bench_trust_restart --keep
	$(BIN)/python -m benchmarks.quality --keep

# What docs/performance.md quotes, on an idle machine with 24 GB. Models stay in .bench, 35 GB.
PEERS := $(BIN)/python -m benchmarks.bench_peers --folder .bench --keep
THREE := --contenders sage-moe transformers "llama.cpp bf16"
ROOFLINE := $(BIN)/python -m benchmarks.bench_roofline --folder .bench --keep
bench-peers: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	for part in agree single streams; do \
	  $(PEERS) --model stories --part $$part || exit 1; \
	  $(PEERS) --model qwen3_moe --vocab-size 4096 --part $$part $(THREE) || exit 1; \
	  $(PEERS) --model olmoe --part $$part $(THREE) || exit 1; done
	$(PEERS) --model qwen3_moe --vocab-size 4096 --set quantised --part single --prefills 512
	$(PEERS) --model stories --set served --part streams --streams 1 4 16 --stream-tokens 128
	$(ROOFLINE)
	SAGE_MOE_PRODUCTS=torch $(ROOFLINE) --label torch
	$(ROOFLINE) --model stories

bench-extract: setup
	$(BIN)/python -m benchmarks.bench_extract

bench-transport: setup
	$(BIN)/python -m benchmarks.bench_transport

clean:
	rm -rf experts/native/_products.so $(STAMP) .stores .bench .mypy_cache .ruff_cache .pytest_cache .hypothesis
