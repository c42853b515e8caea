#!/usr/bin/env bash
# Install what is missing, then lint, types and all tests; options go to pytest.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt
set -x
python -m ruff check .
python -m ruff format --check .
python -m mypy
python -m pytest -n 2 --dist loadfile "$@"
