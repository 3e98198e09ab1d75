# Everything starts from a bare clone: the virtual environment is made on first use.
VENV ?= .venv
BIN = $(VENV)/bin
PROMPT ?= a red sun over a blue sea, drifting left

.PHONY: demo serve test check format figures

demo: $(VENV)/run.stamp  ## start the service, stream one video into video.mp4, stop
	$(BIN)/helios demo "$(PROMPT)" -o video.mp4

serve: $(VENV)/run.stamp  ## serve the demo model on port 8000 until interrupted
	$(BIN)/helios serve

test: $(VENV)/dev.stamp  ## all tests
	$(BIN)/python -m pytest

check: $(VENV)/dev.stamp  ## formatting, lint, types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

format: $(VENV)/dev.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

figures: $(VENV)/dev.stamp  ## every measured figure of the README, measured again
	$(BIN)/python -m load_tests.figures

# torch is pinned, so that pip does not reach for the newest build with its gigabytes of CUDA.
$(VENV)/run.stamp: pyproject.toml constraints.txt
	python3 -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@
