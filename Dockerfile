# docker build -t fusedkd . && docker run --rm fusedkd doctor
#
# For CUDA: FROM nvidia/cuda:13.0.2-runtime-ubuntu24.04 on both lines, with python3-pip and
# python3-venv from apt, and no --index-url, for the index's own torch is the one for CUDA.
# (Not built by us: there was no Docker where this was written.)
FROM python:3.12-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11" && \
    pip install --no-cache-dir numpy "setuptools>=77" wheel ninja
WORKDIR /source
COPY pyproject.toml setup.py README.md LICENSE ./
COPY fusedkd fusedkd
COPY kernels kernels
COPY benchmarks benchmarks
COPY recipes recipes
COPY examples/configs examples/configs
RUN pip wheel --no-build-isolation --no-deps -w /wheels .

FROM python:3.12-slim
COPY --from=build /wheels /wheels
RUN pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11" && \
    pip install --no-cache-dir "$(ls /wheels/*.whl)[train]" && rm -r /wheels
RUN useradd --create-home user
USER user
WORKDIR /home/user
ENTRYPOINT ["fusedkd"]
CMD ["--help"]
