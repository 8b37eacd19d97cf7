"""docs/data.md says of every task what the task table says."""

import re
from pathlib import Path

from configs.tasks import TASKS

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()


def test_the_page_lists_every_task_with_its_encoding() -> None:
    rows = re.findall(r"^\| (`.+?) \| ((?:uint|float)[^|]+) \|", PAGE, re.MULTILINE)
    stored = {task: text for tasks, text in rows for task in re.findall(r"`(\w+)`", tasks)}
    assert stored.keys() == TASKS.keys()
    for name, text in stored.items():
        encoding = TASKS[name].encoding
        channels = f" x {encoding.channels}" if encoding.channels > 1 else ""
        unknown = f", {encoding.invalid}: unknown" if encoding.invalid is not None else ""
        assert text == f"{encoding.dtype}{channels}{unknown}", name
