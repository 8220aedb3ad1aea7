"""Set-up that all tests share; numpy oracles, strategies and small nets are in oracles.py."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from granq_plugin import kernels  # and the handlers are registered

# benchmarks/ is not part of the wheel, and its folder on the path would put the checkout before the wheel
_folder = Path(__file__).parent.parent / "benchmarks"
_spec = importlib.util.spec_from_file_location("benchmarks", _folder / "__init__.py", submodule_search_locations=[str(_folder)])
sys.modules["benchmarks"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["benchmarks"])

torch.set_num_threads(1)
settings.register_profile(
    "granq", deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("granq")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def compiler():
    """Skip a test of torch.compile where there is no C++ compiler; start and leave the compiler's caches empty."""
    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler, and there is no g++ or clang++")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def cpp_kernel():
    """Skip a test of the C++ kernel where it cannot be built."""
    if kernels.why_not_compiled() is not None:
        pytest.skip(f"the kernel cannot be built: {kernels.why_not_compiled()}")


@pytest.fixture
def exact_compiler(compiler):
    """As ``compiler``, for tests of equal bits."""
    if torch.__version__ < (2, 9):
        pytest.skip("the compiler of torch 2.8 fuses multiplications with additions: its results are not the same bits")


@pytest.fixture
def run_python() -> Callable[..., str]:
    """Of a program, in a process of its own, what it prints; keywords are environment variables."""
    def run(code: str, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | dict(PYTHONPATH=str(Path(__file__).parent)) | env,
            cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout
    return run


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of real data (cifar10/test.npz, weights/...); tests that need it skip where GRANQ_DATA is not set."""
    if not os.environ.get("GRANQ_DATA"):
        pytest.skip("needs real data: set GRANQ_DATA to a folder with cifar10/test.npz and weights/")
    return Path(os.environ["GRANQ_DATA"])
