# `make demo` and `make test` do all their own set-up: a virtual environment with pinned versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A CPU-only torch is a tenth of the download: make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
DEMO := runs/demo
# One process more than cores, up to four: many tests wait.
PARALLEL := -n $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 3 ? n + 1 : 4)))

.PHONY: demo test test-slow test-cluster fuzz lint docs format lock audit bench install clean
.DELETE_ON_ERROR:

install: $(VENV)/.installed

# All but torch is held to checksums: what an index serves instead is refused. What has no wheel is
# built with the setuptools from there, our own package too. The last call of pip adds the CUDA
# libraries of this build of torch.
$(VENV)/.installed: pyproject.toml $(wildcard requirements/*.txt)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "Python's venv module is missing; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	$(BIN)/pip install -q --no-deps --require-hashes -r requirements/build.txt
	$(BIN)/pip install -q --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -r requirements/torch.txt
	$(BIN)/pip install -q --no-deps --require-hashes --no-build-isolation --use-pep517 -r requirements/all.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/pip install -q -r requirements/torch.txt
	@touch $@

# SecantusDB, the database that the ledger tests talk to, speaks the MongoDB wire protocol. It is
# GPL-2.0-only and no part of the product, hence its own environment.
.venv-services/.installed: tests/requirements-services.txt
	$(PYTHON) -m venv .venv-services
	.venv-services/bin/pip install -q --no-deps --require-hashes -r tests/requirements-services.txt || \
	  echo "no test database for this Python: the ledger tests will say so and skip" >&2
	@touch $@

# Programs that others read exports with: cloud-volume and webknossos-libs read ours back, kimimaro
# makes the skeletons that ours are held against. Some are GPL, and none is part of the product.
.venv-readers/.installed: tests/requirements-readers.txt
	$(PYTHON) -m venv .venv-readers
	.venv-readers/bin/pip install -q --no-deps --require-hashes -r tests/requirements-readers.txt || \
	  echo "no independent readers for this Python: their tests will say so and skip" >&2
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/agq synthetic $(DEMO)-input.zarr --shape 40,768,768 --seed 7
	$(BIN)/agq run configs/demo.yaml --overwrite
	$(BIN)/agq export precomputed $(DEMO) --meshes
	$(BIN)/agq suspects $(DEMO) --show 5
	@echo
	@echo "Picture: $(DEMO)/demo.png    Viewer: $(BIN)/agq view $(DEMO)"

test: $(VENV)/.installed .venv-services/.installed .venv-readers/.installed
	$(BIN)/pytest $(PARALLEL) --dist worksteal --durations 12

# Tests of the container image stay together.
test-slow: $(VENV)/.installed .venv-services/.installed .venv-readers/.installed
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

# Exact versions and the checksums of their files, for all extras and for the image; versions stay as
# they are unless pyproject.toml asks for others (LOCK_OPTIONS=--upgrade: the newest ones).
LOCK := $(BIN)/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-annotate \
  --custom-compile-command "make lock" -c requirements/torch.txt $(LOCK_OPTIONS)
NO_TORCH := awk '/^[^ ]/ {skip = /^(torch|triton|cuda-|nvidia-)/} !skip'
lock: $(VENV)/.installed
	$(LOCK) --all-extras pyproject.toml -o requirements/all.txt
	cp requirements/all.txt requirements/image.txt
	$(LOCK) --extra view --extra slurm pyproject.toml -o requirements/image.txt
	cp requirements/all.txt requirements/build.txt
	echo "setuptools>=77" | $(LOCK) - -o requirements/build.txt
	echo "secantusdb==0.7.0b3" | $(LOCK) - -o tests/requirements-services.txt
	printf '%s\n' "cloud-volume>=12" "kimimaro>=5" "webknossos>=4" | $(LOCK) - -o tests/requirements-readers.txt
	@for file in requirements/all.txt requirements/image.txt; do \
	  $(NO_TORCH) $$file > $$file.new && mv $$file.new $$file || exit 1; done

# Looks the locked versions up in a database of known vulnerabilities (osv.dev); ends with an error if
# there are any. Without a network it says that nothing was checked, and ends well.
audit: $(VENV)/.installed
	@mkdir -p build
	@sed -n 's/^\([a-z][^\\]*[^ \\]\).*/\1/p' requirements/all.txt requirements/torch.txt > build/versions.txt
	@$(BIN)/uv tool run pip-audit@2.10.1 -s osv --disable-pip --no-deps --progress-spinner off \
	  -r build/versions.txt 2> build/audit.log; status=$$?; \
	tail -n 1 build/audit.log | grep -E '^(Found|No known)' && exit $$status; \
	echo "nothing was checked: no database of vulnerabilities can be reached (see build/audit.log)"

bench: $(VENV)/.installed
	$(BIN)/python benchmarks/forward.py

clean:
	rm -rf $(VENV) .venv-services .venv-readers runs build dist *.egg-info
