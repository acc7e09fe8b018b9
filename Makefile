# Two commands need nothing but Python 3.10 to 3.14 and make:
#   make demo   sets everything up, then compiles the digits model and draws with it (out/demo)
#   make test   sets everything up, then runs the tests
# Another Python: make PYTHON=python3.12 demo (an existing .venv keeps its own; `make clean` removes it)

PYTHON ?= python3
VENV := .venv
# Holds while what is installed is what pyproject.toml asks for.
STAMP := $(VENV)/.installed

.PHONY: demo test quick check venv clean

demo: $(STAMP)
	$(VENV)/bin/mezzotint demo -o out/demo

# Two workers, one file each at a time, one thread per torch call: the same on every machine, and no more than two cores.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10 $(PYTEST_ARGS)

# The loop while editing: what needs no torch and no browser, and is not slow; under a minute on two cores.
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --quick -q $(PYTEST_ARGS)

check: $(STAMP)
	tools/check

venv: $(STAMP)

$(STAMP): pyproject.toml tools/setup_venv.py
	@$(PYTHON) tools/setup_venv.py $(VENV)
	@touch $@

clean:
	rm -rf $(VENV) out build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
