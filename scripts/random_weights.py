"""Write files in the released formats with random weights: to rehearse the commands before
downloading the real ones.

OUTPUT gets vq_ds16_c2i.pt (key "model"), PAR-<size>-<n>x.pt (key "model", an argparse.Namespace
under "args") and random_inception.pth (a bare state dict, for the evaluator's --inception-weights
with --allow-unknown-weights).
"""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from autoregressive.models.config import GPT_models
from utils.options import answer_early, make_parser, positive_int, run_main


def parse_args() -> Namespace:
    """Parse the command line."""
    parser = make_parser(
        __doc__, "python3 scripts/random_weights.py --output rehearsal/weights --gpt-model GPT-B"
    )
    parser.add_argument("--output", required=True, help="folder to write to")
    parser.add_argument("--gpt-model", choices=list(GPT_models), default="GPT-B", help="size")
    parser.add_argument(
        "--ar-token-num", type=positive_int, default=4, help="tokens predicted at once, n"
    )
    return parser.parse_args()


if __name__ == "__main__":
    answer_early(parse_args)

import torch

from autoregressive.models.config import GPTConfig
from autoregressive.models.gpt import GPT
from evaluations.c2i.inception import Inception2015
from tokenizer.vq_model import VQModel, make_vq_config
from utils.checkpoints.weights_file import save_checkpoint


def main() -> None:
    """Fill and write the three."""
    args = parse_args()
    output = Path(args.output)
    torch.manual_seed(0)
    vq = VQModel(make_vq_config("VQ-16"))
    vq.init_weights()
    save_checkpoint({"model": vq.state_dict()}, output / "vq_ds16_c2i.pt")
    gpt = GPT(GPTConfig(**GPT_models[args.gpt_model], ar_token_num=args.ar_token_num))
    gpt.init_weights()
    torch.nn.init.normal_(gpt.output.weight, std=0.02)
    name = f"PAR-{args.gpt_model.removeprefix('GPT-')}-{args.ar_token_num}x.pt"
    save_checkpoint(
        {"model": gpt.state_dict(), "args": Namespace(gpt_model=args.gpt_model)}, output / name
    )
    save_checkpoint(Inception2015().state_dict(), output / "random_inception.pth")
    print(f"{output}: {', '.join(p.name for p in sorted(output.iterdir()))}")


if __name__ == "__main__":
    run_main(main)
