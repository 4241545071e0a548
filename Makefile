# Two commands for a fresh machine. Everything happens in .venv; the README shows the plain lines.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := $(shell find fastmim kernels csrc -type f -not -name '*.pyc' -not -name '*.so') \
	setup.py pyproject.toml CMakeLists.txt constraints.txt

.PHONY: demo test clean

demo: $(VENV)/installed
	$(BIN)/fastmim pretrain --output.name demo --resume never

test: $(VENV)/installed-for-tests
	$(BIN)/pytest -n auto --dist loadfile

$(VENV)/installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install -c constraints.txt .
	touch $@

$(VENV)/installed-for-tests: $(BIN)/python $(SOURCES)
	$(BIN)/pip install -c constraints.txt '.[test]'
	touch $(VENV)/installed $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build
