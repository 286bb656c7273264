"""`specdec pull demo`: fetch the demo model."""

from pathlib import Path
from typing import Annotated

import typer

from specdec.cli.common import friendly_errors, starting


def register(app: typer.Typer) -> None:
    app.command()(pull)


@friendly_errors
def pull(
    name: Annotated[str, typer.Argument(help="The model to fetch; only 'demo'.")],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="Install into DIR instead of the user's cache.")
    ] = None,
) -> None:
    """Fetch the demo model (93 MB; 640 MB on disk) and check it; does nothing if it is there."""
    if name != "demo":
        raise ValueError(f"cannot pull {name!r}; only 'demo' is pulled, a hub model is fetched when it is first used")
    with starting():
        from specdec import models

    print(models.pull_demo(to))
