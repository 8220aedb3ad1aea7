"""``granq demo``: the whole way of a small network on images that need no download, and a report of it."""

__all__ = ["run_demo"]


def __getattr__(name: str):
    if name == "run_demo":  # torch and the rest only when it runs
        from zoo.demo.pipeline import run_demo
        return run_demo
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
