"""Finding every ReLU call of a model, so that each can have a quantizer of its own."""

import inspect
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import fx, nn

from granq_plugin.snapshot import Snapshot

__all__ = ["RELUS", "flattened", "relu_class", "separate_relus", "trace"]

RELUS = (nn.ReLU, nn.ReLU6)
_FUNCTIONS = {F.relu: nn.ReLU, F.relu_: nn.ReLU, torch.relu: nn.ReLU, torch.relu_: nn.ReLU, F.relu6: nn.ReLU6}
_VIEWS = ("chunk", "expand", "flatten", "getitem", "narrow", "permute", "reshape", "select", "split", "squeeze", "t", "transpose",
          "unbind", "unflatten", "unsqueeze", "view")
_METHODS = {"relu": nn.ReLU, "relu_": nn.ReLU}


def trace(model: nn.Module, leaves: tuple[type, ...] = (), strict: bool = False) -> fx.GraphModule:
    """The model's graph in its present mode, as called with its required arguments alone.

    The GraphModule shares the model's modules. Functional dropout becomes a module, which follows ``train()`` and ``eval()``.
    Modules of the classes ``leaves`` are kept whole, as torch's own are. What the forward writes into the model while it is traced
    is undone. With ``strict`` dropout stays as it is, and a forward that does what no graph shows raises a RuntimeError: one that
    switches gradients or autocast, or writes into the model.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    optional = {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, int, float, str))}
    tracer = _Tracer(leaves, strict)
    snapshot = Snapshot(model, parameters=strict)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Was not able to add assertion", UserWarning)  # fx, of arguments fixed at None
            graph = tracer.trace(model, optional or None)
        if strict and not snapshot.holds():
            raise RuntimeError("the forward writes into the model")
        graph_model = fx.GraphModule(tracer.root, graph, type(model).__name__)
    finally:
        snapshot.restore()
    for node in list(graph_model.graph.nodes):
        if node.op == "call_function" and node.target is F.dropout and not strict:
            p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
            _call_module_instead(graph_model, node, "dropout", nn.Dropout(p).train(model.training))
    graph_model.recompile()
    return graph_model


class _Tracer(fx.Tracer):
    """fx's tracer with more leaf modules."""

    def __init__(self, leaves: tuple[type, ...], strict: bool = False) -> None:
        super().__init__()
        self.leaves = leaves
        self.switches = _switches() if strict else None

    def create_node(self, *args, **kwargs) -> fx.Node:
        if self.switches not in (None, _switches()):
            raise RuntimeError("the forward switches gradients or autocast")
        return super().create_node(*args, **kwargs)

    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        return isinstance(module, self.leaves) or super().is_leaf_module(module, qualified_name)


def _switches() -> tuple:
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu", )
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            *((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices))


def flattened(module: nn.Module, leaves: tuple[type, ...]) -> Iterator[nn.Module]:
    """The modules whose forwards a :func:`trace` goes through."""
    if not _Tracer(leaves).is_leaf_module(module, ""):
        yield module
        for child in module.children():
            yield from flattened(child, leaves)


def separate_relus(model: nn.Module, graph_model: fx.GraphModule) -> nn.Module:
    """A model in which every ReLU call is a module of its own, called once.

    That is ``model`` itself where it holds already. Otherwise it is ``graph_model``, its trace, with a new module for each ReLU
    that is called as a function or method, or at several places. In-place ReLUs whose input is read again are rewired to what
    those readers see: a quantizer is never in place.

    Raises:
        ValueError: for an in-place ReLU whose input shares its values with another view that is read again.
    """
    nodes = [n for n in graph_model.graph.nodes if relu_class(n, graph_model)]
    for node in nodes:
        if _inplace(node, graph_model):
            _check_no_view(node)
    calls = [n.target for n in nodes if n.op == "call_module"]
    separate = len(calls) == len(nodes) == len(set(calls))
    if separate and not any(_inplace(n, graph_model) and _later_readers(n) for n in nodes):
        return model
    _warn_of_what_a_graph_loses(model, graph_model)
    seen = set()
    for node in nodes:
        if _inplace(node, graph_model):
            source = node.all_input_nodes[0]
            for reader in _later_readers(node):
                reader.replace_input_with(source, node)
        if node.op != "call_module" or node.target in seen:
            relu = relu_class(node, graph_model)().train(model.training)
            node = _call_module_instead(graph_model, node, "relu" if node.op != "call_module" else node.target, relu)
        seen.add(node.target)
    graph_model.graph.lint()
    graph_model.recompile()
    return graph_model


