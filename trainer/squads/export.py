"""Models as files: a run's latest weights, the whole model in one safetensors file, a squad in its folder.

Nothing here needs DeepSpeed or a process group, so a laptop can read what a cluster has trained. Files:

    FILE.safetensors            weights of the whole model; metadata: format, config (YAML), tasks (JSON), step
    SQUAD/squad.safetensors     weights of the squad of one task or several; metadata: format
    SQUAD/squad.json            format, spec (rebuilds the module) and what the extraction measured; written last
    SQUAD/curve.json, .png      optional: what other thresholds would have given (trainer/squads/curve.py)
"""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from configs.atomic import atomic_path, cannot_write, write_text_atomically
from configs.errors import UserError
from configs.load import dump_config
from configs.schema import RunConfig
from model.extract import SquadModel, first_line
from model.mod_squad import ModSquad
from trainer.run_files import parse_json, read_config, read_text
from trainer.squads.summary import SquadSummary

MODEL_FORMAT = "modsquad.model.1"
SQUAD_FORMAT = "modsquad.squad.2"
SQUAD_WEIGHTS, SQUAD_FILE = "squad.safetensors", "squad.json"
CURVE_FILE, CURVE_PICTURE = "curve.json", "curve.png"

_MODEL = "model."  # where the trained module holds the model
_CPU = torch.device("cpu")


def available_device() -> torch.device:
    """Return the GPU where there is one, else the CPU: for what one process does with a whole model."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_run_model(run_dir: Path, device: torch.device = _CPU) -> tuple[ModSquad, RunConfig, int]:
    """Return the whole model of a run, its configuration and the step of its latest checkpoint.

    The weights are the fp32 masters, whatever precision and number of ranks trained them; all experts are here. The
    model is in eval mode.

    Raises:
        UserError: the folder is no run, has no checkpoint, or the checkpoint does not fit the configuration.
    """
    from trainer.checkpoint.reading import read_weights  # noqa: PLC0415 (DeepSpeed comes with it; squads do without)

    config = read_config(run_dir)
    step, trained = read_weights(run_dir)
    # Weights of the task weighting stand beside the model's; only training needs them.
    weights = {name.removeprefix(_MODEL): value for name, value in trained.items() if name.startswith(_MODEL)}
    model = ModSquad(config.model, config.task_specs, config.data.image_size)
    _load(model, weights, f"the checkpoint of step {step} in {run_dir}")
    return model.to(device).eval(), config, step


def export_model(run_dir: Path, out: Path) -> None:
    """Write the whole model of a run's latest checkpoint as one safetensors file, fp32.

    Raises:
        UserError: see `load_run_model`; or `out` cannot be written.
    """
    save_model(out, *load_run_model(run_dir))


def save_model(out: Path, model: ModSquad, config: RunConfig, step: int) -> None:
    """Write a whole model (all experts here) as one safetensors file that `load_exported` reads.

    Raises:
        UserError: `out` cannot be written.
    """
    metadata = {
        "format": MODEL_FORMAT,
        "config": dump_config(config),
        "tasks": json.dumps([spec.name for spec in config.task_specs]),
        "step": str(step),
    }
    _save_weights(out, model, metadata)


def load_exported(path: Path, device: torch.device = _CPU) -> tuple[ModSquad, RunConfig, int]:
    """Return what `export_model` wrote: the model in eval mode, its configuration and its step.

    Raises:
        UserError: no such file, or it is not an exported model.
    """
    metadata, weights = _read_weights(path, MODEL_FORMAT)
    try:
        config, step = RunConfig.model_validate(yaml.safe_load(metadata["config"])), int(metadata["step"])
    except KeyError as error:
        raise UserError(f"{path}: its metadata lacks {error}: export the run again") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: its configuration does not fit this program: {first_line(error)}") from None
    model = ModSquad(config.model, config.task_specs, config.data.image_size)
    _load(model, weights, str(path))
    return model.to(device).eval(), config, step


def save_squad(folder: Path, squad: SquadModel, summary: SquadSummary) -> None:
    """Write a squad's weights and its description; the folder is complete once squad.json is there.

    Raises:
        UserError: the folder cannot be written.
    """
    # What describes older weights must not stand beside new ones, should we stop in between.
    try:
        for name in (SQUAD_FILE, CURVE_FILE, CURVE_PICTURE):
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    _save_weights(folder / SQUAD_WEIGHTS, squad, {"format": SQUAD_FORMAT})
    measured = json.loads(summary.model_dump_json())  # null where a metric could not be computed
    values = {"format": SQUAD_FORMAT, **measured, "spec": squad.spec()}
    write_text_atomically(folder / SQUAD_FILE, json.dumps(values, indent=2, allow_nan=False) + "\n")


def load_squad(folder: Path, device: torch.device = _CPU) -> SquadModel:
    """Return the squad in `folder`, in eval mode: `squad(images (B, 3, S, S) in [-1, 1])` -> a prediction per task.

    Raises:
        UserError: the folder holds no complete squad, or its parts do not fit each other.
    """
    values = read_squad_json(folder)
    squad = SquadModel.from_spec(values.get("spec"))
    _, weights = _read_weights(folder / SQUAD_WEIGHTS, SQUAD_FORMAT)
    _load(squad, weights, str(folder))
    return squad.to(device).eval()


def read_squad_json(folder: Path) -> dict[str, Any]:
    """Return the content of squad.json.

    Raises:
        UserError: it is absent, damaged or of another format.
    """
    path = folder / SQUAD_FILE
    if not path.is_file():
        raise UserError(f"{folder} holds no squad: {SQUAD_FILE} is absent (`modsquad extract` writes one)")
    values = parse_json(read_text(path), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} does not describe a squad: extract again")
    if values.get("format") != SQUAD_FORMAT:
        raise UserError(f"{path} has format {values.get('format')!r}, this program reads {SQUAD_FORMAT}: extract again")
    return values


def _save_weights(path: Path, module: nn.Module, metadata: dict[str, str]) -> None:
    # Copies: safetensors refuses tensors that share memory, and a squad may hold views of the whole model's experts.
    weights = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(weights, temporary, metadata=metadata)
        temporary.chmod(mode)  # save_file lets nobody but the owner read


def _read_weights(path: Path, expected: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return metadata and tensors of a safetensors file of format `expected`."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != expected:
                raise UserError(f"{path} has format {metadata.get('format')!r}, expected {expected}")
            return metadata, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or no safetensors file: {error}") from None


def _load(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[1:2] or [str(error)]
        raise UserError(f"{where} does not fit its configuration: {reason[0].strip()}") from None
