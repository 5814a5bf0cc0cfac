# Every target sets up .venv itself, from nothing but Python (3.10 or newer), pip and make.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check

# Stamps say what the environment already holds, so that nothing is installed again until its reason changes.
CREATED := $(VENV)/.created
TORCH := $(VENV)/.torch
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters

# Options handed on, such as: make demo ARGS="--steps 100", make test ARGS="-k schedules", make bench ARGS="--quick"
ARGS ?=
# Records of `make bench`; the folder is where recorded runs live.
OUT ?= bench/results/local.jsonl

.DEFAULT_GOAL := help
.PHONY: help demo test bench report lint clean
# A recipe that fails must not leave a stamp behind that says it succeeded.
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## train a small GPT with torch.optim and with fusedlr, and draw demo.png
	$(RUN) examples/train_char_gpt.py $(ARGS)

test: $(INSTALLED) ## run the tests
	$(RUN) -m pytest -n 2 $(ARGS)

bench: $(INSTALLED) ## time fusedlr against torch.optim on this machine's GPU, or on its CPU
	$(RUN) bench/run.py --device auto --out $(OUT) $(ARGS)
	$(RUN) -m pytest bench --benchmark-columns=median,iqr,rounds

report: $(INSTALLED) ## write docs/performance.md from the records in bench/results
	$(RUN) bench/report.py $(ARGS)

lint: $(LINTERS) ## check style and types
	$(RUN) -m ruff check .
	$(RUN) -m mypy

clean: ## remove the environment and everything built
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Debian's Python may come without ensurepip: then the pip that runs it installs one into the environment.
$(CREATED):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fusedlr needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + ": make PYTHON=/path/to/a/newer/python")'
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(RUN) install pip; }
	@touch $@

$(TORCH): .ci/install-torch | $(CREATED)
	.ci/install-torch $(RUN)
	@touch $@

# Without build isolation, which would fetch setuptools anew for every build, also where there is no network any more.
$(INSTALLED): pyproject.toml setup.py $(TORCH)
	$(PIP) install "setuptools>=70.1"
	$(PIP) install --no-build-isolation --editable ".[test,bench,examples]"
	@touch $@

$(LINTERS): $(INSTALLED)
	$(PIP) install --no-build-isolation --editable ".[dev]"
	@touch $@
