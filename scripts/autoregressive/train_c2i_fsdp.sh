#!/usr/bin/env bash
# Codes -> GPT with sharded weights; train_c2i.sh with another --data-parallel. Every option: --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/train_c2i.sh" --data-parallel fsdp "$@"
