"""What a finished run leaves beside its log: the student, its images, pictures, and a summary."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from granq_plugin.atomic import atomic_path
from granq_plugin.zero_shot.plots import plot_curves, plot_images
from granq_plugin.zero_shot.recipe import ZeroShotResult
from granq_plugin.zero_shot.run_directory import add_to_run

__all__ = ["save_outcome", "save_tensors"]

MOST_COLUMNS = 16  # of a picture, a class each


def save_outcome(
        run_dir: str | Path, result: ZeroShotResult, summary: dict, mean: Sequence[float], std: Sequence[float]) -> None:
    """Write ``student.safetensors``, ``images.safetensors`` (where there is a memory), ``images.png`` and ``curves.png``, and add
    ``summary`` and the student's SHA-256 to ``run.json``.

    Args:
        summary: plain values for run.json. mean, std: of the normalization of the inputs, per channel.

    Raises:
        OSError: if a file cannot be written.
    """
    run_dir = Path(run_dir)
    sha256 = save_tensors(run_dir / "student.safetensors", result.student.state_dict())
    if len(result.images):
        save_tensors(run_dir / "images.safetensors", dict(images=result.images))
    samples, classes = _samples(result)
    if len(samples):
        plot_images(samples, run_dir / "images.png", mean, std, columns=classes or None, headings=[str(c) for c in range(classes)])
    plot_curves(result.metrics, run_dir / "curves.png")
    add_to_run(run_dir, summary | dict(student_sha256=sha256))


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Write tensors as safetensors, whole or not at all; returns the file's SHA-256. What is not a tensor is left out."""
    from safetensors.torch import save
    data = save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items() if isinstance(t, Tensor)})
    with atomic_path(path) as part:
        part.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _samples(result: ZeroShotResult, count: int = 64) -> tuple[Tensor, int]:
    """Images to look at, and the number of columns that are a class each: the generator's, of all classes in turn, or the first
    of the memory, whose classes are not known."""
    if result.generator is None:
        return result.images[:count], 0
    classes = result.generator.embedding.num_embeddings
    if classes > MOST_COLUMNS:
        return result.generator.sample(count), 0
    return result.generator.sample(count // classes * classes), classes
