"""Where results go: a folder that appears complete or not at all."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from specs.errors import InputError

_MARKS = ("config.yaml", "summary.json")  # by these a folder is known as a run's
_handlers: list[Any] = []  # of Ctrl-C, set aside while something is written


def choose_folder(out: str | None, name: str, *, force: bool) -> Path:
    """The folder to write: ``out``, or else ``out/NAME``, ``out/NAME-2``, … whichever isn't there yet.

    An existing ``out`` must be empty, or, with ``force``, hold an earlier run, which will be replaced.

    Raises:
        InputError: the folder holds something else, or can't be made.
    """
    if out is None:
        folder = _next_free(Path("out"), name)
    else:
        folder = Path(out)
        _check_replaceable(folder, force)
    _check_writable(folder)
    return folder


@contextmanager
def writing(folder: Path, *, numbered: bool) -> Iterator[tuple[Path, Path]]:
    """Yields (temporary sibling, final folder); on leaving, the sibling takes the final name.

    Whatever goes wrong inside, the sibling is removed. Ctrl-C waits until all is written. With ``numbered``,
    a folder that has appeared meanwhile is stepped around by the next free number.
    """
    with _uninterrupted():
        yield from _write_beside(folder, numbered)


def _write_beside(folder: Path, numbered: bool) -> Iterator[tuple[Path, Path]]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        partial.chmod(0o777 & ~_umask())
        if numbered and folder.exists():
            folder = _next_free(folder.parent, folder.name)
        yield partial, folder
        _put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ignore Ctrl-C: what has been simulated is not to be lost to an impatient second one."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    _handlers.append(before)
    try:
        yield
    finally:
        _handlers.pop()
        signal.signal(signal.SIGINT, before)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C through inside :func:`writing`, while what is to be written is still being made."""
    if not _handlers or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, _handlers[-1])
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def is_run(folder: Path) -> bool:
    """Whether the folder holds the results of a run."""
    return all((folder / mark).is_file() for mark in _MARKS)


def _put_in_place(partial: Path, folder: Path) -> None:
    if folder.is_dir() and is_run(folder):
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        folder.rename(old / "run")
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(folder)  # onto an empty folder this works, onto anything else it fails


def _next_free(parent: Path, name: str) -> Path:
    folder, number = parent / name, 1
    while os.path.lexists(folder):
        number += 1
        folder = parent / f"{name}-{number}"
    return folder


def _check_replaceable(folder: Path, force: bool) -> None:
    try:
        if not os.path.lexists(folder):
            return
        if not folder.is_dir():
            raise InputError(f"--out {folder}: is there and is not a folder; choose another")
        if not any(folder.iterdir()):
            return
        if is_run(folder):
            if force:
                return
            raise InputError(
                f"--out {folder}: holds an earlier run; add --force to replace it, or choose another"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--out {folder!s}: {error}") from None
    raise InputError(f"--out {folder}: is not empty and holds no run of Convoy; choose another")


def _check_writable(folder: Path) -> None:
    """Say so before a long simulation, not after it, if the folder can't be made."""
    parent = folder.absolute().parent
    while not os.path.lexists(parent):
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"--out {folder}: {parent} is not a folder")
    try:
        trial = tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=parent)
        Path(trial).rmdir()
    except OSError as error:
        raise InputError(f"--out {folder}: {error.strerror} in {parent}") from None


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
