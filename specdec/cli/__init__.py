"""The `specdec` command. Each verb is a module with `register(app)`; heavy imports wait until a verb runs."""

from specdec.cli.app import main

__all__ = ["main"]
