"""The ``granq`` command: ``python -m granq_plugin``."""

import sys


def main() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 2."""
    try:
        try:
            from granq_plugin.cli import run
        except ModuleNotFoundError as e:
            sys.exit(f"granq: error: the command line needs {e.name!r}: pip install 'granq-plugin[zoo]'")
        code = run()
    except KeyboardInterrupt:  # while it starts or ends
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
