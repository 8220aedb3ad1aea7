"""The demo's folder: one demo in it, whole files only, a second start goes on."""

import json
import shutil
from pathlib import Path

from granq_plugin.atomic import write_text
from granq_plugin.reading import read_json

__all__ = ["open_folder"]

MARK = "demo.json"


def open_folder(path: str | Path, identity: dict, stages: tuple[str, ...]) -> bool:
    """Make a new folder for a demo, or find the same demo in it; True if it is found.

    What a killed process left half-written is removed.

    Args:
        identity: plain values that tell one demo from another. stages: names of the folders of its runs.

    Raises:
        NotADirectoryError, FileExistsError: for a file, a folder with anything else in it, or another demo.
        OSError: if it cannot be written.
    """
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {str(path)!r} is a file; choose a folder")
    mark = folder / MARK
    if mark.is_file():
        try:
            found = read_json(mark)
        except ValueError:
            found = None
        if found != identity:
            described = ", ".join(f"{k} {v}" for k, v in found.items()) if isinstance(found, dict) else "cannot be read"
            raise FileExistsError(f"{str(path)!r} holds another demo ({described}): choose another --out, or remove that folder")
        for part in folder.rglob("*.part[0-9]*"):
            part.unlink()
        for stage in stages:  # killed before its first file was whole
            if (folder / stage).is_dir() and not (folder / stage / "run.json").is_file():
                shutil.rmtree(folder / stage)
        return True
    if folder.is_dir() and any(not p.name.startswith(f"{MARK}.part") for p in folder.iterdir()):
        raise FileExistsError(f"{str(path)!r} is not empty and holds no demo: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(mark, json.dumps(identity, indent=2) + "\n")
    return False
