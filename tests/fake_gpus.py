"""Makes programs believe that they see GPUs, as far as choosing one goes: nothing can be computed on them."""

import os
from pathlib import Path

_SITE = """
import types
import torch

torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: {count}
torch.cuda.set_device = lambda gpu: None
torch.cuda.get_device_properties = lambda gpu: types.SimpleNamespace(uuid=f"GPU-{{gpu}}")
"""


def python_path_with_gpus(folder: Path, count: int) -> str:
    """Return a PYTHONPATH with which every Python program sees `count` GPUs; `folder` is for what that needs."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_SITE.format(count=count))
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
