"""Files on huggingface.co: released weights, and models in the hub's form (a folder with
config.json and model.safetensors). Nothing is fetched unless an option asks for it.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import sys
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from utils.files import require_file
from utils.logger import progress_of_bytes
from utils.presets import RELEASED_FILES

HUB_PREFIX = "hf:"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
BLOCK = 1 << 20


def released_url(name: str) -> str:
    """Return where the released file of this name is kept; HF_ENDPOINT may name a mirror."""
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{endpoint}/{RELEASED_FILES[name]}/resolve/main/{name}"


def fetch_released(path: str | Path, option: str, allowed: bool) -> None:
    """Download ``path`` if it is missing and has the name of a released file.

    allowed: whether ``--download`` was given; if not, a ``ValueError`` says where the file is.
    """
    path = Path(path)
    if path.name not in RELEASED_FILES or path.exists():
        return
    url = released_url(path.name)
    if not allowed:
        raise ValueError(f"{option}: {path} does not exist; --download fetches it from {url}")
    print(f"downloading {url} to {path}", file=sys.stderr)
    try:
        download(url, path)
    except (OSError, HTTPException) as error:
        raise ValueError(
            f"{option}: {url} cannot be downloaded: {error}; the same command goes on"
        ) from error


def download(url: str, path: Path) -> None:
    """Download ``url`` to ``path``, which appears once it is whole; what an interrupted download
    left in ``path``.part is not fetched again. Raises ``OSError``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with open(part, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not while another process writes it
        start = file.tell()
        request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        try:
            response = urlopen(request, timeout=60)
        except HTTPError as error:
            # asked for bytes from its end on, the server says so with the size: nothing is missing
            if error.code != 416 or error.headers.get("Content-Range") != f"bytes */{start}":
                raise
            response = None
        if response is not None:
            with response:
                if response.status != 206:  # the server sends the whole file
                    file.truncate(start := 0)
                size = start + int(response.headers["Content-Length"])
                if shutil.disk_usage(path.parent).free < size - start:
                    raise OSError(f"{path.parent} has too little space for {size:,} bytes")
                with progress_of_bytes(path.name, size, start) as bar:
                    while block := response.read(BLOCK):
                        bar.update(file.write(block))
            if file.tell() != size:
                raise OSError(f"the connection was lost after {file.tell():,} of {size:,} bytes")
        os.fsync(file.fileno())
        os.replace(part, path)


def weights_path(path: str | Path | None, option: str, hint: str = "") -> Path:
    """Return the file of weights that an option names: a file, a folder in the hub's form, or
    ``hf:OWNER/NAME``, which the package huggingface_hub keeps in its cache.

    Raises ``ValueError`` naming ``option`` if there is no such file.
    """
    if isinstance(path, str) and path.startswith(HUB_PREFIX):
        return _hub_file(path.removeprefix(HUB_PREFIX), option)
    if path is not None and (Path(path) / CONFIG_FILE).is_file():
        return require_file(Path(path) / WEIGHTS_FILE, option)
    return require_file(path, option, hint)


def _hub_file(repo: str, option: str) -> Path:
    """Download config and weights of a repository and return the path of the weights."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", repo):
        raise ValueError(f"{option}: hf:{repo} is not of the form hf:OWNER/NAME")
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise ValueError(
            f"{option}: hf:{repo} needs the package huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        hf_hub_download(repo, CONFIG_FILE)
        return Path(hf_hub_download(repo, WEIGHTS_FILE))
    except Exception as error:  # its own, httpx' and the disk's
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{option}: hf:{repo} cannot be downloaded: {reason}") from error
