#!/usr/bin/env bash
# Codes -> GPT; every option: train_c2i.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" autoregressive/train/train_c2i.py "$@"
