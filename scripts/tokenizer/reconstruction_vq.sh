#!/usr/bin/env bash
# Images -> reconstructions, PSNR, SSIM, LPIPS, codebook usage, a picture; every option: reconstruction_vq.sh --help
# Published for vq_ds16_c2i.pt on ImageNet's validation images at 256x256: rFID 2.19.
exec bash "$(dirname "${BASH_SOURCE[0]}")/../launch.sh" tokenizer/reconstruct_vq.py "$@"
