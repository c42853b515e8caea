#!/usr/bin/env bash
# Images -> reconstructions and PSNR; every option: reconstruction_vq.sh --help
nproc_per_node=1 exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" tokenizer/reconstruct_vq.py "$@"
