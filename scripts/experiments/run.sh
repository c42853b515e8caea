#!/usr/bin/env bash
# Run one experiment: bash scripts/experiments/run.sh e1 [--quick] [options; e1 --help lists them]
# What is done is not done again. Experiments: scripts/experiments/README.md
case ${1:-} in -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh" requirements-dev.txt

found=(scripts/experiments/"${1:-}"_*.py)
[ -n "${1:-}" ] && [ -e "${found[0]}" ] || {
    echo "error: first argument: one of $(cd scripts/experiments && ls e*_*.py | sed 's/_.*//' | paste -sd' ')" >&2 && exit 2
}
exec python "${found[0]}" "${@:2}"
