"""Writing files so that nothing is lost: to a temporary name in the same folder, then renamed.

In: a path and its whole content. Out: the file, or one clear error with the old file untouched.
Deliberately elsewhere: what the content means (checkpoints, reports, metrics).
"""

from __future__ import annotations

import os
from pathlib import Path


def write(path: str | Path, content: bytes | str) -> Path:
    """Replace the file at `path` by `content`, whole or not at all.

    Raises:
        OSError: the file system refused (no space, no permission); the old file is untouched.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if temporary.exists():
            temporary.unlink()
        raise OSError(
            error.errno,
            f"{len(data):,} bytes must fit on the disk and be writable, got '{error.strerror}'. "
            "Free space or choose another folder; what was there before is untouched",
            str(path),
        ) from error
    return path


class Reserved:
    """A folder that no other process runs in, until this is closed or its process ends, however it ends.

    Where the system has no locks (Windows) nothing is kept.

    Raises:
        ValueError: another process is running there.
    """

    def __init__(self, folder: str | Path):
        self.descriptor: int | None = None
        try:
            import fcntl
        except ImportError:
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.descriptor = os.open(Path(folder) / ".lock", os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise ValueError(
                f"{folder} must be used by one process at a time, got a second one. Wait for the other, or choose "
                "another folder."
            ) from error

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None

    __del__ = close
