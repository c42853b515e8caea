#!/usr/bin/env bash
# A page to play with, by the small models of this repository: bash scripts/demo.sh, then open http://127.0.0.1:7860/.
# Options go to autoregressive/sample/demo.py (--help lists them).
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
exec python autoregressive/sample/demo.py "$@"
