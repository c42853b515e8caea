#!/usr/bin/env bash
# The released tokenizer goes on learning, on your images: GAN loss from the first step, a new discriminator.
#   usage: train_vq_finetune.sh --data-path IMAGES --cloud-save-path DIR   (later options win; all: --help)
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" tokenizer/train_vq.py \
    --finetune --disc-start 0 --vq-ckpt ./pretrained_models/vq_ds16_c2i.pt "$@"
