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
