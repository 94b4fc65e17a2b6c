# syntax=docker/dockerfile:1
# One image for H100 clusters with two Python environments that share a driver, a kernel and nothing else:
#   /opt/r1mega  the trainer, on the base image's torch: megatron-core, Transformer Engine, Apex, NeMo-Run
#   /opt/sglang  the engine: SGLang, with the torch and transformers that it pins
# docker build -t r1mega .        enroot import -o r1mega.sqsh dockerd://r1mega:latest
# docs/cluster.md says what of it was checked, and that it was never built where it was written.

# Megatron-LM's own base for development in August 2026 (docker/.ngc_version.dev there). r1mega asks for torch 2.9 or newer; the torch of
# 25.10 calls itself 2.9.0a0, which pip takes for older than 2.9 and would replace.
ARG BASE=nvcr.io/nvidia/pytorch:26.08-py3

# ------------------------------------------------------------------------------------------------ what has to be compiled
FROM ${BASE} AS wheels
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# 9.0 is Hopper: no kernels are built for anything else.
ENV MAX_JOBS=16 TORCH_CUDA_ARCH_LIST=9.0 NVTE_CUDA_ARCHS=90 NVTE_FRAMEWORK=pytorch
# The newest version whose abilities megatron-core 0.19.2 asks about is 2.14.0. Its torch part is compiled against this very torch.
ARG TRANSFORMER_ENGINE=2.14.1
RUN pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels \
    "transformer-engine==${TRANSFORMER_ENGINE}" "transformer-engine-cu13==${TRANSFORMER_ENGINE}" "transformer-engine-torch==${TRANSFORMER_ENGINE}"
# NVIDIA's, whose last release is older than this torch: the newest commit of its main branch when this was written. The `apex` of the
# package index is another project. APEX_CUDA_EXT brings fused_weight_gradient_mlp_cuda, the one kernel that Megatron-Core calls here.
ARG APEX=6424da3b4faa6c8f062da4a48c424fff3f02d42d
RUN APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels \
    "git+https://github.com/NVIDIA/apex.git@${APEX}"

# ------------------------------------------------------------------------------------------------ the engine's environment
FROM ${BASE} AS engine
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The version whose protocol and weight names r1mega's tests hold against a real server (tools/install_sglang_cpu). It pins torch 2.14.1 and
# transformers 5.19.0 exactly, which is why it has an environment of its own. The base's constraints are for the base's torch.
ARG SGLANG=0.5.23
RUN python3 -m venv /opt/sglang && PIP_CONSTRAINT="" /opt/sglang/bin/pip install --no-cache-dir "sglang==${SGLANG}"

# ------------------------------------------------------------------------------------------------ the image
FROM ${BASE}
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# The sandbox in which code is judged. Its version is the distribution's: a sandbox wants security fixes more than it wants a pin.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends bubblewrap && rm -rf /var/lib/apt/lists/*

COPY --from=engine /opt/sglang /opt/sglang
# The line for Python 3.12, on which the second lane of tools/test runs the same tests as on 0.16.1.
ARG MEGATRON_CORE=0.19.2
# transformers as in tools/constraints-cpu.txt, NeMo-Run as the tests with a real Slurm use it, leptonai as far as NeMo-Run imports it.
# No nvidia-resiliency-ext: this megatron-core fails beside releases before 0.6, and the package index has 0.4.1.
ARG TRANSFORMERS=5.23.0
ARG NEMO_RUN=0.11.1
ARG LEPTONAI=0.27.0
COPY --from=wheels /wheels /tmp/wheels
COPY . /opt/src/r1mega
# `--system-site-packages` shows the base's torch; its constraints keep pip from replacing that, and name an older transformers.
RUN python3 -m venv --system-site-packages /opt/r1mega \
    && { grep --ignore-case --invert-match "^transformers" "${PIP_CONSTRAINT:-/dev/null}" || true; } >/tmp/constraints.txt \
    && PIP_CONSTRAINT=/tmp/constraints.txt /opt/r1mega/bin/pip install --no-cache-dir \
    /tmp/wheels/*.whl "megatron-core==${MEGATRON_CORE}" "transformers==${TRANSFORMERS}" "nemo-run==${NEMO_RUN}" "leptonai==${LEPTONAI}" \
    -e "/opt/src/r1mega[cluster,report,endpoint]" \
    && ln -s /opt/sglang /opt/src/r1mega/.venv-sglang \
    && rm -rf /tmp/wheels /tmp/constraints.txt

# Weights go from trainer to engine by CUDA IPC within a node, and by NCCL beyond it:
# - A CUDA IPC handle is opened under the same driver, in the same container and with the same devices visible, and points into memory
#   that cudaMalloc made: not into an expandable segment. The two versions of torch meet only in the bytes of the handle.
# - An NCCL communicator wants one version of NCCL on all its ranks. The base and SGLang's torch bring one each, so for
#   transport=distributed one of them is preloaded on the other's side (LD_PRELOAD); transport=tensor, the default, needs neither.
ENV PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False \
    PATH=/opt/r1mega/bin:${PATH} \
    HF_HUB_OFFLINE=1

# 1000 is the first user of most clusters; pyxis and enroot map whoever submits.
RUN useradd --create-home --uid 1000 --non-unique r1mega
USER 1000
WORKDIR /home/r1mega
# Without two ranks: a check must not take GPUs from a run.
HEALTHCHECK --interval=10m --timeout=2m CMD ["r1mega", "doctor", "--quick"]
CMD ["r1mega", "doctor"]
