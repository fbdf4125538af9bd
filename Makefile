# `make demo` and `make test` work on a machine that has Python 3.11 or newer, make and a package index. Both use
# .venv. The stamps inside it remember what is installed, so a second run installs nothing, while a changed
# pyproject.toml or constraints.txt installs again.

# Candidates, best first. The system's python3 is usually the one with working SSL and venv, hence its place.
# To choose: make demo PYTHON=/path/to/python
PYTHON ?= python3 python3.14 python3.13 python3.12 python3.11

BIN := .venv/bin
RUNTIME := .venv/.runtime-installed
DEV := .venv/.dev-installed
CLUSTER := .venv/.cluster-installed
PEERS := .venv/.peers-installed

# They ask for torchvision, which none of them needs for what is measured: its wheel breaks `import laplace` beside a
# CPU torch. So they come without their dependencies; the rest of those stands in pyproject.toml's `peers`.
WITHOUT_TORCHVISION := backpack-for-pytorch curvlinops-for-pytorch laplace-torch nngeometry

# The services that ours is measured against contradict our pins: they get an environment of their own, which finds
# torch and the like in ours.
SERVICE_PEERS := .venv/service-peers/.installed
PACKAGES_OF := -c 'import sysconfig; print("\n".join({sysconfig.get_path(n) for n in ("purelib", "platlib")}))'

# Whose architectures the tests build. timm asks for torchvision, and torchvision's wheel for Linux for a CUDA torch of
# several gigabytes; neither needs one for what is tested. They lie in a folder of their own, which those tests alone
# look into: beside a CPU torch, whatever imports torchvision when it finds it (transformers, laplace) would break.
ARCHITECTURES := .venv/architectures
WITH_ARCHITECTURES := torchvision timm

# Debian splits ensurepip off, and a venv made without it has no pip. Version managers put names on the path that
# do not run. So a candidate counts only when it runs, is new enough and can make a venv.
USABLE := -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1

# --no-build-isolation with hatchling installed first: the build backend is then pinned as well, and a
# reinstall after an edit of pyproject.toml needs no download.
# -qq: errors only. One --quiet still prints a warning per package on machines with several package sources.
INSTALL := $(BIN)/python -m pip -qq --disable-pip-version-check --no-input install --constraint constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all chaos bench-jobs test-cluster zoo bench bench-service soak regret lint format wheel clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(RUNTIME)  ## compute Jacobians of the digits classifier on a local Ray
	$(BIN)/jacray run configs/digits.yaml

test: lint  ## lint, format check, types, and all tests but the slow ones
	$(BIN)/pytest -m "not slow and not ray" -n auto
	$(BIN)/pytest -m "not slow and ray"

test-all: lint  ## the same with the slow tests
	$(BIN)/pytest -m "not ray" -n auto
	$(BIN)/pytest -m ray

test-cluster: $(CLUSTER)  ## the tests of docs/cluster.md: a head, a second node, a job that Ray runs
	$(BIN)/pytest tests/cluster

bench: $(PEERS)  ## ours and every peer side by side: writes benchmarks/RESULTS.md (a quarter of an hour, on a quiet machine)
	$(BIN)/python -m benchmarks

bench-service: $(SERVICE_PEERS)  ## the service on loopback beside its peers: writes benchmarks/SERVICE.md (two minutes, on a quiet machine)
	$(BIN)/python -m benchmarks.service

regret: $(DEV)  ## how far the planner's choice is from the best method, on the benchmark's nets
	$(BIN)/python -m benchmarks.regret

chaos: $(DEV)  ## every fault many times, counted: workers, coordinator, node, disk, Ctrl-C (an hour or so)
	$(BIN)/python -m tests.chaos

soak: $(DEV)  ## the service under mixed work of 32 clients for 20 minutes: no error, flat memory, nothing left behind
	$(BIN)/python -m tests.soak

bench-jobs: $(DEV)  ## what dispatch costs: per shard, on Ray beside one process, two workers beside one
	$(BIN)/python -m benchmarks.jobs

zoo: $(DEV)  ## the table of models and methods, each against a brute-force reference (some minutes)
	$(BIN)/python -m tests.zoo.table

lint: $(DEV)  ## ruff's checks, ruff's format check, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(DEV)  ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

wheel: $(DEV)  ## build dist/jacray-*.whl
	$(BIN)/python -m build --wheel --no-isolation

clean:  ## remove builds and caches; .venv and runs stay (`rm -rf .venv` starts afresh)
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find benchmarks configs service tests workers -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

$(RUNTIME): pyproject.toml constraints.txt
	@$(BIN)/python $(USABLE) || { \
		found=; \
		for candidate in $(PYTHON); do \
			if $$candidate $(USABLE); then found=$$candidate; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "jacray needs Python 3.11 or newer with the venv and ensurepip modules; none of these is: $(PYTHON)." >&2; \
			echo "Install one (on Debian and Ubuntu also the package python3-venv), or name it: make PYTHON=/path/to/python" >&2; \
			exit 1; \
		fi; \
		echo "Making .venv with $$($$found --version)."; \
		$$found -m venv --clear .venv; \
	}
	@echo "Installing jacray and its pinned dependencies into .venv. The first time takes 1 to 10 minutes, mostly for torch; later runs skip this."
	@$(INSTALL) hatchling
	@$(INSTALL) --no-build-isolation --editable .
	@touch $@

$(DEV): $(RUNTIME)
	@echo "Installing the tools for tests, lint and types into .venv. The first time takes about a minute; later runs skip this."
	@$(INSTALL) --no-build-isolation --editable '.[dev]'
	@rm -rf $(ARCHITECTURES)
	@$(INSTALL) --no-deps --target $(ARCHITECTURES) $(WITH_ARCHITECTURES) || \
		echo "torchvision and timm could not be installed; the tests of their architectures are skipped." >&2
	@touch $@

$(CLUSTER): $(DEV)
	@echo "Installing Ray's dashboard and job server into .venv."
	@$(INSTALL) --no-build-isolation --editable '.[cluster]'
	@touch $@

$(PEERS): $(DEV)
	@echo "Installing the packages that we are measured against into .venv. The first time takes about a minute; later runs skip this."
	@$(INSTALL) --no-build-isolation --editable '.[peers]'
	@$(INSTALL) --no-deps $(WITHOUT_TORCHVISION)
	@touch $@

$(SERVICE_PEERS): $(DEV) benchmarks/service/peers.txt
	@echo "Installing the services that ours is measured against into .venv/service-peers. The first time takes about a minute; later runs skip this."
	@rm -rf $(@D)
	@$(BIN)/python -m venv $(@D)
	@$(BIN)/python $(PACKAGES_OF) > "$$($(@D)/bin/python $(PACKAGES_OF) | head -n 1)/jacray.pth"
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check --no-input install --no-deps -r benchmarks/service/peers.txt && touch $@ || { \
		rm -rf $(@D); \
		echo "They could not be installed; ours is measured alone." >&2; \
	}
