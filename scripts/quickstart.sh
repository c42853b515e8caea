#!/usr/bin/env bash
# The whole pipeline on real images, on any machine: 5,000 handwritten digits -> tokenizer -> codes -> GPT ->
# 1,000 samples -> metrics and pictures. Everything lands in quickstart/; finished steps are not done again.
case ${1:-} in
    "") ;;
    -h | --help) sed -n '2,3s/^# //p' "${BASH_SOURCE[0]}" && exit ;;
    *) echo "error: $1: quickstart.sh has no options" >&2 && exit 2 ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" requirements-dev.txt

step() { # step "what it does" FILE-IT-MAKES command...: run the command unless the file is there
    local title=$1 made=$2
    shift 2
    printf '\n=== %s\n' "$title"
    if [ -e "$made" ]; then
        echo "$made is there already"
    else
        printf '+ %s\n' "$*"
        "$@"
    fi
}

Q=quickstart
VQ=$Q/tokenizer/VQ-4-32/checkpoints/0000500.pt
GPT=$Q/gpt/GPT-T-4x-32/checkpoints/0001500.pt
SAMPLES=$Q/samples/GPT-T-0001500-size-32-size-32-VQ-4-topk-0-topp-0.6-temperature-1.0-cfg-2.5-seed-0.npz
started=$SECONDS

step "0/9 a first picture, by the small models of this repository" $Q/first.png \
    python autoregressive/sample/sample_c2i.py --model digits-4x --classes 0 1 2 3 4 5 6 7 8 9 --images-per-class 8 \
    --output $Q/first.png
echo "digits of a model trained before: $Q/first.png; what follows trains one from nothing"
step "1/9 digits: 400 of each class to train on, 100 held out" $Q/digits/test/9/499.png \
    python scripts/quickstart/digits.py --output $Q/digits
step "2/9 tokenizer: 32x32 images <-> 8x8 codes; pictures come after it" $VQ \
    bash scripts/tokenizer/train_vq.sh --data-path $Q/digits/train --cloud-save-path $Q/tokenizer --no-local-save \
    --vq-model VQ-4 --codebook-size 128 --image-size 32 --no-flip --epochs 1 --global-batch-size 8 --lr 2e-3 \
    --lr-schedule cosine --perceptual-weight 0 --disc-weight 0 --num-workers 1
step "3/9 reconstructions of held-out digits" $Q/reconstructions/VQ-4-0000500-size-32.npz \
    bash scripts/tokenizer/reconstruction_vq.sh --data-path $Q/digits/test --vq-ckpt $VQ \
    --image-size 32 --image-size-eval 32 --sample-dir $Q/reconstructions --num-workers 0
echo "images beside reconstructions: $Q/reconstructions/VQ-4-0000500-size-32.png"
step "4/9 codes of five crops of each digit" $Q/codes/meta.json \
    bash scripts/autoregressive/extract_codes_c2i.sh --vq-ckpt $VQ --data-path $Q/digits/train --code-path $Q/codes \
    --ten-crop --crop-range 1.1 --image-size 32 --no-flip --batch-size 100 --num-workers 1
step "5/9 GPT that predicts 4 codes at once" $GPT \
    bash scripts/autoregressive/train_c2i.sh --cloud-save-path $Q/gpt --no-local-save --code-path $Q/codes \
    --spe-token-num 3 --ar-token-num 4 --image-size 32 --gpt-model GPT-T --epochs 6 --global-batch-size 16 \
    --lr 2e-3 --warmup-epochs 1 --dropout-p 0 --attn-dropout-p 0 --token-dropout-p 0
step "6/9 1,000 samples" $SAMPLES \
    bash scripts/autoregressive/sample_c2i.sh --vq-ckpt $VQ --gpt-ckpt $GPT --spe-token-num 3 --ar-token-num 4 \
    --gpt-model GPT-T --image-size 32 --image-size-eval 32 --cfg-scale 2.5 --top-p 0.6 --num-fid-samples 1000 \
    --per-proc-batch-size 100 --sample-dir $Q/samples
step "7/9 picture of samples, a row per class" $Q/samples.png \
    python autoregressive/sample/sample_c2i.py --vq-ckpt $VQ --gpt-ckpt $GPT --classes 0 1 2 3 4 5 6 7 8 9 \
    --images-per-class 16 --cfg-scale 2.5 --top-k 0 --top-p 0.6 --output $Q/samples.png --trace --trace-frames 8
step "8/9 digit classifier, the feature network of the metrics" $Q/classifier.pt \
    python scripts/quickstart/train_classifier.py --data-path $Q/digits/train --test-path $Q/digits/test \
    --output $Q/classifier.pt --image-size 32 --epochs 6
for split in train test; do
    step "9/9 the real digits ($split) as reference" $Q/$split.npz \
        python scripts/images_to_npz.py --data-path $Q/digits/$split --image-size 32 --output $Q/$split.npz
done
step "9/9 metrics: samples, and held-out real digits, against the training digits" ${SAMPLES%.npz}.txt \
    python evaluations/c2i/evaluator.py $Q/train.npz $Q/test.npz $SAMPLES --feature-network $Q/classifier.pt

cat <<END

=== done in $((SECONDS - started)) s, $(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) cores
samples, a row per class:          $Q/samples.png
images beside reconstructions:     $Q/reconstructions/VQ-4-0000500-size-32.png
                                   samples of the GPT / held-out real digits
END
paste -d'|' ${SAMPLES%.npz}.txt $Q/test.txt | sed 's/|[^:]*:/  \//; s/^/  /'
