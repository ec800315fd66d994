# `make demo` and `make test` need Python 3.11 or later with venv, and git; everything else they fetch themselves.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test app format benchmark screenshots clean

demo: $(VENV)/installed
	$(LAUNCH) train_scripts/train_dreambooth_effilora.py --overwrite_output_dir

app: $(VENV)/installed-app
	$(BIN)/effilora app

test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/mypy --platform win32 --cache-dir .mypy_cache/win32 effilora_diffusion app
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.step_time --json outputs/step_time.json
	$(BIN)/python -m benchmarks.subject --json outputs/subject.json
	$(BIN)/python -m benchmarks.plain_lora --json outputs/plain_lora.json

screenshots: $(VENV)/installed-dev
	$(BIN)/python -m benchmarks.screenshots

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-app: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[app]'
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,benchmark]'
	command -v chromium || command -v chromium-browser || command -v google-chrome || $(BIN)/playwright install chromium
	touch $@

clean:
	rm -rf $(VENV) outputs
