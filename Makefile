# `make` lists what there is. Every target makes or updates the virtual environment by itself.
VENV ?= .venv
MODEL ?= demo
PORT ?= 3000
ARGS ?=
PYTEST_ARGS ?=
VARIANT ?= cpu
BUNDLE ?=
BACKEND ?= docker
IMAGE ?= nanovllm:$(if $(filter cuda,$(VARIANT)),cuda,latest)
CONTAINERIZE_ARGS ?=
DOCKER_ARGS ?=

# PYTHON=python3.12 chooses the interpreter; otherwise scripts/bootstrap.py looks for one that works.
BOOTSTRAP := $(or $(PYTHON),python3) scripts/bootstrap.py --venv $(VENV) $(if $(PYTHON),--python $(PYTHON))
BIN := $(VENV)/bin
SUBMAKE = $(MAKE) --no-print-directory
NO_TESTS := $(if $(PYTEST_ARGS),5,0)
SOURCES := nanovllm_bento scripts tests $(wildcard service.py examples benchmarks deploy)

.DEFAULT_GOAL := help
.PHONY: help venv venv-dev venv-bench serve chat test others kernels lint types format unit e2e bench doctor bento clean
.PHONY: container container-run container-test deploy-check

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

venv:  ## make the virtual environment with what serving needs
	@$(BOOTSTRAP)

venv-dev:
	@$(BOOTSTRAP) dev

venv-bench:
	@$(BOOTSTRAP) bench

serve: venv  ## serve MODEL=demo on PORT=3000 (any model; ARGS="--max-num-seqs 64" for more settings)
	@$(BIN)/nanovllm-bento serve --model $(MODEL) --port $(PORT) $(ARGS)

chat: venv  ## talk to the server on PORT=3000
	@$(BIN)/nanovllm-bento chat --base-url http://127.0.0.1:$(PORT) $(ARGS)

# Tests that start servers mostly wait for them; the others run beside them, and their output comes at the end. All
# compute on one thread: two a process would spin for the cores that they share, and take twice as long. Only
# PYTEST_ARGS may leave one of the two without a test (pytest's exit status 5).
test: lint types  ## lint, types and all tests
	@log=$$(mktemp) && trap 'rm -f $$log' EXIT; \
	$(SUBMAKE) -k others kernels >$$log 2>&1 & beside=$$!; \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e $(PYTEST_ARGS); status=$$?; \
	[ $$status != $(NO_TESTS) ] || status=0; \
	wait $$beside || status=1; \
	cat $$log; exit $$status

others: venv-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore=tests/e2e $(PYTEST_ARGS) || [ $$? = $(NO_TESTS) ]

kernels: venv-dev  ## the Triton kernels, in Triton's interpreter on the CPU
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/interpreted $(PYTEST_ARGS) || [ $$? = $(NO_TESTS) ]

lint: venv-dev  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: venv-dev  ## mypy
	$(BIN)/mypy

format: venv-dev  ## let ruff format and fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

unit: venv-dev  ## the quick tests
	$(BIN)/python -m pytest tests -m "not e2e and not slow and not demo and not gpu" $(PYTEST_ARGS)

e2e: venv-dev  ## the tests that start a real server
	$(BIN)/python -m pytest tests -m e2e $(PYTEST_ARGS)

bench: venv-bench  ## offline benchmark against transformers (MODEL=demo, ARGS=...)
	$(BIN)/nanovllm-bento bench offline --preset cpu --model $(MODEL) $(ARGS)

doctor: venv  ## what this machine offers and what the engine would choose
	@$(BIN)/nanovllm-bento doctor

bento: venv-dev  ## build the Bento (VARIANT=cuda; BUNDLE=demo puts that model into it) and print its tag
	@$(BIN)/python scripts/bento.py --variant $(VARIANT) --model "$(BUNDLE)"

# From /, for BentoML takes the Bento's template only from below the current folder.
container: venv-dev  ## build the Bento and its image, with Docker (BACKEND=buildah, CONTAINERIZE_ARGS="--opt ...")
	@tag=$$($(BIN)/python scripts/bento.py --variant $(VARIANT) --model "$(BUNDLE)") && bin=$$(cd $(BIN) && pwd) && \
	cd / && $$bin/bentoml containerize $$tag --backend $(BACKEND) -t $(IMAGE) $(CONTAINERIZE_ARGS)

container-run:  ## run that image with Docker, as safe as Kubernetes would (MODEL, PORT, DOCKER_ARGS="--gpus all")
	docker run --rm --read-only --tmpfs /tmp --volume nanovllm-cache:/cache --cap-drop ALL \
		--security-opt no-new-privileges --stop-timeout 30 --publish $(PORT):3000 \
		$(if $(filter command%,$(origin MODEL)),--env NANOVLLM_MODEL=$(MODEL)) $(DOCKER_ARGS) $(IMAGE) serve

container-test: venv-dev  ## prove the container without Docker: as root, on Debian, with buildah
	$(BIN)/python scripts/container_test.py $(ARGS)

deploy-check: venv-dev  ## check deploy/ with the tools that read it (ARGS="--install" gets those of pip and npm)
	@$(BIN)/python scripts/deploy_check.py $(ARGS)

clean:  ## remove caches and build outputs (not the virtual environment)
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage *.egg-info
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +
