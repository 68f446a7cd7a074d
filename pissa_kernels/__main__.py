"""``python -m pissa_kernels``: the same as the ``pissa-kernels`` command."""

from .cli.main import command

if __name__ == "__main__":
    raise SystemExit(command())
