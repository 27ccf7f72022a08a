# Two commands for newcomers, each of which sets up what it needs in .venv:
#   make quickstart   text -> shards -> trained model -> Hugging Face -> text, about 5 minutes
#   make test         the tests
# constraints.txt pins torch to a build without CUDA where the package index has one; with a GPU:
#   make test TORCH=torch        (or TORCH="torch==2.11.0", any version from 2.11 on)

PYTHON ?= python3
TORCH ?=
BIN := .venv/bin
# one install for every group of packages; redone when the project's needs change
CONSTRAINTS := $(if $(TORCH),.venv/constraints.txt,constraints.txt)
STAMP = .venv/installed-$(1)
# processes of one thread each, 8 at most; two more than cores, as they often wait for servers
CORES := $(shell getconf _NPROCESSORS_ONLN)
WORKERS := -n $(shell [ $(CORES) -lt 6 ] && expr $(CORES) + 2 || echo 8) --dist worksteal

.PHONY: quickstart test slow fault slurm check docs clean

quickstart: $(call STAMP,quickstart)
	examples/quickstart.sh

test: $(call STAMP,dev)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(WORKERS) $(ARGS)

slow: $(call STAMP,dev)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m 'slow and not fault and not slurm' $(ARGS)

# the slower of the tests with real kills, full disks and servers that fail
fault: $(call STAMP,dev)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 -m 'slow and fault and not slurm' $(ARGS)

slurm: $(call STAMP,dev)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slurm $(ARGS)

check: $(call STAMP,dev)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# the documentation as a site in build/site; a dead link is an error
docs: $(call STAMP,docs)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:
	rm -rf .venv runs

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3.12 ...'; exit 2; }
	$(PYTHON) -m venv .venv

.venv/constraints.txt: constraints.txt $(BIN)/python
	grep -v '^torch==' constraints.txt > $@
	echo '$(TORCH)' | grep '==' >> $@ || true

.venv/installed-%: pyproject.toml $(CONSTRAINTS) | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@
