"""Options of the evaluator and of sweeps."""

from __future__ import annotations

from argparse import Namespace

from utils.options import make_parser, positive_int


def parse_args(description: str) -> Namespace:
    """Parse the evaluator's command line."""
    parser = make_parser(
        description,
        "python3 evaluations/c2i/evaluator.py VIRTUAL_imagenet256_labeled.npz samples/samples.npz",
        arguments="REF SAMPLES...",
    )
    parser.add_argument(
        "reference", metavar="REF", nargs="?", help="reference: .npz or folder of images"
    )
    parser.add_argument(
        "samples", metavar="SAMPLES", nargs="*", help="one or more sets of samples: .npz or folder"
    )

    group = parser.add_argument_group("feature network")
    text = (
        "weights of the 2015 Inception, .pb or .pth "
        "(default: a published file in pretrained_models/)"
    )
    group.add_argument("--inception-weights", metavar="FILE", help=text)
    text = "accept Inception weights whose size or sha256 is not a published one"
    group.add_argument("--allow-unknown-weights", action="store_true", help=text)
    text = "download the Inception weights to pretrained_models/ if they are missing"
    group.add_argument("--download", action="store_true", help=text)
    text = (
        "file of a small classifier (scripts/quickstart/train_classifier.py) "
        "to use instead of Inception"
    )
    group.add_argument("--feature-network", metavar="FILE", help=text)
    text = (
        "check weights, resize, network and formulas against stored values; "
        "makes REF and SAMPLES optional"
    )
    group.add_argument("--self-check", action="store_true", help=text)

    group = parser.add_argument_group("numerics")
    text = "compute Precision and Recall with float32 distances instead of the published float16"
    group.add_argument("--exact-distances", action="store_true", help=text)
    text = (
        "how FID takes its matrix square root: from eigenvalues, or by scipy as published "
        "(slower, equal to 1e-9)"
    )
    group.add_argument("--frechet", choices=["symmetric", "sqrtm"], default="symmetric", help=text)

    group = parser.add_argument_group("additional metrics")
    group.add_argument(
        "--kid",
        action="store_true",
        help="compute KID: mean and standard deviation over 100 subsets",
    )
    text = "compute FD-DINOv2 with this file of timm's DINOv2 ViT-L/14 weights"
    group.add_argument("--dinov2", metavar="FILE", help=text)
    group.add_argument(
        "--class-fid",
        action="store_true",
        help="compute FID within each class; both sets need labels",
    )
    text = "compute a 95%% interval of FID from this many bootstrap resamplings of the samples"
    group.add_argument("--bootstrap", type=positive_int, metavar="DRAWS", help=text)
    text = (
        "compute PSNR and SSIM between image i of SAMPLES and image i of REF, for tokenizers "
        "(FID is then rFID)"
    )
    group.add_argument("--paired", action="store_true", help=text)

    group = parser.add_argument_group("execution")
    group.add_argument(
        "--batch-size", type=positive_int, default=64, help="images per forward pass"
    )
    text = "compile the feature network with torch.compile; pays off from about 10,000 images"
    group.add_argument("--compile", action="store_true", help=text)
    group.add_argument(
        "--device",
        help="device to run on: cpu, cuda, cuda:1 or mps (default: the fastest available)",
    )
    text = "do not cache the features of the reference in a file beside it"
    group.add_argument("--no-cache", action="store_true", help=text)

    group = parser.add_argument_group("output")
    text = "JSON file for metrics, options and environment, with a .txt of the metrics beside it "
    text += "(default: SAMPLES.metrics.json)"
    group.add_argument("--output", metavar="JSON", help=text)
    text = "write the metrics as a Markdown table to this file, one row per SAMPLES"
    group.add_argument("--markdown", metavar="FILE", help=text)
    return parser.parse_args()


def parse_sweep_args(description: str) -> Namespace:
    """Parse the sweep's command line."""
    parser = make_parser(
        description,
        "python3 evaluations/c2i/sweep.py VIRTUAL_imagenet256_labeled.npz --cfg-scales 1.35 1.5 "
        "1.65 \\\n"
        '    --sample "--gpt-ckpt GPT.pt --vq-ckpt VQ.pt --image-size-eval 256" --output sweep',
    )
    parser.add_argument(
        "reference", metavar="REF", help="reference for the evaluator: .npz or folder of images"
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cfg-scales", type=float, nargs="+", help="guidance scales to evaluate")
    what.add_argument(
        "--vary",
        nargs="+",
        metavar=("OPTION", "VALUE"),
        help="any other option of sample_c2i.sh, without dashes, and its values, such as: "
        "temperature-end 0.7 0.85 1, or cfg-schedule constant linear",
    )
    parser.add_argument(
        "--sample",
        required=True,
        metavar="OPTIONS",
        help="options for sample_c2i.sh, as one string",
    )
    parser.add_argument(
        "--evaluate", metavar="OPTIONS", help="options for evaluator.py, as one string"
    )
    parser.add_argument("--output", default="sweep", help="folder for samples, metrics and plot")
    return parser.parse_args()
