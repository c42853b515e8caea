#!/usr/bin/env bash
# Your own images, from a folder with one sub-folder of images per class, in a budget of minutes: tokenizer, codes,
# GPT, samples, metrics against held-out images. Prints each command before it runs it; the same command again resumes.
#
#   bash scripts/own_images.sh FOLDER [--budget MINUTES] [--size PIXELS] [--output DIR] [--no-flip]
#                              [--tokenizer FILE [--finetune]] [--seed N] [--dry-run]
#
#   --budget MINUTES   all stages together (default: 20)
#   --size PIXELS      side of the images to make (default: the largest that the budget allows)
#   --output DIR       where to write (default: results/own-images/ and the name of FOLDER)
#   --no-flip          do not mirror images: for text, digits, all that has a left and a right
#   --tokenizer FILE   use this tokenizer instead of training one; --finetune trains it further
#   --seed N           of the split, training and samples (default: 0)
#   --dry-run          print plan and commands, run nothing
case " ${*:-} " in
    "  " | *" -h "* | *" --help "*)
        usage=$(sed -n '/^# Your/,/^case/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}")
        [ $# -gt 0 ] && echo "$usage" && exit
        echo "$usage" >&2 && exit 2
        ;;
esac
from=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
# a budget of minutes is planned for one process; a machine with several GPUs may set nproc_per_node
export nproc_per_node=${nproc_per_node:-1}
stages=$(mktemp)
trap 'rm -f "$stages"' EXIT

nproc_per_node=1 bash "scripts/launch.sh" scripts/own_images/plan.py "$@" --relative-to "$from" --write-commands "$stages"
[ -s "$stages" ] || exit 0 # a dry run

while IFS=$'\t' read -r title made folder command <&3; do
    output=$folder
    printf '\n=== %s\n' "$title"
    if [ -e "$made" ]; then
        echo "$made is there already"
        continue
    fi
    printf '+ %s\n' "$command"
    eval "$command"
    [ -e "$made" ] || { echo "stopped before $made was written; the same command goes on from there" >&2 && exit 1; }
done 3< "$stages"

printf '\n=== done in %d minutes %d seconds\n' $((SECONDS / 60)) $((SECONDS % 60))
python scripts/own_images/report.py --output "$output" --seconds $SECONDS
