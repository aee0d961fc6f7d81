"""What every command prints with."""

import sys
from typing import NoReturn

from rich.console import Console

console = Console()


def fail(message: str, status: int = 2) -> NoReturn:
    """Print an error and exit."""
    print(f"Error: {message}", file=sys.stderr)
    raise SystemExit(status)
