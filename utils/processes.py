"""Which processes live."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from functools import cache
from pathlib import Path


@cache
def machine() -> str:
    """Return what makes process ids unique: host and, on Linux, boot and process namespace."""
    parts = [platform.node()]
    with suppress(OSError):  # not Linux
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        parts += [boot, os.readlink("/proc/self/ns/pid")]
    return "/".join(parts).replace(" ", "_")


def has_ended(pid: int) -> bool:
    """Return whether no process ``pid`` runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    try:  # dead, but its parent has not asked for its exit status; elsewhere than on Linux unknown
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (OSError, IndexError):
        return False
