# Every target makes .venv itself: one stamp file, renewed when the pinned requirements change.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/installed
SITE := _build/html/index.html
PORT ?= 8000
TESTS ?= tests qlib

.PHONY: book test serve bench gpu lint clean
.DELETE_ON_ERROR:

# Execute what is stale (FRESH=1: everything), build the site, say where it is.
book: $(STAMP)
	$(PY) tools/nbrun.py $(if $(FRESH),--force)
	$(PY) tools/build_site.py

# Unit, property, documentation and kernel tests; then every notebook is recomputed and compared.
test: $(STAMP)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist loadfile $(TESTS)
	$(PY) tools/nbtest.py

$(SITE): | $(STAMP)
	$(MAKE) book

# Open the site in a browser; Ctrl-C stops.
serve: $(SITE)
	$(PY) tools/build_site.py --serve $(PORT)

# Beside other libraries, in one run: speed of formats, of ggml's blocks, of products with packed weights, then quality and
# speed of methods. The last takes an hour or two and 6 GB for the peers; METHODS="--bits 4 --group 128 --only GPTQ" measures
# a part of it.
bench: $(VENV)/bench
	$(PY) tools/bench.py
	$(PY) tools/bench_ggml.py
	$(PY) tools/bench_kernels.py --json
	$(PY) tools/bench_attention.py --json
	$(PY) tools/bench_methods.py $(METHODS)
	$(PY) tools/bench_activations.py

# The tests that need an NVIDIA GPU, then speeds, to book/results/gpu_<card>.json: less than nine minutes together.
gpu: $(STAMP)
	@$(PY) -c "import sys, torch; torch.cuda.is_available() or sys.exit('make gpu: torch sees no CUDA device')"
	@start=$$(date +%s); status=0; \
	timeout 240 $(PY) -m pytest -q -n 4 tests/gpu || status=1; \
	$(PY) tools/bench_gpu.py --seconds $$((490 - $$(date +%s) + start)) || status=1; \
	exit $$status

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) tools/nbcheck.py
	$(PY) tools/nbrun.py --check

# Everything that can be made again; the environment stays (remove .venv to renew it too).
clean:
	rm -rf _build build dist *.egg-info site_static/vendor site_static/scripts
	rm -rf .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*/*' -prune -exec rm -rf {} +

$(STAMP): requirements.txt requirements-model.txt pyproject.toml tools/setup_env.py
	@command -v $(PYTHON) >/dev/null || { echo "make: no $(PYTHON) here; install Python 3.10 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) tools/setup_env.py
	@touch $@

$(VENV)/bench: $(STAMP) requirements-bench.txt
	$(PY) -m pip install -qq -c requirements.txt -r requirements-bench.txt
	@touch $@
