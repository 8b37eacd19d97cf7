"""Which samples of a described folder or table belong to a part such as train or val."""

import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from configs.errors import UserError
from data_pipeline.source import Problem
from data_pipeline.sources.folder_files import Found, Row, printable
from data_pipeline.sources.folder_spec import REST, SplitRule


def take_part(found: Found, rule: SplitRule, part: str, folder: Path) -> tuple[Found, str]:
    """Return the samples of a part, in their order, and a line on how the rule parts all samples.

    Problems that belong to no sample stay with every part.

    Args:
        found: all samples.
        rule: how they are parted.
        part: which to take.
        folder: where relative paths of lists begin.

    Raises:
        UserError: no such part, one without a sample, or a list that cannot be read.
    """
    if rule.lists:
        chosen, problems = _listed(found.rows, rule, part, folder)
        counts = {part: len(chosen)}
    else:
        part_of = _by_field(rule.field) if rule.field is not None else _by_hash(rule)
        counts = dict(sorted(Counter(map(part_of, found.rows)).items()))
        if part not in counts:
            raise UserError(f"split: no sample is of part '{part}': there are {printable(', '.join(counts))}")
        chosen, problems = [row for row in found.rows if part_of(row) == part], []
    shares = ", ".join(f"{count} {name}" for name, count in counts.items())
    fact = printable(f"part {part} of {len(found.rows)} samples: {shares}")
    return Found(chosen, [*found.problems, *problems]), fact


def _by_field(name: str) -> Callable[[Row], str]:
    return lambda row: row.fields[name]


def _by_hash(rule: SplitRule) -> Callable[[Row], str]:
    """The part by where a hash in [0, 1) falls among the fractions, laid end to end; the rest is `REST`."""
    ends = list(itertools.accumulate(rule.fractions.values()))

    def part_of(row: Row) -> str:
        text = "\0".join(row.fields[name] for name in rule.by) if rule.by else row.name
        place = int.from_bytes(hashlib.sha256(os.fsencode(text)).digest()[:8], "big") / 2**64
        return next((name for name, end in zip(rule.fractions, ends, strict=True) if place < end), REST)

    return part_of


def _listed(rows: list[Row], rule: SplitRule, part: str, folder: Path) -> tuple[list[Row], list[Problem]]:
    """The samples that a list names, and its lines that name none or one again."""
    if part not in rule.lists:
        raise UserError(f"split: there is no list for part '{part}': there are {', '.join(rule.lists)}")
    path = folder / rule.lists[part]
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"split.lists.{part}: {path} cannot be read: {error.strerror}") from None
    by_image = {row.relative: row.name for row in rows}
    names = {row.name for row in rows}
    listed: dict[str, None] = {}
    problems = []
    for line in filter(None, map(str.strip, lines)):
        name = line if line in names else by_image.get(line)
        if name is None:
            reason = "the list names it, but there is no such sample"
            problems.append(Problem(printable(line), "", reason, str(path)))
        elif name in listed:
            problems.append(Problem(printable(line), "", "the list names it twice; it is used once", str(path)))
        else:
            listed[name] = None
    if not listed:
        example = printable(rows[0].name)
        raise UserError(f"split.lists.{part}: {path} names none of the {len(rows)} samples, such as '{example}'")
    return [row for row in rows if row.name in listed], problems
