from pathlib import Path

import pytest

from tests.ranks import run_ranks
from tests.trainer.tiny_run import save_tiny_run, write_shards


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder to read only: a checkpoint whose experts were sharded over two ranks, and validation shards."""
    folder = tmp_path_factory.mktemp("tiny-run")
    write_shards(folder / "val", samples=5)
    run_ranks(save_tiny_run, 2, str(folder))
    return folder
