"""How the losses of the tasks become one number.

`fixed`: sum of w_t L_t. `uncertainty`: learned homoscedastic uncertainty (Kendall, Gal and Cipolla, arXiv 1705.07115):
with s_t = log sigma_t^2, a regression adds exp(-s_t) L_t / 2 + s_t / 2 (equation 7) and a classification
exp(-s_t) L_t + s_t / 2 (equation 10), each times w_t. The s_t are parameters of the module, so the engine reduces
their gradients over ranks like any other.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from configs.schema import TrainConfig
from configs.tasks import LossKind, TaskSpec
from data_pipeline.constants import constant

_CLASSIFICATION: frozenset[LossKind] = frozenset({"soft_cross_entropy", "cross_entropy", "balanced_bce"})


class FixedWeighting(nn.Module):
    """Sum of w_t L_t with constant weights."""

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self._weights = tuple(weights)

    def forward(self, loss_T: Tensor, present_T: Tensor) -> Tensor:
        """Return the weighted sum: fp32 (T,) task losses, bool (T,) which tasks the step holds -> fp32 scalar."""
        weight_T = constant(self._weights, loss_T)
        return (weight_T * torch.where(present_T, loss_T, 0.0)).sum()


class UncertaintyWeighting(nn.Module):
    """Learned homoscedastic uncertainty; `log_variance` (T,) starts at 0, that is sigma = 1."""

    def __init__(self, weights: Sequence[float], factors: Sequence[float]) -> None:
        """Take the constant weights w_t and the factors of exp(-s_t) L_t: 1/2 for regressions, 1 for classes."""
        super().__init__()
        self._weights = tuple(weights)
        self._factors = tuple(factors)
        self.log_variance = nn.Parameter(torch.zeros(len(self._weights)))

    def forward(self, loss_T: Tensor, present_T: Tensor) -> Tensor:
        """Return the weighted sum: fp32 (T,) task losses, bool (T,) which tasks the step holds -> fp32 scalar.

        A task without pairs in the whole step adds nothing: its s_t would otherwise drift down without data.
        """
        weight_T = constant(self._weights, loss_T)
        factor_T = constant(self._factors, loss_T)
        log_variance_T = self.log_variance.float()
        term_T = weight_T * (factor_T * torch.exp(-log_variance_T) * loss_T + log_variance_T / 2)
        return torch.where(present_T, term_T, 0.0).sum()


def task_weighting(config: TrainConfig, tasks: Sequence[TaskSpec]) -> FixedWeighting | UncertaintyWeighting:
    """Return the weighting that `train.task_weighting` names, with `train.task_weights` (1 where not given)."""
    weights = [config.task_weights.get(spec.name, 1.0) for spec in tasks]
    if config.task_weighting == "fixed":
        return FixedWeighting(weights)
    return UncertaintyWeighting(weights, [1.0 if spec.loss in _CLASSIFICATION else 0.5 for spec in tasks])
