"""Options of scripts that use a tokenizer."""

from __future__ import annotations

from argparse import Namespace, _ArgumentGroup

from tokenizer.vq_model import VQ_models, VQModel, load_vq
from utils.options import positive_int


def add_tokenizer_options(group: _ArgumentGroup, required: bool = True) -> None:
    """Add the options selecting a tokenizer; all but the file are optional."""
    group.add_argument("--vq-ckpt", required=required, help="tokenizer checkpoint, released or trained here")
    group.add_argument(
        "--vq-model", choices=list(VQ_models), help="size of the tokenizer (default: the checkpoint's, else VQ-16)"
    )
    group.add_argument(
        "--codebook-size", type=positive_int, help="codebook entries (default: the checkpoint's, else the size's)"
    )
    group.add_argument(
        "--codebook-embed-dim", type=positive_int, help="width of a codebook entry (default: the checkpoint's, else 8)"
    )


def load_tokenizer(args: Namespace) -> tuple[VQModel, str]:
    """Load the tokenizer that the options select, see ``load_vq``; sets what ``args`` leaves to its checkpoint."""
    vq, name = load_vq(
        args.vq_ckpt, args.vq_model, codebook_size=args.codebook_size, codebook_embed_dim=args.codebook_embed_dim
    )
    args.vq_model, args.codebook_size = name, vq.config.codebook_size
    args.codebook_embed_dim = vq.config.codebook_embed_dim
    return vq, name
