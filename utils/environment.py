"""What made an output: its options, versions and machine, as JSON beside it."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

from utils.files import write_json
from utils.options import git_revision
from utils.precision import cpu_name


def write_options(path: str | Path, args: argparse.Namespace, **facts: object) -> None:
    """Write the resolved options, what made them, and ``facts`` as JSON."""
    environment = {
        "command": " ".join(sys.argv),
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "git": git_revision(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or "cpu",
        "PAR_CPU": cpu_name(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
    }
    write_json(path, {"options": vars(args), **facts, "environment": environment})
