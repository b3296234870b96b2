# Everything a fresh machine needs: Python 3.11 or newer and this file.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
USER_STAMP := $(VENV)/.installed-for-users
# Where the shell forbids compiled modules to be kept (PYTHONDONTWRITEBYTECODE), every process would compile PyTorch anew: 12 s
# instead of 5 for an import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test unittest lint docs nightly soak fuzz format clean

demo: $(USER_STAMP)  ## train cross-entropy and Seesaw on the built-in data, score them, write demo/report.html
	rm -rf demo
	$(BIN)/tailseg demo --out demo

test: $(STAMP)  ## all checks and tests, at the same time
	$(MAKE) --no-print-directory --jobs 2 lint unittest

# Three processes on two cores, since tests wait for programs that they start. Only what failed is run with pytest's own
# assertions, which show the values: to rewrite those of all tests takes each process 10 s.
unittest: $(STAMP)
	$(BIN)/python -m pytest -n 3 --dist worksteal --assert=plain || \
		{ test $$? = 1 && $(BIN)/python -m pytest --last-failed --last-failed-no-failures=none; exit 1; }

nightly: $(STAMP)  ## the tests that are too long for every change
	$(BIN)/python -m pytest -n 2 --dist worksteal -m nightly

soak: $(STAMP)  ## runs killed, stopped and cut off from their disk at 100 points, 10^5 damaged files: half an hour
	FAULTS=soak $(BIN)/python -m pytest -n 2 --dist worksteal tests/faults

fuzz: $(STAMP)  ## coverage-guided fuzzing of every reader, a minute each
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	$(BIN)/python tests/faults/fuzz.py

lint: $(STAMP)
	$(BIN)/ruff check src tests benchmarks examples docs
	$(BIN)/ruff format --check src tests benchmarks examples docs
	$(BIN)/mypy

docs: $(STAMP)  ## the documentation site, in build/site
	$(BIN)/python docs/site/make_site.py

format: $(STAMP)
	$(BIN)/ruff check --fix src tests benchmarks examples docs
	$(BIN)/ruff format src tests benchmarks examples docs

# Made again whenever the project file changes; an environment that is current is used as it is. uv does on both cores
# what pip does on one, in a third of the time; limits that pip is told hold for it too. Where it fails, for example
# because only pip is told of the way to a mirror, pip installs. Modules are compiled when they are first imported: most
# of the largest packages never are.
define install
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv && \
		UV_CONSTRAINT="$$($(BIN)/python -m pip config list | sed -n "s/.*\.constraint='\(.*\)'/\1/p" | head -1)" \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '$(1)' || \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --editable '$(1)'
endef

$(STAMP): pyproject.toml
	$(call install,.[dev])
	touch $(STAMP) $(USER_STAMP)

# What a user needs, and the ImageNet weights of the small recipes; the developers' environment has that too.
$(USER_STAMP): pyproject.toml
	$(call install,.[backbones])
	touch $(USER_STAMP)

clean:
	rm -rf $(VENV) demo build dist
