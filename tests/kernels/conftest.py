"""What the tests of kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def _not_forced(monkeypatch):
    monkeypatch.delenv("GRANQ_KERNEL", raising=False)


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Of a program, in a process of its own, what it prints; keywords are environment variables."""
    def run(code: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent.parent)) | env,
            cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    return run
