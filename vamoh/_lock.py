"""One writer per folder: a lock that the operating system holds, so that it ends with its holder, however that ends."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from vamoh._files import open_inside, writing
from vamoh._shown import unquoted

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
"""File in the folder; it tells who holds the lock, and means nothing once that has ended."""


@contextmanager
def locked(where: str, folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a folder, which is made if there is none, against every other process and thread that asks for it.

    FileExistsError that names the holder where there is one. A file system without locks gets a warning instead.
    """
    folder = Path(folder)
    made = not folder.exists()
    with writing(where, folder):
        folder.mkdir(parents=True, exist_ok=True)
    path = folder / NAME
    descriptor = _acquire(where, path)
    try:
        yield
    finally:
        with suppress(OSError):
            if _is(path, descriptor):
                path.unlink()
        os.close(descriptor)
        if made:
            with suppress(OSError):  # unless something lies in it now
                folder.rmdir()


def _acquire(where: str, path: Path) -> int:
    while True:
        with writing(where, path):
            descriptor = open_inside(where, path, os.O_RDWR | os.O_CREAT)
        try:
            _lock(where, path, descriptor)
            if _is(path, descriptor):  # else its last holder has just removed it
                os.ftruncate(descriptor, 0)
                since = datetime.now().astimezone().isoformat(" ", "seconds")
                holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
                with writing(where, path):
                    os.write(descriptor, f"{json.dumps(holder)}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(where: str, path: Path, descriptor: int) -> None:
    # flock, not lockf: two threads of a process exclude each other, and no other descriptor of the file ends it.
    # Linux turns it into a lock of the server where the folder is on NFS.
    code = errno.ENOSYS
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            code = error.errno or errno.ENOLCK
    if code in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
        raise FileExistsError(f"{where}: {path.parent} is in use by {_holder(descriptor)}; wait for it or stop it")
    if code not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL):
        raise OSError(code, f"{where}: cannot lock {path} ({os.strerror(code)})")
    logging.getLogger(__name__).warning(
        "%s: the file system of %s has no locks (%s): do not start two processes there", where, path, os.strerror(code)
    )


def _holder(descriptor: int) -> str:
    try:
        found = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {unquoted(found['pid'])} on {unquoted(found['host'])} since {unquoted(found['since'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _is(path: Path, descriptor: int) -> bool:
    """Whether an open file still lies there."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
