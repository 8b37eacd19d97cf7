"""Which parameters decay, and the learning rate of every step: the parts of AdamW (arXiv 1711.05101) that are ours."""

import math
from collections.abc import Iterator
from typing import Any

from torch import nn

from configs.schema import OptimConfig

_NEVER_DECAYED = ("bias", "embedding", "position")


def param_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters of `module` for AdamW by weight decay and by kind.

    Matrices decay; biases, norms, learned positions, embeddings and weights of tasks do not. A parameter with
    `is_expert` stacks one tensor per expert along its first dimension, which does not count.

    Returns:
        Up to four groups, none empty: {"params", "weight_decay", "expert": bool}, in an order that depends on the
        module alone.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, owner, parameter in _named_parameters(module):
        expert = bool(getattr(parameter, "is_expert", False))
        groups.setdefault((expert, _decays(name, owner, parameter, expert)), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "expert": expert}
        for (expert, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def learning_rate(step: int, optim: OptimConfig, steps: int) -> float:
    """Learning rate of step `step` (from 0) of `steps`: linear warm-up, then half a cosine (arXiv 1608.03983).

    The last warm-up step runs at `optim.lr`, the last step of all at `optim.min_lr`, and later ones too.
    """
    if step < optim.warmup_steps:
        return optim.lr * ((step + 1) / optim.warmup_steps)
    after_peak = min(1.0, (step + 1 - optim.warmup_steps) / max(1, steps - optim.warmup_steps))
    return optim.min_lr + 0.5 * (optim.lr - optim.min_lr) * (1 + math.cos(math.pi * after_peak))


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Parameter]]:
    """Yield (own name, owner, parameter) of each trainable parameter once."""
    seen: set[nn.Parameter] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)
                yield name, owner, parameter


def _decays(name: str, owner: nn.Module, parameter: nn.Parameter, expert: bool) -> bool:
    shape = parameter.shape[1:] if expert else parameter.shape
    is_matrix = sum(size > 1 for size in shape) >= 2
    return is_matrix and not isinstance(owner, nn.Embedding) and not any(word in name for word in _NEVER_DECAYED)
