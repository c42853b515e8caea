"""Options of the tokenizer's trainer."""

from __future__ import annotations

from argparse import BooleanOptionalAction, Namespace

from tokenizer.config import VQ_models
from utils.options import (
    add_retired,
    fraction,
    make_parser,
    non_negative_float,
    non_negative_int,
    positive_int,
)
from utils.training.options import (
    LR_SCHEDULES,
    add_optimizer_options,
    add_output_options,
    add_precision_option,
)

# names of what vq_loss.py and discriminator.py hold, which need torch
PIXEL_LOSSES = ("l1", "l2")
DISCRIMINATORS = ("patchgan", "stylegan")
DISCRIMINATOR_LOSSES = ("hinge", "vanilla", "non-saturating")
GENERATOR_LOSSES = ("hinge", "non-saturating")


def parse_args(description: str) -> Namespace:
    """Parse the options; names and defaults are those of the published script."""
    parser = make_parser(
        description,
        "bash scripts/tokenizer/train_vq.sh --data-path IMAGENET/train "
        "--cloud-save-path DIR --image-size 256",
    )
    data = parser.add_argument_group("data")
    data.add_argument(
        "--data-path", required=True, help="folder with one sub-folder of images per class"
    )
    data.add_argument(
        "--data-face-path", help="second folder of class folders, added to --data-path"
    )
    data.add_argument(
        "--image-size", type=positive_int, default=256, help="side of the training crops, pixels"
    )
    data.add_argument(
        "--no-flip", action="store_true", help="do not mirror images (for text or digits)"
    )
    data.add_argument(
        "--num-workers",
        type=non_negative_int,
        default=16,
        help="processes that read images, at most the share of cores of a rank",
    )
    model = parser.add_argument_group("model")
    model.add_argument(
        "--vq-model", choices=list(VQ_models), default="VQ-16", help="size of the tokenizer"
    )
    model.add_argument(
        "--vq-ckpt",
        help="file of weights to start from, released or exported; or the folder of a training "
        "checkpoint to resume from if the run has no checkpoint yet",
    )
    model.add_argument(
        "--finetune",
        action="store_true",
        help="start at step 0 from the weights of --vq-ckpt; a checkpoint folder's "
        "discriminator included",
    )
    model.add_argument(
        "--codebook-size", type=positive_int, help="codebook entries (default: those of --vq-model)"
    )
    model.add_argument(
        "--codebook-embed-dim", type=positive_int, help="width of a codebook entry (default: 8)"
    )
    model.add_argument(
        "--codebook-l2-norm",
        action=BooleanOptionalAction,
        default=True,
        help="scale codebook entries and latents to unit length",
    )
    model.add_argument("--dropout-p", type=fraction, default=0.0, help="dropout in residual blocks")
    model.add_argument(
        "--codebook-init",
        choices=["uniform", "data", "kmeans"],
        default="uniform",
        help="how a new codebook starts. uniform: random, as published; data: encoder outputs of "
        "the first images; kmeans: k-means centres of these",
    )
    model.add_argument(
        "--revive-dead-codes",
        type=non_negative_int,
        default=0,
        help="every so many steps, move entries unused in the last 65,536 codes to current "
        "encoder outputs; 0: never",
    )
    loss = parser.add_argument_group("loss")
    loss.add_argument(
        "--reconstruction-loss",
        choices=PIXEL_LOSSES,
        default="l2",
        help="loss between pixels",
    )
    loss.add_argument(
        "--reconstruction-weight",
        type=non_negative_float,
        default=1.0,
        help="weight of the pixel loss",
    )
    loss.add_argument(
        "--codebook-weight",
        type=non_negative_float,
        default=1.0,
        help="weight of the quantizer's losses",
    )
    loss.add_argument(
        "--commit-loss-beta",
        type=non_negative_float,
        default=0.25,
        help="weight of the commitment loss within the quantizer's losses",
    )
    loss.add_argument(
        "--entropy-loss-ratio",
        type=non_negative_float,
        default=0.0,
        help="weight of the entropy loss within the quantizer's losses",
    )
    loss.add_argument(
        "--perceptual-weight",
        type=non_negative_float,
        default=1.0,
        help="weight of the LPIPS loss; 0 disables it",
    )
    loss.add_argument(
        "--vgg-weights",
        help="torchvision's vgg16-397923af.pth, the network of LPIPS (default: torch.hub's copy)",
    )
    gan = parser.add_argument_group("GAN loss")
    gan.add_argument(
        "--disc-weight",
        type=non_negative_float,
        default=0.5,
        help="weight of the GAN loss; 0 trains without a discriminator",
    )
    gan.add_argument(
        "--disc-start",
        type=non_negative_int,
        default=20000,
        help="first step with the GAN loss, counted from 1",
    )
    gan.add_argument(
        "--disc-type",
        choices=DISCRIMINATORS,
        default="patchgan",
        help="architecture of the discriminator",
    )
    gan.add_argument(
        "--disc-loss",
        choices=DISCRIMINATOR_LOSSES,
        default="hinge",
        help="GAN loss of the discriminator",
    )
    gan.add_argument(
        "--gen-loss",
        choices=GENERATOR_LOSSES,
        default="hinge",
        help="GAN loss of the tokenizer",
    )
    gan.add_argument(
        "--disc-adaptive-weight",
        action="store_true",
        help="also weight the GAN loss by the ratio of gradients at the "
        "decoder's last layer (VQGAN)",
    )
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, default=40, help="passes over the images")
    training.add_argument(
        "--global-batch-size",
        type=positive_int,
        default=128,
        help="images per step, of all processes",
    )
    training.add_argument("--lr", type=non_negative_float, default=1e-4, help="learning rate")
    training.add_argument(
        "--lr-schedule",
        choices=LR_SCHEDULES,
        default="constant",
        help="learning rate over the steps; cosine ends at 0",
    )
    add_precision_option(training, ["none", "fp16", "bf16"])
    training.add_argument("--compile", action="store_true", help="torch.compile the tokenizer")
    add_optimizer_options(parser)
    add_output_options(parser, "results_tokenizer_image")
    add_retired(
        parser,
        {
            "--dataset": (True, "any folder of class folders is read the same way"),
            "--no-wandb": (False, "curves go to Weights & Biases only with --wandb-project"),
        },
    )
    return parser.parse_args()
