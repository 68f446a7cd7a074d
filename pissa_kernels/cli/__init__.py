"""The ``pissa-kernels`` command, one module for each subcommand: arguments in, text out."""
