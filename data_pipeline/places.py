"""What a user names as the place of shards: `data.train`, `data.val`, or an argument of `modsquad data`."""

from pathlib import Path

from configs.schema import DataConfig
from data_pipeline.local_storage import LocalStorage
from data_pipeline.storage import Storage


def open_storage(place: Path | str, config: DataConfig) -> Storage:
    """Return the storage of a folder."""
    return LocalStorage(Path(place))
