"""Patterns of paths with named fields, such as `images/{scene}/{frame}.jpg`.

A field stands for one or more characters of one folder's or file's name, `{name*}` also for several folders, `*` for
any characters of one name that do not matter. Fields take as much as they can, from the left. A pattern never leaves
its root.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import PurePosixPath

_PIECE = re.compile(r"\{([^{}*]+)(\*?)\}|(\*)|([^{}*]+)|(.)")


@dataclass(frozen=True)
class Pattern:
    """A path with fields.

    Attributes:
        text: as written.

    Raises:
        ValueError: unbalanced braces, an absolute path, or one with `..`.
    """

    text: str

    def __post_init__(self) -> None:
        if any(kind == "stray" for kind, _ in self._pieces):
            raise ValueError(f"'{self.text}': fields are written {{name}}, or {{name*}} across folders")
        if reason := leaves_root(self.text):
            raise ValueError(f"'{self.text}' {reason}: set `root` instead")

    @cached_property
    def fields(self) -> tuple[str, ...]:
        """Names of the fields, each once, in order."""
        return tuple(dict.fromkeys(text for kind, text in self._pieces if kind in ("field", "deep")))

    @cached_property
    def wild(self) -> bool:
        """Whether a `*` stands for what does not matter."""
        return any(kind == "any" for kind, _ in self._pieces)

    @cached_property
    def weight(self) -> int:
        """Number of characters that are given: of two patterns that fit a file, the heavier one means it."""
        return sum(len(text) for kind, text in self._pieces if kind == "text")

    @cached_property
    def folder(self) -> str:
        """The folders before the first field, relative to the root; `.` if there are none."""
        fixed = re.split(r"[{*]", self.text, maxsplit=1)[0]
        return str(PurePosixPath(fixed.rpartition("/")[0]))

    def match(self, path: str) -> tuple[str, ...] | None:
        """Return the values of `fields` in a path below the root; None if it does not fit."""
        found = self._expression.fullmatch(path)
        return None if found is None else found.groups()

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the path for values of the fields."""
        return "".join(values[text] if kind in ("field", "deep") else text for kind, text in self._pieces)

    @cached_property
    def _pieces(self) -> tuple[tuple[str, str], ...]:
        return tuple(_pieces(self.text))

    @cached_property
    def _expression(self) -> re.Pattern[str]:
        numbers: dict[str, int] = {}
        parts = []
        for kind, text in self._pieces:
            if kind == "text":
                parts.append(re.escape(text))
            elif kind == "any":
                parts.append("[^/]*")
            elif text in numbers:
                parts.append(rf"(?:\{numbers[text]})")
            else:
                numbers[text] = len(numbers) + 1
                parts.append("(.+)" if kind == "deep" else "([^/]+)")
        return re.compile("".join(parts), re.DOTALL)


def leaves_root(path: str) -> str:
    """Say why a path may lead out of the folder it is relative to; empty if it cannot."""
    parts = PurePosixPath(path).parts
    if parts[:1] in (("/",), ("//",)):
        return "is absolute"
    return "leads out of the root by '..'" if ".." in parts else ""


def match_best(patterns: Sequence[Pattern], path: str) -> tuple[Pattern, tuple[str, ...]] | None:
    """Return the heaviest pattern that fits a path, the earlier of equals, and the values of its fields."""
    best = None
    for pattern in patterns:
        if (best is None or pattern.weight > best[0].weight) and (values := pattern.match(path)) is not None:
            best = pattern, values
    return best


def _pieces(text: str) -> Iterator[tuple[str, str]]:
    for field, deep, star, literal, stray in _PIECE.findall(text):
        if field:
            yield ("deep" if deep else "field"), field
        elif star:
            yield "any", star
        elif literal:
            yield "text", literal
        else:
            yield "stray", stray
