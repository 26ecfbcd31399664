"""Files that are maybe something else: a pipe, a device, a link that somebody has laid, or another user's own.

What is written beside a results file is written through here.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import stat
from collections.abc import Iterator
from typing import IO, Any

from . import core

KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFLNK: "a link", stat.S_IFSOCK: "a socket"}


def other_than_file(path: str | os.PathLike[str], links: bool = True) -> str:
    """Return what stands at the path, in a few words, where that is no regular file; '' if it is one, or nothing.

    A link to a file is one, unless `links` is false.
    """
    try:
        mode = os.stat(path, follow_symlinks=links).st_mode
    except OSError:
        return "a link that leads nowhere" if os.path.islink(path) else ""
    return "" if stat.S_ISREG(mode) else KINDS.get(stat.S_IFMT(mode), "a device")


def open_regular(
    path: str | os.PathLike[str], form: str = "rb", buffering: int = -1, *, mode: int = 0o666, links: bool = True
) -> Any:
    """Open a regular file, as `open` does; a new one gets the mode, less the umask.

    Raises OSError where something else stands there: a pipe, which would hold up everything, a device, a directory, or
    a link that leads nowhere; without `links` any link.
    """

    def open_at_once(path: str, flags: int) -> int:
        # What has been put there just now is not waited for, nor followed; Windows knows neither.
        flags |= getattr(os, "O_NONBLOCK", 0) | (0 if links else getattr(os, "O_NOFOLLOW", 0))
        number = os.open(path, flags, mode)
        if not stat.S_ISREG(os.fstat(number).st_mode):
            os.close(number)
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        return number

    if kind := other_than_file(path, links):
        raise OSError(errno.EINVAL, f"it is not a regular file but {kind}; name a file", os.fspath(path))
    return open(path, form, buffering=buffering, opener=open_at_once)


def open_beside(path: pathlib.Path, results: str | os.PathLike[str] | int) -> IO[bytes]:
    """Open a file beside the results to append to it, with no wider permissions than those of the results.

    Raises OSError, with a sentence, where that cannot be. No link is followed.
    """
    like = os.stat(results)
    try:
        file: IO[bytes] = open_regular(path, "ab", mode=like.st_mode & 0o666, links=False)
    except OSError as failure:
        kind = other_than_file(path, links=False)
        reason = f"{path} is {kind}; remove it" if kind else f"{path}: {failure.strerror}"
        raise OSError(failure.errno, reason) from None
    now = os.fstat(file.fileno())
    if now.st_mode & ~like.st_mode & 0o777 and hasattr(os, "fchmod"):  # it was there before
        with contextlib.suppress(PermissionError):  # then it is somebody else's
            os.fchmod(file.fileno(), now.st_mode & like.st_mode & 0o777)
    if foreign(now, like):
        file.close()
        raise OSError(errno.EPERM, f"{path} is somebody else's file; remove it")
    return file


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *like: str | os.PathLike[str], side: bool = False) -> Iterator[IO[bytes]]:
    """Open a draft that takes the file's place in the end, whole or not at all. A link stays a link.

    It has the permissions of the file that was there, else no wider ones than those that are `like` it. One at the
    `side` of these has no wider ones in any case, and takes the place of a link.
    """
    target, mode = pathlib.Path(path if side else os.path.realpath(path)), 0o666
    for file in like:
        with contextlib.suppress(FileNotFoundError):
            mode &= os.stat(file).st_mode
    with core.replacing(target, None if not side and target.exists() else mode) as draft:
        yield draft


def foreign(file: os.stat_result, results: os.stat_result) -> str:
    """Return "somebody else's file" if a file belongs to neither this user nor the owner of the results; or ''."""
    ours = not hasattr(os, "geteuid") or file.st_uid in (os.geteuid(), results.st_uid)
    return "" if ours else "somebody else's file"


def unwritable_draft(path: str | os.PathLike[str]) -> str:
    """Return why no draft can be written for a file, and what to do; or ''."""
    draft = core.beside_results(pathlib.Path(os.path.realpath(path)), "tmp")
    return f"{draft} is a directory; remove it" if draft.is_dir() and not draft.is_symlink() else ""


def unwritable(path: str | os.PathLike[str]) -> str:
    """Return why no file can be written, or replaced, there; or ''."""
    folder = os.path.dirname(path) or "."
    if kind := other_than_file(path):
        return f"{path} is not a regular file but {kind}"
    if why := unwritable_draft(path):
        return why
    if not os.path.isdir(folder):
        return f"{path} cannot be written: there is no folder {folder}"
    return "" if os.access(folder, os.W_OK) else f"{path} cannot be written: the folder {folder} is write-protected"
