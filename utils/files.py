"""Files that survive a kill: written under another name, and renamed once they are complete."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file that takes the place of `path` at the end of the block. After a kill, an error or on a full disk
    `path` is as it was."""
    partial = path.with_name(path.name + ".part")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(content: str | bytes, path: Path) -> None:
    """Writes a whole file by `replacing`, and raises OSError if it cannot."""
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
