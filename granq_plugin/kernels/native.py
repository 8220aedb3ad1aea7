"""The C++ kernel (granq.cpp): built by the system's compiler on first use, kept in the user's cache folder, called through ctypes.

Without torch's headers, so that it builds in seconds. Nothing is built at import. Where it cannot be built (no compiler, a cache
folder that cannot be written) there is no kernel, and :func:`problem` says why.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
from functools import cache
from pathlib import Path

import torch

from granq_plugin.atomic import atomic_path

__all__ = ["library", "problem", "threads_for"]

SOURCE = Path(__file__).with_name("granq.cpp")
HEADERS = ("vectors.h", "dynamic.h", "frozen.h")
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bf16", torch.float16: "_Float16"}
# no contraction, no fast-math: the results are those of torch's operations, bit for bit; errno and traps do not touch values
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti",
         "-shared", "-fPIC")
# the most that this compiler understands
EXTRA_FLAGS = (("-march=native", "-fopenmp"), ("-march=native", ), ())
BUILD_TIMEOUT = 300  # seconds
_SMALL = 32768  # values below which threads cost more than they save; torch's own grain

_P, _I, _D, _C = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
SIGNATURES = dict(
    batch_norm_affine=[_P] * 4 + [_D, _I] + [_P] * 2,
    granq_forward=[_P] * 8 + [_I] * 4 + [_D, _C, _D, _D, _D, _D, _C, _C],
    frozen_forward=[_P] * 8 + [_I] * 4 + [_D, _D, _C, _D, _D, _D, _D, _C, _C],
    masked_backward=[_P] * 4 + [_I] * 4 + [_C])

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def threads_for(x: torch.Tensor) -> int:
    """Threads to use on x: torch's number; one where x is small, and in forked processes, which lose the pool of threads."""
    if _forked:
        return 1
    return max(1, min(torch.get_num_threads(), x.numel() // _SMALL))


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernel for values of dtype, built if need be; None where there is none."""
    built = _built(dtype)
    return None if isinstance(built, str) else built


def problem(dtype: torch.dtype) -> str | None:
    """Why there is no kernel for dtype; None if there is one."""
    built = _built(dtype)
    return built if isinstance(built, str) else None


class _BuildError(Exception):
    """The compiler's complaint."""


@cache
def _built(dtype: torch.dtype) -> ctypes.CDLL | str:
    if dtype not in TYPES:
        return f"there is no kernel for {dtype}"
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if not compiler:
        return "no C++ compiler was found (c++, g++ and clang++ are looked for; CXX names another)"
    try:
        words = [compiler] if shutil.which(compiler) else shlex.split(compiler)  # CXX may bring flags
        if not words or not shutil.which(words[0]):
            return f"CXX={compiler} names no compiler"
        version = subprocess.run([*words, "--version"], capture_output=True, text=True, timeout=60, check=True).stdout
        folder = _cache_folder()
        for extra in EXTRA_FLAGS:
            command = [*words, *FLAGS, *extra, f"-DGRANQ_TYPE={TYPES[dtype]}"]
            try:
                return _load(_compiled(command, version, folder))
            except _BuildError as e:
                problem = f"{' '.join(command)} failed: {e}"
        return problem
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as e:  # no home directory; CXX with an open quote
        return f"{type(e).__name__}: {e}"


def _compiled(command: list[str], version: str, folder: Path) -> Path:
    """The shared library of a command, from the cache or built into it. Raises a _BuildError."""
    sources = [SOURCE.with_name(name).read_text(encoding="utf-8") for name in (SOURCE.name, *HEADERS)]
    key = "\0".join([*sources, *command, version, _processor()])
    path = folder / f"granq-{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if not path.exists():
        with atomic_path(path) as part:
            run = subprocess.run([*command, "-o", str(part), str(SOURCE)], capture_output=True, text=True, timeout=BUILD_TIMEOUT)
            if run.returncode:
                raise _BuildError(run.stderr.strip()[-500:])
    return path


def _cache_folder() -> Path:
    """The user's own folder: code is loaded from it, so no other user may write there. Raises an OSError."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "granq-plugin"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)):
        raise PermissionError(f"cache folder {str(folder)!r} belongs to or can be written by other users")
    return folder


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))))


def _load(path: Path) -> ctypes.CDLL:
    lib = ctypes.CDLL(str(path))
    for name, types in SIGNATURES.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = types, None
    return lib
