"""Several GPT training runs in one launch, by ``launch.sh -m tests.several_runs JSON``.

JSON: a list with the options of each run. Starting processes takes longer than small runs, so all
runs have the processes and the group of the first.
"""

import json
import sys

import torch.distributed as dist

from autoregressive.train import train_c2i

CONNECT = dist.init_process_group


def connect_once(*args: object, **named: object) -> None:
    if not dist.is_initialized():
        CONNECT(*args, **named)


dist.init_process_group = connect_once
for words in json.loads(sys.argv[1]):
    sys.argv = ["train_c2i.py", *words]
    train_c2i.main()
dist.destroy_process_group()
