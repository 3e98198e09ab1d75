# Everything starts from a bare clone: the virtual environment is made on first use.
VENV ?= .venv
BIN = $(VENV)/bin
export PROMPT ?= a red sun over a blue sea, drifting left

.PHONY: demo serve test test-ray test-model check lint format figures faults chaos soak fuzz demo-scores fidelity demo-checkpoint manifests sbom autoscaling load plan-check

demo: $(VENV)/run.stamp  ## start the service, stream one video into video.mp4, stop
	$(BIN)/helios demo "$$PROMPT" -o video.mp4

serve: $(VENV)/run.stamp  ## serve the demo model on port 8000 until interrupted
	$(BIN)/helios serve

# Those of the model itself only compute, and know no time: they take what tests with Ray leave, who wait for most of it.
OF_THE_MODEL = tests/demo tests/parity

test: $(VENV)/dev.stamp  ## all tests: those in one process side by side, then those of the model beside those with Ray
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal -m "not ray" $(addprefix --ignore ,$(OF_THE_MODEL))
	$(MAKE) --jobs 2 test-ray test-model

test-ray: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m ray tests/deployments tests/faults

test-model: $(VENV)/dev.stamp
	nice -n 19 $(BIN)/python -m pytest $(OF_THE_MODEL)

check: $(VENV)/dev.stamp  ## formatting, lint, types, and beside them the tests
	$(MAKE) --jobs 2 lint test

lint: $(VENV)/dev.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

faults: $(VENV)/dev.stamp  ## ten times the restarts and cancels, slow viewers for a minute, a store away for half of one
	TRIALS=10 STALL_SECONDS=60 $(BIN)/python -m pytest --timeout 3600 tests/faults/test_faults.py $(addprefix tests/deployments/test_,restart.py haproxy.py)
	OUTAGE_S=30 $(BIN)/python -m pytest --timeout 3600 tests/deployments/test_outages.py

chaos: $(VENV)/dev.stamp  ## every scenario of faults TRIALS times, with eight videos: RELIABILITY.md's table; 20 take 2 hours
	$(BIN)/python -m tests.faults.chaos --trials $(or $(TRIALS),1) $(ARGS)

soak: $(VENV)/dev.stamp  ## half an hour of videos over S3 with a kill every 30 s: nothing lost, nothing grown
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),30)

fuzz: $(VENV)/dev.stamp  ## 25,000 spoilt requests, of 10,000 bodies; 10,000 over connections; 10,000 hostile prompts
	FUZZ=25000 $(BIN)/python -m pytest --timeout 3600 -rA --log-level=WARNING tests/deployments/test_fuzz.py -k request
	FUZZ=10000 $(BIN)/python -m pytest --timeout 3600 tests/deployments/test_fuzz.py -k "connection or prompt"

figures: $(VENV)/dev.stamp  ## every measured figure of the README, measured again
	$(BIN)/python -m load_tests.figures

plan-check: $(VENV)/dev.stamp  ## what helios plan says of a paced demo service, beside what load tests find; 12 minutes
	$(BIN)/python -m load_tests.against_plan

autoscaling: $(VENV)/dev.stamp  ## how samplers follow the demand: docs/autoscaling.png
	$(BIN)/python -m load_tests.autoscaling

load: $(VENV)/dev.stamp  ## 3 minutes of users at the demo service: build/load/report.html; ARGS="--shape ramp --users 12"
	$(BIN)/python -m load_tests.run $(ARGS)

demo-scores: $(VENV)/run.stamp  ## how often the demo model does what it is asked: the README's table of scores
	$(BIN)/python -m helios_core.demo.evaluate

fidelity: $(VENV)/run.stamp  ## how near the approximate samplers come to the exact one, on the demo model
	$(BIN)/python -m helios_core.demo.fidelity --json benchmarks/fidelity.json

manifests: $(VENV)/run.stamp  ## what k8s has of each overlay's helios.yaml and of the table of metrics, made again
	for file in k8s/overlays/*/helios.yaml; do $(BIN)/helios config render --kustomize $$file || exit 1; done
	$(BIN)/helios config monitoring -o k8s/monitoring

# The tool has an environment of its own, lest it and what it needs be listed, or tested with.
sbom: $(VENV)/run.stamp  ## build/sbom.cdx.json: what is installed for running, with its licences; fails on unknown ones
	python3 -m venv build/cyclonedx
	build/cyclonedx/bin/pip install --quiet --disable-pip-version-check cyclonedx-bom==7.5.0
	build/cyclonedx/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible $(VENV) \
		| $(BIN)/python -m supply.sbom > build/sbom.cdx.json

# glibc must keep what was freed: without these, steps take twice as long.
demo-checkpoint: export MALLOC_MMAP_THRESHOLD_ = 33554432
demo-checkpoint: export MALLOC_TOP_PAD_ = 67108864
demo-checkpoint: export MALLOC_TRIM_THRESHOLD_ = 4294967296
demo-checkpoint: $(VENV)/run.stamp  ## the demo model from nothing, on two cores in at most 90 minutes
	$(BIN)/python -m helios_core.demo.train helios_core/demo/model

# Versions are those of constraints.txt. PyPI's torch for Linux brings gigabytes of CUDA libraries: for a machine without
# a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu takes the small build instead.
# Compiled here on all cores, by pip on one. It has to be: processes that may write nothing would compile at each start.
# What is not of this Python's syntax is left out, as pip does.
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
COMPILE = $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true

$(VENV)/run.stamp: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PIP) -e .
	$(COMPILE)
	touch $@

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(PIP) -e ".[dev]"
	$(COMPILE)
	touch $(VENV)/run.stamp $@  # who has these has those
