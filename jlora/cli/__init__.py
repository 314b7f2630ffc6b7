"""The command `jlora`."""

from jlora.cli.run import main as main
