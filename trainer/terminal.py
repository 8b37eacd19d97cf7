"""Lines on the terminal."""

from rich.console import Console
from rich.text import Text


def say(text: str, *, console: Console | None = None, style: str = "") -> None:
    """Print lines to `console` (None: standard output) as they are: no markup in brackets, nothing wrapped."""
    (console or Console()).print(Text(text, style), soft_wrap=True)
