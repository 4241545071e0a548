# Two commands for a fresh machine. Everything happens in .venv; the README shows the plain lines.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test clean

demo: $(BIN)/python
	$(BIN)/pip install -c constraints.txt .
	$(BIN)/fastmim pretrain --output.name demo --resume never

test: $(BIN)/python
	$(BIN)/pip install -c constraints.txt '.[test]'
	$(BIN)/pytest -n auto --dist loadfile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build
