"""The console script `dare-hf`: answers where the command line is not installed."""

from __future__ import annotations

import sys

from dare_hf.errors import INSTALL_CLI


def main() -> None:
    """Run the command line; without typer one line on stderr and exit code 2."""
    try:
        from dare_hf.cli import app
    except ModuleNotFoundError as error:
        if error.name != "typer":
            raise
        sys.stderr.write(
            "dare-hf: expected typer, which the command line needs; got an installation without "
            f"it. {INSTALL_CLI}\n"
        )
        sys.exit(2)
    app()
