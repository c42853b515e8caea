#!/usr/bin/env bash
# The published commands at the published sizes (VQ-16, 384x384, 24x24 codes, ten crops) on four images with random
# weights in the released formats: shows that everything is in place before the real weights are downloaded.
set -euo pipefail
usage="usage: bash scripts/rehearsal.sh FOLDER_OF_CLASS_FOLDERS [--gpt-model SIZE] [options of training]
                                 [-- options of sampling]
  Writes rehearsal/, about 1 GB with GPT-B, the default size.
example: bash scripts/rehearsal.sh IMAGENET/train --gpt-model GPT-L --mixed-precision none -- --precision none"
case ${1:-} in
    -h | --help) echo "$usage" && exit ;;
    "" | -*) echo "$usage" >&2 && exit 2 ;;
esac
images=$(cd "$1" && pwd) || exit 2
shift
size=GPT-B training=() sampling=()
while [ $# -gt 0 ]; do
    case $1 in
        --gpt-model) size=${2:?--gpt-model: expected a size} && shift ;;
        --gpt-model=*) size=${1#*=} ;;
        --) shift && sampling=("$@") && break ;;
        *) training+=("$1") ;;
    esac
    shift
done

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements.txt
R=rehearsal
W=$R/weights
rm -rf $R

timed() { # run a command, then say its time and peak memory
    printf '\n+ %s\n' "$*"
    python - "$@" <<'END'
import resource, subprocess, sys, time
started = time.time()
code = subprocess.run(sys.argv[1:]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
print(f"= {time.time() - started:.0f} s, {peak:.1f} GiB at the peak")
sys.exit(code)
END
}

mkdir -p $R/images
for folder in $(find "$images" -mindepth 1 -maxdepth 1 -type d | sort | head -4); do
    mkdir "$R/images/$(basename "$folder")"
    cp "$(find "$folder" -type f | sort | head -1)" "$R/images/$(basename "$folder")/"
done
timed python scripts/random_weights.py --output $W --gpt-model "$size"
timed bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt $W/vq_ds16_c2i.pt --data-path $R/images \
    --code-path $R/codes --ten-crop --crop-range 1.1 --image-size 384
timed bash scripts/autoregressive/train_c2i.sh --cloud-save-path $R/cloud --results-dir $R/results \
    --code-path $R/codes --spe-token-num 3 --ar-token-num 4 --image-size 384 --gpt-model "$size" \
    --global-batch-size 2 --epochs 1 ${training[@]+"${training[@]}"}
timed bash scripts/autoregressive/sample_c2i.sh --vq-ckpt $W/vq_ds16_c2i.pt --gpt-ckpt "$W/PAR-${size#GPT-}-4x.pt" \
    --spe-token-num 3 --ar-token-num 4 --gpt-model "$size" --image-size 384 --image-size-eval 256 --cfg-scale 1.5 \
    --num-fid-samples 4 --per-proc-batch-size 4 --sample-dir $R/samples ${sampling[@]+"${sampling[@]}"}
timed python scripts/images_to_npz.py --data-path $R/images --output $R/reference.npz
timed python evaluations/c2i/evaluator.py $R/reference.npz $R/samples/*.npz \
    --inception-weights $W/random_inception.pth --allow-unknown-weights
