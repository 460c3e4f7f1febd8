"""The command line ``rtrl``; the app and its commands need the extra ``cli``, this module does not."""

import sys

_NEEDED = ("typer", "rich")


def main() -> None:
    """Run the command line, or say which packages it needs where they are not installed."""
    try:
        from rtrl.cli.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _NEEDED:
            raise
        sys.stderr.write(f"The command rtrl needs {missing}, which is not installed: pip install 'rtrl[cli]'\n")
        raise SystemExit(2) from None
    app()
