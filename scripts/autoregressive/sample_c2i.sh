#!/usr/bin/env bash
# GPT -> images in one .npz; every option: sample_c2i.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" autoregressive/sample/sample_c2i_ddp.py "$@"
