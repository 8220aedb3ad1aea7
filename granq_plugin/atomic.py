"""Files that are whole or not there: written to a temporary name in the same folder, then renamed."""

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_path", "write_text"]


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, which takes its name when the block ends, and is removed when the block fails.

    The temporary file is created at once, so that a path that cannot be written fails before any work is done.

    Raises:
        OSError: naming ``path``, if it is a folder, its folder does not exist, or it cannot be written, e.g. on a full disk. What
            stood there before is left whole.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"output path {str(path)!r} is a folder")
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"output path {str(path)!r}: its folder does not exist")
    # no two writers share it, be they threads or processes of containers, whose numbers may be equal
    part = path.with_name(f"{path.name}.part{os.getpid()}{secrets.randbelow(10**9):09}")
    try:
        part.touch()
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())  # a crash of the machine must not leave an empty file under the final name
        part.replace(path)
    except OSError as e:
        if e.filename is not None and Path(os.fsdecode(e.filename)) != part:  # of another file
            raise
        raise type(e)(f"cannot write {str(path)!r}: {e.strerror or e}") from e
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")
