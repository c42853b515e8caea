#!/usr/bin/env bash
# Images -> cached codes; every option: extract_codes_c2i.sh --help
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" autoregressive/train/extract_codes_c2i.py "$@"