def relu_class(node: fx.Node, graph_model: fx.GraphModule) -> type | None:
    """nn.ReLU or nn.ReLU6 if ``node`` calls one, as a module, function or method."""
    if node.op == "call_module":
        kind = type(graph_model.get_submodule(node.target))
        return kind if kind in RELUS else None
    return {"call_function": _FUNCTIONS, "call_method": _METHODS}.get(node.op, {}).get(node.target)


def _inplace(node: fx.Node, graph_model: fx.GraphModule) -> bool:
    if node.op == "call_module":
        return graph_model.get_submodule(node.target).inplace
    if node.target in ("relu", "relu_", F.relu_, torch.relu, torch.relu_):
        return node.target in ("relu_", F.relu_, torch.relu_)
    return bool(node.kwargs.get("inplace", node.args[1] if len(node.args) > 1 else False))


def _later_readers(node: fx.Node) -> list[fx.Node]:
    """Nodes that read the input of ``node`` after it."""
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    return [n for n in node.all_input_nodes[0].users if order[n] > order[node]]


def _check_no_view(node: fx.Node) -> None:
    """Raise a ValueError if ``node``, in place, changes what is read after it under another name: views share their values."""
    source = base = node.all_input_nodes[0]
    while _is_view(base):
        base = base.all_input_nodes[0]
    order, aliases = {n: i for i, n in enumerate(node.graph.nodes)}, [base]
    for alias in aliases:
        aliases += [n for n in alias.users if _is_view(n) and order[n] < order[node]]
    for alias in aliases:
        if alias is not source and any(order[n] > order[node] and not _reads_metadata(n) for n in alias.users):
            raise ValueError(f"the in-place ReLU {node.name!r} changes {alias.name!r}, which shares its values and is read again: "
                             "take one that is not in place")


def _target_name(node: fx.Node) -> str:
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", "") if node.op == "call_function" else ""


def _is_view(node: fx.Node) -> bool:
    name = _target_name(node)
    if name == "getitem" and isinstance(node.args[1], int):  # of a tuple: of views, or of whatever a module returns
        return isinstance(node.args[0], fx.Node) and _target_name(node.args[0]) in ("chunk", "split", "unbind")
    return name in _VIEWS and bool(node.all_input_nodes)


def _reads_metadata(node: fx.Node) -> bool:
    return _target_name(node) in ("size", "dim", "ndimension", "numel", "stride", "is_contiguous", "getattr")


def _call_module_instead(graph_model: fx.GraphModule, node: fx.Node, name: str, module: nn.Module) -> fx.Node:
    """Replace ``node`` by a call of ``module`` on its first input, under ``name`` or the first free ``name_1``, ``name_2``..."""
    taken = {n for n, _ in graph_model.named_modules(remove_duplicate=False)}
    free = next(n for n in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if n not in taken)
    graph_model.add_submodule(free, module)
    with graph_model.graph.inserting_before(node):
        new = graph_model.graph.call_module(free, (node.all_input_nodes[0], ))
    node.replace_all_uses_with(new)
    graph_model.graph.erase_node(node)
    return new


def _warn_of_what_a_graph_loses(model: nn.Module, graph_model: fx.GraphModule) -> None:
    """A graph has one branch of each ``if self.training``, and calls no hook of the modules that it flattens."""
    modes = {m: m.training for m in model.modules()}
    try:
        other = trace(model.train(not model.training))
        differs = _structure(other) != _structure(graph_model)
    except Exception:  # the other mode runs the user's code too
        differs = True
    finally:
        for module, training in modes.items():
            module.training = training
    mode = "training" if model.training else "evaluation"
    if differs:
        warnings.warn(f"the model's forward depends on its mode; the quantized model keeps what it does in {mode} mode. "
                      "Convert it in the mode in which it will be used", stacklevel=4)
    called = {graph_model.get_submodule(n.target) for n in graph_model.graph.nodes if n.op == "call_module"}
    hooked = [name or "the model" for name, m in model.named_modules() if m._forward_hooks and m not in called]
    if hooked:
        warnings.warn(f"hooks of modules that are traced through are not called any more: {', '.join(hooked)}", stacklevel=4)


def _structure(graph_model: fx.GraphModule) -> list[tuple]:
    return [(n.op, str(n.target), str(n.args), str(n.kwargs)) for n in graph_model.graph.nodes]
