#!/usr/bin/env bash
# Start a Python script with one process per GPU, or one on a machine without.
#   usage: launch.sh script.py [options of the script]
# From the environment: PYTHON, and torchrun's nnodes nproc_per_node node_rank master_addr master_port, or
# rdzv_endpoint=HOST:PORT (and rdzv_id) instead of the last three; max_restarts: how often to start again, with all
# processes, after one has died.
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
    # weights read once a step run into the page tables before the memory's speed: 2 MiB pages are 5-10% faster
    export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
    # a thread that waits at a barrier gives its core up after microseconds instead of milliseconds: costs 3% on an idle
    # machine, and two programs at once took 10 times as long without it
    export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-5000}
    # processes share the cores that they may run on
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(( ($(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) + nproc_per_node - 1) / nproc_per_node ))}
fi
max_restarts=${max_restarts:-0}
case " $* " in *" --help "*|*" -h "*) nnodes=1 nproc_per_node=1 max_restarts=0 ;; esac  # one answer is enough
if [ "$nnodes" = 1 ] && [ "$nproc_per_node" = 1 ] && [ "$max_restarts" = 0 ]; then
    exec "$PYTHON" "$@"
fi
# torchrun hands these signals on, and waits so many seconds for a checkpoint to be written before it kills
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-600}
# a fresh store for each restart: in a shared one processes find the addresses of those that died (torch 2.14)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
if [ -n "${rdzv_endpoint:-}" ]; then
    rendezvous=(--rdzv_backend c10d --rdzv_id "${rdzv_id:-par}" --rdzv_endpoint "$rdzv_endpoint")
elif [ "$nnodes" = 1 ] && [ -z "${master_addr:-}${master_port:-}" ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--node_rank "${node_rank:-0}" --master_addr "${master_addr:-127.0.0.1}" --master_port "${master_port:-12345}")
fi
exec "$PYTHON" -c "from utils.launcher import main; main()" --nnodes "$nnodes" --nproc_per_node "$nproc_per_node" \
    --max_restarts "$max_restarts" "${rendezvous[@]}" "$@"
