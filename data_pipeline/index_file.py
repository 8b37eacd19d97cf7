"""The text of index.json: a few facts about the folder, then one entry per shard, each on a line of its own.

The index of a large dataset is a gigabyte of JSON, many times that as Python objects. So entries are written and read
one at a time.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from pydantic import BaseModel, ConfigDict, PositiveInt

from data_pipeline.tarscan import ShardEntry

INDEX_FILE = "index.json"

_OPENING = re.compile(r',\s*"shards"\s*:\s*\[\s*')
_BETWEEN = re.compile(r"\s*,\s*")
_CLOSING = re.compile(r"\s*\]\s*\}\s*\Z")


class IndexHead(BaseModel):
    """What index.json says before its `shards`, which come last, sorted by file name.

    Attributes:
        version: of this format.
        side: height and width of every stored image, in pixels.
        tasks: labels that at least one sample has, sorted; for those who look into the file, as the shards' entries say
            it again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    side: PositiveInt
    tasks: tuple[str, ...]


def format_index(head: IndexHead, entries: Iterable[str]) -> Iterator[str]:
    """Yield the pieces of index.json; `entries` are shards' JSON, at least one."""
    yield head.model_dump_json().removesuffix("}") + ',"shards":['
    for number, entry in enumerate(entries):
        yield (",\n" if number else "\n") + entry
    yield "\n]}\n"


def parse_index(text: str) -> tuple[IndexHead, Iterator[ShardEntry]]:
    """Return the facts, and the shards to be read on the way.

    Raises:
        ValueError: the text is not an index of this version; may come from the iterator.
    """
    opening = _OPENING.search(text)
    head = IndexHead.model_validate_json(text if opening is None else text[: opening.start()] + "}")
    if opening is None:
        raise ValueError("it lists no shards")
    return head, _parse_entries(text, opening.end())


def _parse_entries(text: str, place: int) -> Iterator[ShardEntry]:
    decoder = json.JSONDecoder()
    while True:
        values, place = decoder.raw_decode(text, place)
        yield ShardEntry.model_validate(values)
        between = _BETWEEN.match(text, place)
        if between is None:
            break
        place = between.end()
    if _CLOSING.match(text, place) is None:
        raise ValueError(f"its list of shards breaks off at character {place}")
