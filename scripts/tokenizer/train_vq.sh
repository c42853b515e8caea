#!/usr/bin/env bash
# Images -> tokenizer; every option: train_vq.sh --help
# The defaults are those of vq_ds16_c2i.pt (published rFID 2.19 at 256x256); LPIPS needs VGG16's weights on disk.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" tokenizer/train_vq.py "$@"
