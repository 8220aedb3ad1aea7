"""When and where the C++ kernel is built, and processes that fork."""

import os
from pathlib import Path

import pytest
import torch

import oracles
from granq_plugin import kernels
from granq_plugin.kernels import native


@pytest.mark.usefixtures("cpp_kernel")
def test_nothing_is_built_or_imported_before_use(run_python, tmp_path):
    """A fresh cache: empty after the import, a library of the user's own after the first forward."""
    out = run_python(
        "import sys, torch, granq_plugin, os; from granq_plugin import kernels\n"
        "print(os.path.exists(os.environ['XDG_CACHE_HOME'] + '/granq-plugin'), 'triton' in sys.modules and "
        "'granq_plugin.kernels.triton_kernel' in sys.modules)\n"
        "print(kernels.backend(torch.randn(1, 2, 40)))", XDG_CACHE_HOME=str(tmp_path))
    assert out.split() == ["False", "False", "compiled"]
    folder = tmp_path / "granq-plugin"
    assert folder.stat().st_mode & 0o777 == 0o700 and [p.suffix for p in folder.iterdir()] == [".so"]


@pytest.mark.usefixtures("cpp_kernel")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_forked_process(run_python):
    """After a parallel run in the parent, whose threads the child does not have."""
    out = run_python(
        "import os, torch; from granq_plugin import functional as GF, kernels\n"
        "torch.set_num_threads(2); x = torch.randn(8, 16, 64, 64); expected = GF.granq(x, 4).value\n"
        "assert torch.equal(kernels.granq(x, 4).value, expected)\n"
        "pid = os.fork()\n"
        "if not pid:\n"
        "    value = kernels.granq(x, 4).value\n"
        "    torch.set_num_threads(1)  # as torch's own parallel operations need after a fork\n"
        "    os._exit(0 if torch.equal(value, expected) else 1)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))")
    assert out.split() == ["0"]


@pytest.mark.parametrize("broken", ["compiler", "flags", "folder", "shared", "home", "name", "quote"])
def test_without_a_kernel(monkeypatch, tmp_path, broken):
    """Eager results, and a reason that can be asked for; forced, an error that gives it."""
    folder, reason = tmp_path / "cache", {
        "compiler": "no C\\+\\+ compiler", "flags": "failed", "folder": "Error", "shared": "other users",
        "home": "home", "name": "CXX=/nowhere names no compiler", "quote": "No closing quotation"}[broken]
    if broken == "compiler":
        monkeypatch.setenv("PATH", str(tmp_path))
    elif broken == "flags":
        monkeypatch.setattr(native, "FLAGS", ("--no-such-flag", ))
    elif broken == "folder":
        folder.write_text("a file")
    elif broken == "shared":
        (folder / "granq-plugin").mkdir(parents=True)
        (folder / "granq-plugin").chmod(0o777)
    monkeypatch.delenv("CXX", raising=False)
    if broken in ("name", "quote"):
        monkeypatch.setenv("CXX", {"name": "/nowhere", "quote": '"g++'}[broken])
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    if broken == "home":  # as Path.home says it
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", classmethod(lambda cls: (_ for _ in ()).throw(RuntimeError("no home directory"))))
    native._built.cache_clear()
    try:
        x = torch.randn(2, 3, 4, 4)
        assert kernels.backend(x) == "eager"
        oracles.assert_equal(kernels.granq(x, 4).value, oracles.granq_tensor(x, 4))
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(kernels.why_not_compiled())
        monkeypatch.setenv("GRANQ_KERNEL", "compiled")
        with pytest.raises(RuntimeError, match=f"GRANQ_KERNEL=compiled, but: .*{reason}"):
            kernels.granq(x, 4)
    finally:
        native._built.cache_clear()
