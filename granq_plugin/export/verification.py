"""Does an exported file compute what the torch model computes? :func:`verify` runs it and counts."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from granq_plugin.export.executors import EXECUTORS, fixed_batch, open_executor
from granq_plugin.export.files import read_onnx
from granq_plugin.export.integers import (
    IntegerCheck,
    IntegerTally,
    QuantizerRecord,
    distances,
    find_quantizers,
    force_activations,
    integers_of,
    match_quantizers,
    record_quantizers,
    show_integers,
)
from granq_plugin.modules import check_module

__all__ = ["Agreement", "Verification", "verify"]


@dataclass(frozen=True)
class Agreement:
    """One executor beside torch, over all images.

    Attributes:
        executor: its name. images: how many were run.
        exact: images whose outputs are all equal, bit for bit. close: whose outputs differ by at most ``rtol`` of the largest one.
        max_abs, max_rel: the largest difference, and the largest relative to its image's largest output.
        top1: images with the same largest output (for a file that ends in top-k: with the same indices).
        correct, torch_correct: images whose largest output is the label, in the file and in torch; None without labels.
        integers: the activations' integers, layer by layer; None where the file shows none (``integers_missing`` says why).
        hls4ml_integers: ``(equal, all)`` of the integers that leave hls4ml, where a network is cut; end to end.
    """
    executor: str
    images: int
    exact: int
    close: int
    max_abs: float
    max_rel: float
    top1: int
    correct: int | None
    torch_correct: int | None
    integers: IntegerCheck | None
    integers_missing: str = ""
    hls4ml_integers: tuple[int, int] | None = None


@dataclass(frozen=True)
class Verification:
    """What :func:`verify` found.

    Attributes:
        path: the file. rtol: what counts as close. agreements: one per executor.
    """
    path: str
    rtol: float
    agreements: tuple[Agreement, ...]

    @property
    def agrees(self) -> bool:
        """True if the file computes what torch does: float32 rounding explains every integer that differs, and the outputs that
        follow are within ``rtol``; without integers (hls4ml), if every image's largest output is the same."""
        return all(
            a.top1 == a.images if a.integers is None else a.integers.equal_but_for_ties and a.integers.output_error <= self.rtol
            for a in self.agreements)

    def __str__(self) -> str:
        lines = [self.path]
        for a in self.agreements:
            lines.append(
                f"  {a.executor}: {a.images} images, {a.exact} bit-equal, {a.close} within {self.rtol:g}, same top-1 {a.top1}, "
                f"largest difference {a.max_abs:.3g} (relative {a.max_rel:.3g})")
            if a.integers is not None and a.exact < a.images and a.max_abs:
                lines.append("    outputs are float32 sums, which each program adds in its own order: the integers below decide")
            if a.correct is not None:
                lines.append(f"    correct: file {a.correct}, torch {a.torch_correct}")
            if a.integers is None:
                lines.append(f"    integers not compared layer by layer: {a.integers_missing}")
            else:
                i = a.integers
                lines.append(f"    integers, layer by layer: {i.values - i.unequal} of {i.values} equal in {i.quantizers} "
                             f"quantizers; output then within {i.output_error:.1g}")
                if i.unequal:
                    lines.append(f"    {i.unequal} differ by at most {i.largest_step:g}, all within {i.tie_distance:.1g} steps of "
                                 f"a rounding tie: {_explanation(i)}")
            if a.hls4ml_integers is not None:
                lines.append("    integers that leave hls4ml, end to end: {} of {} equal".format(*a.hls4ml_integers))
        return "\n".join(lines)


def _explanation(check: IntegerCheck) -> str:
    if check.unbounded:
        return f"no bound is known ({check.unbounded})" + ("" if check.equal_but_for_ties else "; THE FILE COMPUTES SOMETHING ELSE")
    if check.equal_but_for_ties:
        return f"float32 sums in another order explain each ({check.bound_used:.0%} of the bound at most)"
    return f"{check.bound_used:.2g} times what float32 rounding can explain: THE FILE COMPUTES SOMETHING ELSE"


