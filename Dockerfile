# trl_fdfo on a GPU machine with NVIDIA's container toolkit:
#   docker build -t trl_fdfo .
#   docker run --gpus all --ipc=host -it -v "$HOME/.cache/huggingface:/root/.cache/huggingface" -v "$PWD/outputs:/runs/outputs" trl_fdfo \
#       trl-fdfo train --config sd35_24gb
FROM python:3.12-slim-bookworm

# A compiler builds DeepSpeed's and torch.compile's kernels when they are first used.
# Debian removes old versions of a package, so a pinned one would not build for long.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ git ninja-build \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /src
COPY . .
# torch first, in the build for CUDA that its wheel on PyPI is, at the version of the constraints.
RUN pip install --no-cache-dir -c constraints.txt torch \
    && pip install --no-cache-dir -c constraints.txt ".[deepspeed,examples,human,quantization]"

WORKDIR /runs
CMD ["trl-fdfo", "--help"]
