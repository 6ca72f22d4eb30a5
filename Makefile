# jp_train: two commands to start with are `make smoke` and `make test`. `make help` lists the rest.
# TORCH names the torch to install; the default is the pinned release (a CPU build where pip offers one):
#   make smoke TORCH="torch==2.13.0 --index-url <your CUDA wheel index>"

SHELL := /bin/bash
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUNS ?= runs/smoke
SHOWCASE_RUNS ?= runs/showcase
# --seed and sizes of the smoke run: see `python -m examples.smoke --help`
SMOKE_ARGS ?=
SHOWCASE_ARGS ?=
# --faults --on-hosts --seed --kinds: see `python -m tests.chaos.run --help`
CHAOS_ARGS ?=
# --only NAME... --list --size tiny|1b: see `python -m tests.gpu.check --help`
GPU_CHECK_ARGS ?=
# test files that run side by side; each may start 2 to 4 ranks of its own
TEST_JOBS ?= 2

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export WANDB_SILENT ?= true
export TOKENIZERS_PARALLELISM ?= false
export PYTHONWARNINGS ?= ignore::FutureWarning

CODE := jp_train examples tests bench docs

.PHONY: help setup system-packages smoke smoke-stage1 smoke-stage2 smoke-stage3 showcase test test-fast coverage gpu-check chaos lint format docs bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z0-9][a-z0-9 -]*:.*## / {n = split($$1, names, " "); \
		for (i = 1; i <= n; i++) printf "%-16s%s\n", names[i], $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## virtual environment in .venv with everything pinned

$(STAMP): setup.cfg pyproject.toml
	@echo "setup: installing the pinned packages into $(VENV) (about 2 minutes, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@pip="$(BIN)/python -m pip install --disable-pip-version-check"; \
	{ $$pip $(TORCH) && $$pip setuptools wheel && $$pip -e '.[smoke,test,docs]'; } >$(VENV)/setup.log 2>&1 \
		|| { tail -n 30 $(VENV)/setup.log; echo "setup failed: the whole output is in $(VENV)/setup.log"; exit 1; }
	@touch $@

system-packages:  ## Debian packages for several hosts on one machine (tests/multinode) and for checking the scripts; as root
	apt-get -o Acquire::http::Timeout=20 -o Acquire::Retries=1 update -qq || true
	DEBIAN_FRONTEND=noninteractive apt-get -o Acquire::http::Timeout=20 install -y -qq --no-install-recommends \
		openssh-server openssh-client pdsh iproute2 nftables libfaketime openmpi-bin shellcheck

smoke: $(STAMP)  ## train a tiny Janus-Pro through all three stages on real images and text, then judge it (10 to 14 minutes)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m examples.smoke --out $(RUNS) $(SMOKE_ARGS)

smoke-stage1 smoke-stage2 smoke-stage3: smoke-stage%: $(STAMP)  ## only this stage of the smoke run (what it needs is made first)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m examples.smoke --out $(RUNS) --only-stage $* $(SMOKE_ARGS)

showcase: $(STAMP)  ## the same with emoji in three drawing styles and WordNet (<= 40 minutes; needs npm, apt-get, dpkg-deb)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m examples.showcase --out $(SHOWCASE_RUNS) $(SHOWCASE_ARGS)

test: $(STAMP)  ## all tests (<= 15 minutes on 2 cores)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-fast: $(STAMP)  ## the inner loop: tests that start no process and train nothing (<= 90 s)
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(TEST_JOBS) --fast $(PYTEST_ARGS)

coverage: $(STAMP)  ## lines of the package that test-fast does not reach, and site/coverage/index.html
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest -q -n 0 --fast $(PYTEST_ARGS)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report

gpu-check: $(STAMP)  ## what only a GPU of 80 GB can show, beside the forecast (<= 10 minutes; tiny models on a CPU: 1 minute)
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.gpu.check $(GPU_CHECK_ARGS)

chaos: $(STAMP)  ## 500 faults injected into training on purpose, and what was lost (<= 90 minutes; root for those of disks and hosts)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m tests.chaos.run $(CHAOS_ARGS)

lint: $(STAMP)  ## ruff, mypy, hadolint; nothing changed
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

format: $(STAMP)  ## ruff, in place
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

docs: $(STAMP)  ## the site in site/html: pages, API from docstrings; a dead link is an error
	$(BIN)/python docs/make_configuration.py
	$(BIN)/python docs/make_site.py
	@echo "site/html/index.html"

bench: $(STAMP)  ## paired benchmarks: a table and bench/results/*.json
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m bench

clean:  ## remove the smoke run and caches; keeps .venv
	rm -rf $(RUNS) .cache .pytest_cache .ruff_cache .mypy_cache .coverage* site build *.egg-info
