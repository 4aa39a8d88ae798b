# Two commands do everything: `make book` and `make test`. Both set up .venv first, from the pins in constraints.txt.

PYTHON ?= python3
BIN := .venv/bin
PYTEST = "$(BIN)/python" -m pytest -n 2 --dist worksteal

# One thread a process: two processes with two threads each stall one another.
export OMP_NUM_THREADS = 1
export NUMBA_NUM_THREADS = 1

.DEFAULT_GOAL := help
.PHONY: help venv book run test check units lint lab reproduce bench clean

help:  ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-10s %s\n", $$1, $$2}' Makefile

book: run  ## Execute every notebook and build the book, with its PDF, into book/_build/html/
	"$(BIN)/dtbook" build --pdf

run: venv  ## Execute every notebook that is not up to date
	"$(BIN)/dtbook" run

# `make -j 2`: what keeps one core busy runs beside what keeps two.
test: venv  ## Before a push: lint, build the book, then test the package, the notebooks and the built pages
	$(MAKE) -j 2 lint run
	$(MAKE) -j 2 book units
	$(PYTEST) -m slow tests

check: venv  ## While editing: lint, and the tests that need no browser, no notebook and no long computation
	$(MAKE) -j 2 lint units

units: venv  ## Those tests alone
	$(PYTEST) -m "not slow" tests

lint: venv  ## Check style, types and the layers of the package
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/lint-imports"
	"$(BIN)/mypy"

lab: venv  ## Open the notebooks in JupyterLab, which runs them with this environment
	"$(BIN)/jupyter" lab notebooks

reproduce: venv  ## Execute every notebook twice, make every artifact of data/ again from nothing, and compare
	"$(BIN)/dtbook" run
	"$(BIN)/dtbook" run --again
	"$(BIN)/dtbook" reproduce --everything

bench: venv  ## Measure speed, with EnvPool beside it where that runs (Linux), for the chapter Speed
	"$(BIN)/python" -m pip install --quiet --constraint constraints.txt --editable ".[bench]"
	"$(BIN)/dtbook" bench --write

clean:  ## Remove what was built: pages, executed notebooks, caches, the virtual environment
	rm -rf .venv book/_build book/_executed runs screenshots .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find dtbook tests notebooks book benchmarks -name __pycache__ -prune -exec rm -rf {} +

venv: .venv/installed  ## Create .venv and install the pinned dependencies

.venv/installed: pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v <= (3, 13) else \
	  "This book needs Python 3.11, 3.12 or 3.13, not %d.%d: choose one with `make PYTHON=python3.12 ...`." % v)'
	test -x "$(BIN)/python" || "$(PYTHON)" -m venv .venv
	"$(BIN)/python" -m pip install --constraint constraints.txt --editable ".[book,lab,test]"
	touch $@
