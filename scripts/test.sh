#!/usr/bin/env bash
# Install what is missing, then lint, types and all tests; options go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
set -x
python -m ruff check .
python -m ruff format --check .
python -m mypy
# files in the order of the tree: the longest, which trains the GPT, begins early
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
