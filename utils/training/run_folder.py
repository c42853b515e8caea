"""A run's folder and its checkpoints: written aside and renamed, copied to the durable place,
pruned, resumed.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
import uuid
from argparse import Namespace
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from utils.checkpoints.folder import (
    CHECKPOINT_NAME,
    check_bytes,
    is_old,
    load_sharded,
    read_contents,
    read_meta,
    save_sharded,
    write_meta,
)
from utils.checkpoints.weights_file import export_checkpoint
from utils.distributed import TIMEOUT, World
from utils.files import prepare_folder, readable_size, remove_temporary
from utils.lock import hold
from utils.options import git_revision
from utils.training.state import TrainingState


@dataclass
class RunFolder:
    """Logs and options in ``folder``, checkpoints (``0005000/``) in each of ``checkpoint_folders``.

    The name is a function of the options, so the same command finds its checkpoints again and
    resumes. With several machines all of it must be on a disk that they share. ``keep_last`` newest
    checkpoints are kept, and those of every multiple of ``keep_every`` steps (0: none).
    """

    world: World
    folder: Path
    checkpoint_folders: tuple[Path, ...]
    keep_last: int
    keep_every: int
    notes: list[str] = field(default_factory=list)  # for the log, once there is one
    _resumed: Path | None = None
    _damaged: set[Path] = field(default_factory=set)  # found by their bytes
    _pending: Future | None = None
    _group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, args: Namespace, world: World, name: str) -> RunFolder:
        """Folders of ``args``: local results with a durable copy, or only the durable place."""
        cloud = Path(args.cloud_save_path) / name
        folder = cloud if args.no_local_save else Path(args.results_dir) / name
        places = dict.fromkeys(p.absolute() / "checkpoints" for p in (folder, cloud))
        return cls(world, folder, tuple(places), args.keep_last, args.keep_every)

    def hold(self) -> None:
        """Keep other runs out of the folders; ``ValueError`` if one is in them."""
        for folder in dict.fromkeys((self.folder, *(p.parent for p in self.checkpoint_folders))):
            if self.world.is_main:
                prepare_folder(folder, "--cloud-save-path or --results-dir")
            self.world.barrier()
            hold(folder / ".lock", self.world, str(folder))

    def make(self) -> None:
        """Create the folders early; ``ValueError`` if that fails or machines do not share them."""
        token = self.world.broadcast(uuid.uuid4().hex)
        if self.world.is_main:
            for folder in (self.folder, *self.checkpoint_folders):
                prepare_folder(folder, "--cloud-save-path or --results-dir")
            for folder in self.checkpoint_folders:
                for leftover in folder.glob("*.tmp"):
                    shutil.rmtree(leftover)
                for leftover in folder.glob(".*"):  # of a run killed further down
                    if re.fullmatch(r"\.[0-9a-f]{32}", leftover.name):
                        leftover.unlink()
                (folder / f".{token}").touch()
        self.world.barrier()
        for folder in self.checkpoint_folders:
            for _ in range(5):
                if (folder / f".{token}").exists():
                    break
                time.sleep(1)
            else:
                raise ValueError(
                    f"rank {self.world.rank} does not see what rank 0 writes to {folder}: with "
                    "several machines it must be on a disk that they share; --no-local-save leaves "
                    "--cloud-save-path as the only place"
                )
        self.world.barrier()
        if self.world.is_main:
            for folder in self.checkpoint_folders:
                (folder / f".{token}").unlink()
            while newest := self.newest():
                try:
                    self._mirror(newest)
                    if newest == self._resumed:  # its bytes are whole: none before it is needed
                        for folder in self.checkpoint_folders:
                            self._prune(folder)
                    break
                except ValueError as error:
                    self._pass_over(newest, str(error))
        if dist.is_initialized():
            self._group = dist.new_group(backend="gloo", timeout=TIMEOUT)

    def newest(self) -> Path | None:
        """Return the newest whole checkpoint of all folders; damaged ones are noted and kept."""
        found = [
            p
            for folder in self.checkpoint_folders
            if folder.is_dir()
            for p in folder.iterdir()
            if p.is_dir()
        ]
        # the sort is stable: of two places the first, local one is tried first
        for path in sorted(
            (p for p in found if CHECKPOINT_NAME.fullmatch(p.name)), key=lambda p: -int(p.name)
        ):
            if path in self._damaged:
                continue
            try:
                read_meta(path)
                read_contents(path)
                return path
            except ValueError as error:
                self._note(str(error))
        return None

    def _note(self, damage: str) -> None:
        if (note := f"{damage}; an older one is taken") not in self.notes:
            self.notes.append(note)

    def _pass_over(self, checkpoint: Path, damage: str) -> None:
        """Count a checkpoint, whose bytes have changed, as damaged until it is made again."""
        self._note(damage)
        self._damaged.add(checkpoint)

    def _choose(self, start: Path | None) -> Path | None:
        """Return the newest checkpoint whose bytes are those that were written, else ``start``.

        The ranks share the reading of its files, and all of them return the same.
        """
        while path := self.world.broadcast(self.newest() if self.world.is_main else None):
            damage = self.world.first(self._damage(path))
            if damage is None:
                self._resumed = path
                return path
            self._pass_over(path, damage)
        if start is not None and (damage := self.world.first(self._damage(start))):
            raise ValueError(damage)
        return start

    def _damage(self, path: Path) -> str | None:
        """Return what this rank finds wrong with the bytes of its share of the files, or with the
        table of all of them; None: nothing.
        """
        try:
            check_bytes(path, self.world.rank, self.world.size)
            read_contents(path)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def resume(self, state: TrainingState, run: dict[str, Any], start: Path | None = None) -> int:
        """Restore ``state`` and return the number of completed steps (0: new run).

        From the newest checkpoint, or from ``start`` if there is none. run: options that may not
        change in mid-run, which the checkpoint must have too.
        """
        path = self._choose(start)
        if path is None:
            return 0
        meta = read_meta(path)
        check_same_run(meta.get("run"), run, path)
        steps = meta.get("steps")
        if type(steps) is not int or steps < 0 or (path != start and steps != int(path.name)):
            raise ValueError(f"{path} is damaged: meta.json says that it is of step {steps}")
        if is_old(path):
            self.notes.append(
                f"{path} has the format of an earlier version, which holds a pickle: its table of "
                "contents is checked and read without unpickling; new checkpoints hold none"
            )
        tensors = state.tensors()
        has_average = any(k.startswith("ema.") for k in read_contents(path))
        new_average = None if has_average else state.ema
        if has_average and state.ema is None:
            self.notes.append(f"{path} holds a moving average, which ends here: --ema keeps it")
        stored = {k: v for k, v in tensors.items() if not (new_average and k.startswith("ema."))}
        load_sharded(path, stored, self.world.rank, self.world.size)
        if new_average:
            new_average.start(state.model)
            self.notes.append(f"{path} holds no moving average: --ema starts at its weights")
        try:
            state.load_scalars(meta["scalars"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is damaged: scalars of meta.json: {error}") from error
        return steps

    def save(self, step: int, state: TrainingState, facts: dict[str, Any]) -> None:
        """Start writing the checkpoint of ``step``, on all ranks; training may go on at once."""
        self.wait()
        first = self.checkpoint_folders[0]
        temporary = first / f"{step:07d}.tmp"
        upload = save_sharded(temporary, state.tensors(), self._group)
        if self.world.is_main:
            facts = facts | {"steps": step, "scalars": state.scalars(), "git": git_revision()}
            publisher = ThreadPoolExecutor(1)
            self._pending = publisher.submit(self._publish, temporary, upload, facts)
            publisher.shutdown(wait=False)
        else:
            self._pending = upload

    def _publish(self, temporary: Path, upload: Future, facts: dict[str, Any]) -> None:
        try:
            write_meta(temporary, facts | upload.result())
            first = temporary.with_suffix("")
            _replace(temporary, first)
            self._damaged.discard(first)
            self._mirror(first)
        except BaseException:
            for folder in self.checkpoint_folders:
                shutil.rmtree(folder / temporary.name, ignore_errors=True)
            raise
        for folder in self.checkpoint_folders:
            self._prune(folder)

    def _mirror(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint to the places that lack it."""
        for folder in self.checkpoint_folders:
            place = folder / checkpoint.name
            if place in self._damaged or not _is_whole(place):
                aside = folder / f"{checkpoint.name}.tmp"
                shutil.copytree(checkpoint, aside, copy_function=_copy_durably)
                try:
                    check_bytes(aside)
                except ValueError as error:
                    shutil.rmtree(aside)
                    raise ValueError(str(error).replace(str(aside), str(checkpoint))) from error
                _replace(aside, place)
                self._damaged.discard(place)

    def _prune(self, folder: Path) -> None:
        found = [p for p in folder.iterdir() if p.is_dir() and CHECKPOINT_NAME.fullmatch(p.name)]
        # damaged ones do not count, and stay: the run makes them again when it comes to their step
        steps = sorted(int(p.name) for p in found if p not in self._damaged and _is_whole(p))
        for step in steps[: -self.keep_last]:
            if not (self.keep_every and step % self.keep_every == 0):
                aside = folder / f"{step:07d}.tmp"
                # killed while deleting, it is no checkpoint any more
                os.rename(folder / f"{step:07d}", aside)
                shutil.rmtree(aside)

    def wait(self) -> Path | None:
        """Wait until the checkpoint is whole in every place; ``ValueError`` if that failed."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except BaseException as error:  # torch wraps each rank's reason in an exception of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            places = [f"{p} ({_free(p)})" for p in self.checkpoint_folders]
            raise ValueError(
                f"a checkpoint could not be written to {' and '.join(places)}: {reason}; the ones "
                "before it are untouched, the same command resumes from them"
            ) from error
        return self.newest()

    def finish(self, last_step: int, stopped: bool, export: str, logger: logging.Logger) -> None:
        """Wait for the last checkpoint; if the run is over, ``export`` its weights beside it."""
        if saved := self.wait():
            logger.info(f"saved {saved}")
        if stopped:
            logger.info("stopped by a signal; the same command carries on from there")
        elif self.world.is_main and export != "none":
            for place in self.checkpoint_folders:
                checkpoint = place / f"{last_step:07d}"
                files = {place / f"{checkpoint.name}.{export}": None if export == "pt" else False}
                if export != "pt" and any(k.startswith("ema.") for k in read_contents(checkpoint)):
                    files[place / f"{checkpoint.name}-ema.{export}"] = True
                for path, ema in files.items():
                    if not (
                        path.exists()
                        and path.stat().st_mtime >= (checkpoint / "meta.json").stat().st_mtime
                    ):
                        remove_temporary(path)
                        export_checkpoint(checkpoint, path, ema)
                        logger.info(f"weights: {path}")


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_meta(checkpoint)
    except ValueError:
        return False
    return True


def _free(folder: Path) -> str:
    try:
        return f"{readable_size(shutil.disk_usage(folder).free)} free"
    except OSError as error:
        return error.strerror or str(error)


def _copy_durably(source: str, target: str) -> None:
    shutil.copyfile(source, target)
    with open(target, "rb") as f:
        os.fsync(f.fileno())


def _replace(folder: Path, target: Path) -> None:
    """Rename ``folder`` to ``target``; a damaged one that stands there goes first."""
    if target.exists():
        shutil.rmtree(target)
    os.rename(folder, target)


def check_same_run(before: dict[str, Any] | None, now: dict[str, Any], path: Path) -> None:
    """Raise ``ValueError`` if the run at ``path`` has other options of those that must stay."""
    if not isinstance(before, dict):
        raise ValueError(
            f"{path} is not a checkpoint of a training run of ours; move it out of the run's folder"
        )
    differing = [k for k, v in now.items() if before.get(k) != v]
    if differing:
        k = differing[0]
        raise ValueError(
            f"{path} is of a run with another {', '.join(differing)} ({k}: {before.get(k)} "
            f"there, {now[k]} now); give another --results-dir and --cloud-save-path, or the "
            "same options to resume"
        )