def verify(
        path: str | Path,
        model: nn.Module,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        executors: str | tuple[str, ...] = ("onnxruntime", "qonnx"),
        batch_size: int = 50,
        rtol: float = 1e-5,
        integers: bool = True,
        allow_changed: bool = False,
        progress: Callable[[int], object] | None = None) -> Verification:
    """Run an exported file and the torch model that it came from on the same images, and compare.

    End to end, two programs that add in different orders may round a value that lies on a tie differently, and differ from there
    on. The comparison of integers (:class:`IntegerCheck`) tells such images from a wrong file: it gives each layer torch's own
    activations, and takes only differences that float32's rounding errors can explain, by a bound for each value.

    Args:
        path: an ONNX file. model: the torch model, compared in evaluation mode, on the CPU.
        images: preprocessed float32 inputs ``[N, ...]``. labels: integers ``[N]``, to count correct answers.
        executors: one or several of "onnxruntime", "qonnx" and "hls4ml" (extra ``hls``; folded networks only).
        batch_size: images at a time; a file that is fixed to another batch size is run with its own.
        rtol: what counts as close, relative to the largest output of an image.
        integers: also compare the activations' integers.
        allow_changed: accept a file that another tool has changed since it was exported.
        progress: called with the number of images done, for each executor.

    Returns:
        :class:`Verification`.

    Raises:
        FileNotFoundError: if there is no such file. ValueError: if it is damaged or was changed, if an executor does not take it,
            if the images do not fit it, or the model's outputs are of another shape. TypeError: if images are no float32
            tensor, labels no tensor of integers, or model no module.

    Example:
        >>> import tempfile
        >>> from granq_plugin import quantize
        >>> from granq_plugin.export import export_qcdq
        >>> net = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval(), 4, 4)
        >>> images = torch.rand(16, 3, 6, 6)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = export_qcdq(net, images[:1], f"{folder}/net.onnx")
        ...     result = verify(file, net, images, executors=("onnxruntime", ))
        >>> result.agrees, result.agreements[0].images
        (True, 16)
    """
    check_module(model)
    proto = read_onnx(path, allow_changed)
    names = list(dict.fromkeys([executors] if isinstance(executors, str) else executors))
    unknown = [name for name in names if name not in EXECUTORS]
    if unknown or not names:
        raise ValueError(f"executors must be of {', '.join(EXECUTORS)}, got {tuple(executors)!r}")
    _check_images(images, labels, proto)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size!r}")
    batch_size = fixed_batch(proto) or batch_size
    if len(images) % batch_size and fixed_batch(proto):
        raise ValueError(f"the file takes batches of {batch_size}, of which {len(images)} images are no multiple")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    model = model.cpu()
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        agreements = [_compare(name, proto, model, images, labels, batch_size, rtol, integers, progress) for name in names]
    finally:
        model.to(device)
        for module, training in modes.items():
            module.training = training
    return Verification(str(path), rtol, tuple(agreements))


