"""One task's squads beside the large model they come from: one image, forward only."""

import torch
from torch import Tensor, nn

from configs.tasks import get_task
from model.extract import SquadModel, extract_squad
from model.mod_squad import ModSquad
from trainer.bench.comparison import DTYPES, Batch, Case, Comparison, Settings, compare
from trainer.bench.training_step import TASKS, image_batches, mod_squad

TASK = get_task("normal")
ROUNDS = 25


def compare_squads(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure squads that keep all, half and the fewest experts against the large model on the same task."""
    large = mod_squad(settings, "fp32").eval()
    layers = large.expert_layers
    kept = {
        "squad, all experts": {layer.name: range(layer.num_experts) for layer in layers},
        "squad, half of them": {layer.name: range(max(layer.num_experts // 2, layer.top_k)) for layer in layers},
        "squad, K per layer": {layer.name: range(layer.top_k) for layer in layers},
    }
    # Extraction is float32; so is the large model, until its squads have left.
    squads = {name: extract_squad(large, [TASK.name], experts) for name, experts in kept.items()}
    return [
        compare(
            "squads",
            f"one image, task {TASK.name}, {settings.image_size} px, forward only",
            dtype,
            settings,
            _large_case(large.to(DTYPES[dtype])),
            [_squad_case(name, squad.to(DTYPES[dtype])) for name, squad in squads.items()],
            image_batches(settings, images=1),
            rounds=ROUNDS,
        )
    ]


def _large_case(model: ModSquad) -> Case:
    """Return the case of one task in the large model."""

    def forward(batch: Batch) -> tuple[Tensor, None]:
        pair_image = torch.arange(len(batch.x))
        pair_task = torch.full_like(pair_image, TASKS.index(TASK))
        return model(batch.x, pair_image, pair_task).predictions[TASK.name], None

    return Case(name="large model", module=model, passes=[forward], backward=False, note=_size(model))


def _squad_case(name: str, squad: SquadModel) -> Case:
    def forward(batch: Batch) -> tuple[Tensor, None]:
        return squad(batch.x)[TASK.name], None

    return Case(name=name, module=squad, passes=[forward], backward=False, note=_size(squad))


def _size(module: nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M parameters"
