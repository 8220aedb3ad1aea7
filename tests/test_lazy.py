"""What is imported when: public names on first use, help without torch, handlers with the first quantizer."""

import ast
import importlib
import inspect
import pickle
import subprocess
import sys

import pytest

import granq_plugin
import granq_plugin.zero_shot
from granq_plugin import cli

HEAVY = {"torch", "torchvision", "brevitas", "onnx", "onnxruntime", "qonnx", "matplotlib", "numpy", "scipy", "safetensors", "tqdm"}


def packages_after(code: str) -> set[str]:
    """Top-level packages that a new process has imported after ``code``."""
    code += "\nimport sys; print('PACKAGES', *{name.split('.')[0] for name in sys.modules})"
    process = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return set(process.stdout.rpartition("PACKAGES ")[2].split())


@pytest.mark.parametrize("code", [
    "import granq_plugin; dir(granq_plugin); granq_plugin.__version__",
    "import granq_plugin.zero_shot as z; z.preset('cifar10').to_toml()",
    "import zoo; zoo.get_card('resnet20_cifar10'); from zoo.students import Quantization, Student; "
    "Student('resnet20_cifar10', Quantization(4, 4)).card",
    "from granq_plugin import cli; assert cli.run(['--help']) == 0",
    "from granq_plugin import cli; assert cli.run(['--version']) == 0",
    "from granq_plugin import cli; assert cli.run(['qat', '--help-config']) == 0",
    "import os; os.environ.update(_GRANQ_COMPLETE='bash_complete', COMP_WORDS='granq qat resnet20', COMP_CWORD='2')\n"
    "from granq_plugin import cli\ntry: cli.run([])\nexcept SystemExit: pass",
    "from granq_plugin import cli\nfor verb in cli.VERBS: assert cli.run([verb, '-h']) == 0, verb",
])
def test_nothing_heavy_is_imported_for(code):
    assert not HEAVY & packages_after(code)


def test_importing_the_plugin_adds_no_package_to_brevitas():
    """Time is spent in other packages: next to Brevitas and its export there is nothing but our own small files."""
    brevitas = "import brevitas.nn, brevitas.export, brevitas.graph.calibrate"
    assert packages_after(f"{brevitas}\nfrom granq_plugin import *") - packages_after(brevitas) == {"granq_plugin"}


@pytest.mark.parametrize("code", [
    "import granq_plugin; granq_plugin.quantize",
    "import brevitas.export; from granq_plugin.quantizers import GranQWeightPerChannel"])
def test_brevitas_export_knows_the_handlers_after(code):
    code += ("\nfrom brevitas.export.inference.manager import InferenceManager"
             "\nfrom brevitas.export import QONNXManager, StdQCDQONNXManager, TorchQCDQManager"
             "\nfor manager in (InferenceManager, QONNXManager, StdQCDQONNXManager, TorchQCDQManager):"
             "\n    ours = [h for h in manager.handlers if h.__module__.startswith('granq_plugin.handlers')]"
             "\n    assert len(ours) == len(set(ours)) >= 3, manager")
    assert "onnx" in packages_after(code)


@pytest.mark.parametrize("package", [granq_plugin, granq_plugin.zero_shot])
def test_lazy_names_look_like_any_other(package):
    assert set(package.__all__) <= set(dir(package))
    namespace = {}
    exec(f"from {package.__name__} import *", namespace)
    assert set(namespace) - {"__builtins__"} == set(package.__all__)
    for name in package.__all__:
        value = namespace[name]
        assert value is getattr(package, name)
        if callable(value):
            assert pickle.loads(pickle.dumps(value)) is value
            assert value.__name__ == name and inspect.getdoc(value)


@pytest.mark.parametrize("package", [granq_plugin, granq_plugin.zero_shot])
def test_type_checkers_see_the_names_that_are_there(package):
    block = next(n for n in ast.parse(inspect.getsource(package)).body if isinstance(n, ast.If))
    for statement in block.body:
        for alias in statement.names:
            assert getattr(importlib.import_module(statement.module), alias.name) is getattr(package, alias.name)
    imported = {a.name for n in ast.walk(ast.parse(inspect.getsource(package))) if isinstance(n, ast.ImportFrom) for a in n.names}
    assert set(package.__all__) <= imported


def test_submodules_are_attributes_and_unknown_names_are_errors():
    assert granq_plugin.functional is importlib.import_module("granq_plugin.functional")
    assert granq_plugin.deploy.fold.__module__ == "granq_plugin.deploy.folding"
    with pytest.raises(AttributeError, match="module 'granq_plugin' has no attribute 'quantise'"):
        granq_plugin.quantise  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'quantise'"):
        exec("from granq_plugin import quantise")


def test_verbs_are_functions_of_their_names(capsys):
    assert cli.run([]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.split("Commands:\n")[1].splitlines()]
    assert listed == list(cli.VERBS)
    assert cli.run(["evaluat"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("granq: error: No such command 'evaluat'") and err.count("\n") == 1
