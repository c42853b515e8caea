#!/usr/bin/env bash
# Images -> tokenizer; every option: train_vq.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" tokenizer/train_vq.py "$@"
