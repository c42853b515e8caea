#!/usr/bin/env bash
# Train the CIFAR-10 models of pretrained_models/small: bash scripts/small_models.sh CIFAR10/train [OUTPUT]
# CIFAR10/train has a folder per class with 5,000 images each, of which the last 500 are held out. Hours on a CPU; the
# same command goes on where it stopped, and finished steps are not done again.
case ${1:-} in -h | --help) sed -n '2,4s/^# //p' "${BASH_SOURCE[0]}" && exit ;; esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt

[ -d "${1:-}" ] || { echo "error: first argument: a folder with CIFAR-10's training images, a folder per class" >&2 && exit 2; }
IMAGES=$1 OUT=${2:-results/small}
VQ=$OUT/tokenizer/VQ-4-32/checkpoints/0002812.pt

[ -e "$OUT/images/held-out/truck" ] || python scripts/small_models/split.py --data-path "$IMAGES" --output "$OUT/images"
[ -e "$VQ" ] || bash scripts/tokenizer/train_vq.sh --data-path "$OUT/images/train" --cloud-save-path "$OUT/tokenizer" \
    --no-local-save --vq-model VQ-4 --codebook-size 1024 --codebook-init kmeans --image-size 32 --epochs 2 --global-batch-size 32 \
    --lr 1e-3 --lr-schedule cosine --perceptual-weight 0 --revive-dead-codes 100 --disc-start 2251 --disc-adaptive-weight \
    --ckpt-every 200 --keep-last 1 --num-workers 1
for split in train held-out; do
    [ -e "$OUT/codes-$split/meta.json" ] || bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt "$VQ" \
        --data-path "$OUT/images/$split" --code-path "$OUT/codes-$split" --ten-crop --crop-range 1.1 --image-size 32 \
        --batch-size 100 --num-workers 1
    [ -e "$OUT/$split.npz" ] || python scripts/images_to_npz.py --data-path "$OUT/images/$split" --image-size 32 \
        --output "$OUT/$split.npz"
done
[ -e "$OUT/classifier.pt" ] || python scripts/quickstart/train_classifier.py --data-path "$OUT/images/train" \
    --test-path "$OUT/images/held-out" --output "$OUT/classifier.pt" --image-size 32 --epochs 10
bash scripts/tokenizer/reconstruction_vq.sh --data-path "$OUT/images/held-out" --vq-ckpt "$VQ" --image-size 32 \
    --image-size-eval 32 --sample-dir "$OUT/reconstructions" --num-workers 0
for n in 4 1; do
    bash scripts/autoregressive/train_c2i.sh --cloud-save-path "$OUT/gpt" --no-local-save --code-path "$OUT/codes-train" \
        --val-code-path "$OUT/codes-held-out" --val-images 1000 --val-every 1000 --ar-token-num $n --spe-token-num $((n - 1)) \
        --image-size 32 --gpt-model GPT-T --epochs 6 --warmup-epochs 1 --global-batch-size 32 --lr 2e-3 --dropout-p 0 \
        --attn-dropout-p 0 --token-dropout-p 0 --ema --ckpt-every 500 --keep-last 1
    [ -e "$OUT/cifar10-${n}x" ] || python scripts/export_checkpoint.py --ema --bf16 --hub "$OUT/cifar10-${n}x" \
        --checkpoint "$OUT/gpt/GPT-T-${n}x-32/checkpoints/0008436"
    for scale in 1.0 1.5 2.0; do
        bash scripts/autoregressive/sample_c2i.sh --vq-ckpt "$VQ" --gpt-ckpt "$OUT/cifar10-${n}x" --num-fid-samples 5000 \
            --class-protocol balanced --cfg-scale $scale --per-proc-batch-size 100 --sample-dir "$OUT/samples"
    done
done
[ -e "$OUT/cifar10-tokenizer" ] || python scripts/export_checkpoint.py --checkpoint "${VQ%.pt}" --hub "$OUT/cifar10-tokenizer"
python evaluations/c2i/evaluator.py "$OUT/train.npz" "$OUT/held-out.npz" "$OUT"/reconstructions/*-32.npz "$OUT"/samples/*.npz \
    --feature-network "$OUT/classifier.pt"
for n in 4 1; do
    python autoregressive/sample/sample_c2i.py --vq-ckpt "$VQ" --gpt-ckpt "$OUT/cifar10-${n}x" --classes 0 1 2 3 4 5 6 7 8 9 \
        --images-per-class 16 --cfg-scale 3.0 --top-k 0 --top-p 0.9 --output "$OUT/cifar10-${n}x.png"
done
python scripts/small_models/report.py --output "$OUT"
