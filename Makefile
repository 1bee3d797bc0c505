# Two commands do all the set-up on a fresh Linux machine with Python >= 3.11 and gcc: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint slow clean

demo: $(INSTALLED)
	$(BIN)/hsa-compile demo --output runs/demo

test: lint
	$(BIN)/python -m pytest -n 2

slow: $(INSTALLED)
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# Type checkers do not follow the finder of an editable install: check the tree as it is installed.
	@rm -rf build/types && $(BIN)/python -c "import setuptools; setuptools.setup()" -q build_py --build-lib build/types
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p hsa_compile

# torch first and pinned: plain `torch`, asked for by another package, may bring several GB of CUDA libraries.
$(INSTALLED): requirements.lock pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf $(VENV) build dist runs *.egg-info
