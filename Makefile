# `make demo` and `make test` do all their own set-up: a virtual environment with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU-only torch is a tenth of the download: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
DEMO := runs/demo
# One process more than cores, up to four: many tests wait.
PARALLEL := -n $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4)))

.PHONY: demo test test-slow test-cluster fuzz lint docs format bench install clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(if $(TORCH_INDEX),$(BIN)/pip install -q -c constraints.txt --no-deps --index-url $(TORCH_INDEX) torch)
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,train,view,slurm,docs]'
	@touch $@

# The database that the ledger tests talk to has its own environment: it is no part of the product.
.venv-services/.installed: tests/requirements-services.txt
	$(PYTHON) -m venv .venv-services
	.venv-services/bin/pip install -q -r tests/requirements-services.txt || \
	  echo "no test database for this Python: the ledger tests will say so and skip" >&2
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/agq synthetic $(DEMO)-input.zarr --shape 40,768,768 --seed 7
	$(BIN)/agq run configs/demo.yaml --overwrite
	@echo
	@echo "Picture: $(DEMO)/demo.png    Viewer: $(BIN)/agq view $(DEMO)"

test: $(VENV)/.installed .venv-services/.installed
	$(BIN)/pytest $(PARALLEL) --dist worksteal --durations 12

# Tests of the container image stay together.
test-slow: $(VENV)/.installed .venv-services/.installed
	$(BIN)/pytest $(PARALLEL) --dist loadgroup -m "slow and not cluster" --timeout 1200 --durations 12

# A real SLURM with emulated GPU nodes on this machine: Debian or Ubuntu, as root (it installs
# slurm and munge); elsewhere these tests say why they skip. They mostly wait for it, so three run at
# once, each on a cluster of its own; rates are measured alone. However they end, no daemon stays.
test-cluster: $(VENV)/.installed .venv-services/.installed
	@lab=$$(mktemp -d /tmp/agq-slurm-XXXXXX) || exit 1; \
	trap 'for one in "$$lab"/gw*; do SLURM_LAB=$$one bash tests/cluster/slurm-down.sh; done; rm -rf "$$lab"' EXIT; \
	trap 'exit 130' INT TERM HUP; \
	bash tests/cluster/slurm-install.sh; \
	AGQ_SLURM_LAB=$$lab $(BIN)/pytest tests/cluster --ignore tests/cluster/test_rate.py -m cluster \
	  -n 3 --dist worksteal --timeout 1200 --durations 12 && \
	$(BIN)/pytest tests/cluster/test_rate.py -m cluster

# Every reader of files is given damaged and hostile ones, each for so many seconds.
FUZZ_SECONDS ?= 60
fuzz: $(VENV)/.installed
	AGQ_FUZZ_SECONDS=$(FUZZ_SECONDS) $(BIN)/pytest $(PARALLEL) -m fuzz --timeout 3600 --durations 12

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/sphinx-build -q -W --keep-going -b html docs build/docs
	@echo "build/docs/index.html"

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/forward.py

clean:
	rm -f docs/configuration.md
	rm -rf $(VENV) .venv-services runs build dist *.egg-info
