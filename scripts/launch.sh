#!/usr/bin/env bash
# Start a Python script with one process per GPU, or one on a machine without.
#   usage: launch.sh script.py [options of the script]
# From the environment: nnodes nproc_per_node node_rank master_addr master_port (as torchrun has them), and PYTHON.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    # a virtual environment made by quickstart.sh serves when no other is active
    if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi

if [ -z "${nproc_per_node:-}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        nproc_per_node=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c . || true)
    else
        nproc_per_node=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
    fi
    if [ "$nproc_per_node" -eq 0 ]; then nproc_per_node=1; fi
fi
nnodes=${nnodes:-1}

if ! command -v nvidia-smi >/dev/null; then
    # glibc returns every large buffer to the kernel at once; keeping them saves up to half the time on a CPU
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-1099511627776}
    # processes share the cores
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + nproc_per_node - 1) / nproc_per_node ))}
fi
if [ "$nnodes" = 1 ] && [ "$nproc_per_node" = 1 ]; then
    exec "$PYTHON" "$@"
fi
if [ "$nnodes" = 1 ] && [ -z "${master_addr:-}${master_port:-}" ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--node_rank "${node_rank:-0}" --master_addr "${master_addr:-127.0.0.1}" --master_port "${master_port:-12345}")
fi
exec "$PYTHON" -m torch.distributed.run --nnodes "$nnodes" --nproc_per_node "$nproc_per_node" "${rendezvous[@]}" "$@"
