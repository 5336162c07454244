# make demo    sets up what it needs and shows the main job on the CPU
# make test    sets up what it needs and runs all tests
# make test-gpu  the tests of the kernels, with the machine's own python3 and its torch, not .venv; skips without a GPU
# make lint    ruff, mypy --strict, the core's stubs against the module, clang-format
# make docs    the documentation as a site, build/site; a warning is an error
# make stress    a million random actions of the core beside the oracle (ACTIONS=n)
# make ranks     eight processes that make the same million calls reach the same digest (CALLS=n)
# make mutants   deliberate bugs, each of which the tests must catch (SAMPLE=n for some of them)
# make sanitize  the core under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer and valgrind
# make fuzz      libFuzzer on the core's calls, check() after each (SECONDS=n)
# make bench    what the control plane costs, beside memcmp and the peers that are set up (QUICK=1: under a minute)
# make bench-peers   sets up SGLang, vLLM and TokenSpeed under build/peers, then make bench
# make instructions  counts the instructions of the core's hot paths anew (needs valgrind)
# Everything lives in .venv; nothing is installed elsewhere. PYTHON chooses the interpreter (3.10 or newer).
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*.cpp csrc/*.h)
COUNTER := $(wildcard benchmarks/*.cpp)
FUZZER := $(wildcard tests/fuzz/*.cpp tests/fuzz/*.h)

.PHONY: demo test test-gpu lint docs stress ranks mutants sanitize fuzz bench bench-peers instructions format clean
.DELETE_ON_ERROR:

# torch is pinned to the version whose CPU wheel installs fast; it goes first, so that nothing else asks for another.
.venv/installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

.venv/built: .venv/installed $(SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

demo: .venv/built
	$(BIN)/python -m hybridcache demo

test: .venv/built
	$(BIN)/python -m pytest

# Warnings of whatever torch the machine has are no errors.
test-gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m pytest -W default tests/test_gpu.py tests/test_pools.py tests/test_gated_delta.py

ACTIONS ?= 1000000
CALLS ?= 1000000

stress: .venv/built
	$(BIN)/python -m tests.stress --actions $(ACTIONS)

ranks: .venv/built
	$(BIN)/python -m tests.ranks --calls $(CALLS)

mutants: .venv/built
	$(BIN)/python -m tests.mutants $(if $(SAMPLE),--sample $(SAMPLE))

sanitize: .venv/installed
	tests/sanitize.sh $(BIN)/python

SECONDS ?= 60

fuzz:
	tests/fuzz/run.sh $(SECONDS)

bench: .venv/built
	mkdir -p build
	$(BIN)/python -m benchmarks.control_plane $(if $(QUICK),--quick) --json build/control_plane.json --plot build/control_plane.png

bench-peers: .venv/built
	$(BIN)/python -m benchmarks.peers.environments
	$(MAKE) bench

instructions: .venv/installed
	$(BIN)/python -m benchmarks.instructions --update

lint: .venv/built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m mypy.stubtest hybridcache._core --allowlist tests/stubtest.txt
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) $(FUZZER) $(COUNTER)

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES) $(FUZZER) $(COUNTER)

clean:
	rm -rf .venv build *.egg-info hybridcache/*.so