def _check_images(images, labels, proto) -> None:
    for name, value, dtypes in (("images", images, (torch.float32, )), ("labels", labels, (torch.int64, torch.int32, torch.uint8))):
        if not ((isinstance(value, Tensor) and value.dtype in dtypes) or (value is None and name == "labels")):
            got = f"{value.dtype} tensor" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a tensor of {' or '.join(map(str, dtypes))}, got {got}")
    if not len(images):
        raise ValueError("images are empty")
    if len(proto.graph.input) != 1:
        raise ValueError(f"the file has {len(proto.graph.input)} inputs; one is known here")
    shape = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    if len(shape) != images.dim() or any(n and n != m for n, m in zip(shape[1:], images.shape[1:])):
        raise ValueError(f"the file takes inputs of shape {['N', *shape[1:]]}, got images of shape {list(images.shape)}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise ValueError(f"labels must be [{len(images)}], one for each image, got {list(labels.shape)}")


def _compare(name, proto, model, images, labels, batch_size, rtol, integers, progress) -> Agreement:
    run = open_executor(name, proto)
    missing = "hls4ml computes in fixed point" if name == "hls4ml" else "" if integers else "not asked for"
    check = None if missing else _IntegerRun(name, proto)
    input_name, output_name = proto.graph.input[0].name, proto.graph.output[0].name
    exact = close = top1 = correct = torch_correct = 0
    max_abs = max_rel = 0.0
    cut_integers = None
    for start in range(0, len(images), batch_size):
        x = images[start:start + batch_size]
        with torch.no_grad(), record_quantizers(model) as recorder:
            expected = _plain(model(x)).numpy()
        outputs = run({input_name: x.numpy()})
        found = np.asarray(outputs.pop(output_name))
        if name == "hls4ml" and outputs:
            cut_integers = np.add(cut_integers or (0, 0), _equal_integers(*outputs.values(), recorder.records)).tolist()
        indices = not np.issubdtype(found.dtype, np.floating) or found.size != expected.size
        found = found.reshape(len(x), -1)
        flat = expected.reshape(len(x), -1)
        if indices:  # the file ends in top-k
            if found.shape[1] > flat.shape[1]:
                raise ValueError(f"the file gives outputs of shape {found.shape[1:]}, the model of {flat.shape[1:]}")
            same = _are_largest(found.astype(np.int64), flat)
            exact, close, top1 = exact + int(same.sum()), close + int(same.sum()), top1 + int(same.sum())
            choice = found[:, 0].astype(np.int64)
        else:
            difference = distances(found, flat)
            relative = _relative(difference, flat)
            max_abs, max_rel = max(max_abs, float(difference.max())), max(max_rel, float(relative.max()))
            exact += int((difference == 0).all(1).sum())
            close += int((relative <= rtol).sum())
            choice = found.argmax(1)
            top1 += int((choice == flat.argmax(1)).sum())
        if labels is not None:
            y = labels[start:start + batch_size].numpy()
            correct += int((choice == y).sum())
            torch_correct += int((flat.argmax(1) == y).sum())
        if check is not None:
            missing = missing or check.add(x.numpy(), recorder.records, None if indices else expected)
        if progress:
            progress(len(x))
    counted = check is not None and not missing
    return Agreement(
        name, len(images), exact, close, max_abs, max_rel, top1, None if labels is None else correct,
        None if labels is None else torch_correct, check.tally.result() if counted else None, missing,
        None if cut_integers is None else tuple(cut_integers))


def _relative(difference: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of each sample's outputs ``[B, N]``, the largest difference, relative to the largest output that is expected."""
    largest = np.nan_to_num(np.abs(expected), posinf=0).max(1)
    return difference.max(1) / np.maximum(largest, np.finfo(np.float32).tiny)


def _are_largest(indices: np.ndarray, outputs: np.ndarray) -> np.ndarray:
    """For each sample, whether ``[B, K]`` indices are those of its K largest outputs, in order; of equal ones any is first."""
    ordered, count = np.sort(indices, 1), outputs.shape[1]
    found = np.take_along_axis(outputs, indices.clip(0, count - 1), 1)
    distinct = (ordered[:, 0] >= 0) & (ordered[:, -1] < count) & (np.diff(ordered, axis=1) > 0).all(1)
    return distinct & (found == -np.sort(-outputs, 1)[:, :indices.shape[1]]).all(1)


def _equal_integers(values: np.ndarray, records: list[QuantizerRecord]) -> tuple[int, int]:
    """``(equal, all)`` of a tensor of integers beside the record that it is nearest to."""
    equal = [int((values == r.integers).sum()) for r in records if r.integers.shape == values.shape]
    return max(equal, default=0), values.size


def _plain(output) -> Tensor:
    output = getattr(output, "value", output)
    if not isinstance(output, Tensor):
        raise TypeError(f"the model must return a tensor, got {type(output).__name__}")
    return output.cpu()


class _IntegerRun:
    """Runs the file's layers on torch's activations."""

    def __init__(self, executor: str, proto) -> None:
        self.executor, self.proto, self.quantizers = executor, proto, find_quantizers(proto)
        self.input, self.output = proto.graph.input[0].name, proto.graph.output[0].name
        self.tally = self.run = None

    def add(self, x: np.ndarray, records: list[QuantizerRecord], expected: np.ndarray | None) -> str:
        """Compare one batch; the reason if that is not possible."""
        if not self.quantizers:
            return "no activation quantizer was found in the file"
        if len(records) != len(self.quantizers):
            return f"the file has {len(self.quantizers)} activation quantizers, the model ran {len(records)}"
        if self.run is None:
            found = open_executor("onnxruntime", show_integers(self.proto, self.quantizers))({self.input: x})
            self.order = match_quantizers([integers_of(q, found) for q in self.quantizers], records)
            if self.order is None:
                return "the activations in the file are of other shapes than the model's"
            forced, self.names = force_activations(self.proto, self.quantizers)
            self.run, self.tally = open_executor(self.executor, forced), IntegerTally(forced, self.quantizers)
        records = [records[i] for i in self.order]
        inputs = {self.input: x} | dict(zip(self.names, (r.value for r in records)))
        outputs = self.run(inputs)
        error = 0.0
        if expected is not None:
            flat, found = expected.reshape(len(x), -1), np.asarray(outputs[self.output]).reshape(len(x), -1)
            error = float(_relative(distances(found, flat), flat).max())
        self.tally.add(inputs, records, [integers_of(q, outputs) for q in self.quantizers], error)
        return ""
