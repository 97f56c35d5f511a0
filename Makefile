# make quickstart   train a tokenizer and a generator, sample, score; writes outputs/quickstart/index.html
# make test         the test suite, on all cores; options of pytest: make test ARGS='-n 0 -k resume'
# make coverage     the same, traced, which takes longer; it fails when less than 90 % of the code was run
# make slow         the tests that take minutes: what users install, in every place, and the accuracy of the judges
# make page         the tests of the page of `imgtok demo`: by a program, and in Chromium where that is installed
# make lint         ruff and mypy
# make docs         the documentation site, in build/site; open build/site/index.html. A broken link is an error
# Each creates .venv and installs imgtok into it first, again only when pyproject.toml has changed.
# Needs python3 (3.11 or newer; another one with PYTHON=...) and a package index.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS_INSTALLED := .venv/.docs-installed
PAGE := build/page
CODE := imgtok generators train sample tests benchmarks
PARALLEL := -n auto --dist loadfile

.PHONY: venv quickstart test coverage slow page lint docs clean

venv: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "imgtok needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; name another one: make PYTHON=/path/to/python3")'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable '.[dev]'
	@touch $@

$(DOCS_INSTALLED): $(INSTALLED)
	@$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[docs]' || { echo "make docs: the packages of the extra 'docs' (mkdocs-material, mkdocstrings) could not be installed: is a package index in reach? The site was not built."; exit 1; }
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/imgtok quickstart $(ARGS)

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

coverage: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) --cov --cov-report=term --cov-fail-under=90 $(ARGS)

slow: $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m 'slow and not gpu and not network' $(ARGS)

# gradio needs an older Pillow than the other tests, so it lies beside .venv, and only the tests of the page see it.
$(PAGE)/.installed: pyproject.toml $(INSTALLED)
	rm -rf $(PAGE)
	$(BIN)/python .ci/beside.py demo $(PAGE)
	@mkdir -p $(PAGE) && touch $@

page: $(PAGE)/.installed
	PYTHONPATH="$(CURDIR)/$(PAGE)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python -m pytest -m page -rs $(ARGS) tests/sample/test_demo.py

docs: $(DOCS_INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "the site is in build/site: open build/site/index.html"

lint: $(INSTALLED)
	$(BIN)/ruff check $(CODE) docs .ci
	$(BIN)/ruff format --check $(CODE) docs .ci
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info .coverage htmlcov .pytest_cache .mypy_cache .ruff_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
