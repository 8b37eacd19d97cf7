"""Losses on routing statistics: what matches experts with tasks (arXiv 2212.08066, section 3).

Per expert layer, with S[t, e] the mean over the tokens of task t of the full softmax p(e | x, t) and the prior P(t):

    P(e) = sum_t P(t) S[t, e]        I(T;E) = sum_{t,e} P(t) S[t, e] log( S[t, e] / P(e) )

The statistics are those of the global batch: one packed sum over all ranks serves all layers, so the value and the
gradient do not depend on the number of ranks. All of this is a few thousand numbers, done in float64.

Shape legend: T tasks, E experts, K chosen experts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from configs.schema import MatchingConfig
from model.dispatch import sum_over_ranks
from model.layer_routing import ExpertLayerInfo, LayerRouting


def mutual_information(S_TE: Tensor, prior_T: Tensor) -> Tensor:
    """Return I(T;E) in nats, a scalar in [0, min(log T, log E)] up to rounding.

    0 log 0 is 0 with a finite gradient, and equal rows give exactly 0.

    Args:
        S_TE: (T, E) floating, row t is P(e | t); rows of tasks without prior are ignored.
        prior_T: (T,) floating, P(t), summing to 1.
    """
    # sum_t P(t) S[t], written around one row: with equal rows the differences vanish exactly, whatever the rounding.
    row_E = S_TE.index_select(0, prior_T.argmax().view(1))
    marginal_E = row_E[0] + prior_T @ (S_TE - row_E)
    return (prior_T[:, None] * S_TE * (_log(S_TE) - _log(marginal_E))).sum()


def conditional_entropy(S_TE: Tensor, prior_T: Tensor) -> Tensor:
    """Return H(E|T) = -sum_t P(t) sum_e S[t, e] log S[t, e] in nats, a scalar.

    Args:
        S_TE: (T, E) floating, row t is P(e | t).
        prior_T: (T,) floating, P(t), summing to 1.
    """
    return -(prior_T[:, None] * S_TE * _log(S_TE)).sum()


def load_balance(
    prob_sum_TE: Tensor, counts_TE: Tensor, tokens_T: Tensor, top_k: int, *, over: Literal["batch", "task"] = "batch"
) -> Tensor:
    """Return the switch load-balance loss E * sum_e f_e P_e, a scalar: 1 when even, up to E when collapsed.

    f_e is the share of all choices that named expert e and P_e the mean probability of e (arXiv 2101.03961, eq. 4-6).
    0 without tokens.

    Args:
        prob_sum_TE: (T, E) floating with gradient.
        counts_TE: (T, E) floating.
        tokens_T: (T,) floating.
        top_k: choices per token.
        over: `batch`: f and P are those of all tokens; `task`: the mean of the loss of each task that has tokens.
    """
    if over == "batch":
        prob_sum_TE, counts_TE, tokens_T = (x.sum(0, keepdim=True) for x in (prob_sum_TE, counts_TE, tokens_T))
    tokens_T1 = tokens_T[:, None].clamp_min(1)
    balance_T = prob_sum_TE.shape[-1] * (counts_TE / (tokens_T1 * top_k) * prob_sum_TE / tokens_T1).sum(1)
    return balance_T.sum() / (tokens_T > 0).sum().clamp_min(1)


@dataclass(frozen=True, kw_only=True)
class MatchingResult:
    """The matching loss of one forward pass and what it is made of.

    Attributes:
        loss: scalar float32 with gradient, to be added to the task losses once on every rank.
        mutual_information: I(T;E) in nats per layer that sees the task; detached scalars.
        conditional_entropy: H(E|T) in nats per layer that sees the task; detached scalars.
        load_balance: switch load balance per expert layer (1 = even) over what the configuration names; detached
            scalars.
    """

    loss: Tensor
    mutual_information: dict[str, Tensor]
    conditional_entropy: dict[str, Tensor]
    load_balance: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class _GlobalSums:
    """`LayerRouting` of the global batch, float64."""

    prob_sum_TE: Tensor
    counts_TE: Tensor
    tokens_T: Tensor
    z_sum: Tensor


class Matching:
    """The matching loss with its running mean of S.

    A task that the step sees contributes its statistics of this step. A task that it does not see is represented by
    the running mean of earlier steps, without gradient. A task never seen is left out, and the prior is renormalised.

    Not an `nn.Module`: casting the model to bfloat16 must not touch the running mean.
    """

    def __init__(
        self,
        config: MatchingConfig,
        layers: Sequence[ExpertLayerInfo],
        num_tasks: int,
        *,
        prior: Sequence[float] | None = None,
    ) -> None:
        """Start with no task seen.

        Args:
            config: weights and decay.
            layers: every expert layer of the model.
            num_tasks: tasks T.
            prior: P(t) up to a factor, one positive number per task; None: uniform.
        """
        shares = torch.ones(num_tasks, dtype=torch.float64) if prior is None else torch.tensor(prior).double()
        if shares.shape != (num_tasks,) or not bool((shares > 0).all()):
            raise ValueError(f"prior must hold {num_tasks} positive numbers, one per task")
        self.config = config
        self._layers = tuple(layers)
        self._prior_T = shares / shares.sum()
        # A row of zeros belongs to a task never seen: rows of seen tasks sum to 1.
        self._running = {
            layer.name: torch.zeros(num_tasks, layer.num_experts) for layer in self._layers if layer.sees_task
        }

    def __call__(
        self, routing: Sequence[LayerRouting], process_group: torch.distributed.ProcessGroup | None
    ) -> MatchingResult:
        """Return the loss of the global batch and move the running mean.

        Every rank must call it the same number of times. Every rank adds the same loss, and gradients are then
        *averaged* over ranks: `sum_over_ranks` sums gradients in backward, which cancels that average.

        Args:
            routing: this rank's sums, one per layer, in the order of the layers.
            process_group: the ranks that share the global batch; None: all ranks, if there are several.
        """
        assert tuple(layer.info for layer in routing) == self._layers, "routing of another model"
        information, entropy, balance = {}, {}, {}
        loss = torch.zeros((), dtype=torch.float64, device=routing[0].z_sum.device if routing else None)
        self._prior_T = self._prior_T.to(loss.device)  # once: each copy would wait for the device
        for layer, sums in zip(self._layers, _sum_packed(routing, process_group), strict=True):
            balance[layer.name] = load_balance(
                sums.prob_sum_TE,
                sums.counts_TE,
                sums.tokens_T,
                layer.top_k,
                over=self.config.load_balance_over,
            )
            loss = loss + self.config.load_balance_weight * balance[layer.name]
            loss = loss + self.config.z_loss_weight * sums.z_sum / sums.tokens_T.sum().clamp_min(1)
            if layer.sees_task:
                S_TE, prior_T = self._statistics(layer.name, sums)
                information[layer.name] = mutual_information(S_TE, prior_T)
                entropy[layer.name] = conditional_entropy(S_TE, prior_T)
                loss = loss - self.config.weight * information[layer.name]
        return MatchingResult(
            loss=loss.float(),
            mutual_information=_detached(information),
            conditional_entropy=_detached(entropy),
            load_balance=_detached(balance),
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Return the running mean per layer name: (T, E) float32 on the CPU, rows of zeros for tasks never seen."""
        return {name: running_TE.cpu().clone() for name, running_TE in self._running.items()}

    def snapshot(self) -> dict[str, Tensor]:
        """Return what `state_dict` would, on the device and without waiting for it."""
        return dict(self._running)  # a new mean replaces the old one

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over a running mean, from any device.

        Raises:
            ValueError: the layers or their shapes are not those of this model.
        """
        have = {name: tuple(value.shape) for name, value in self._running.items()}
        given = {name: tuple(value.shape) for name, value in state.items()}
        if have != given:
            raise ValueError(f"matching state of another model: has {given}, expected {have}")
        self._running = {name: state[name].float().clone() for name in have}

    def _statistics(self, name: str, sums: _GlobalSums) -> tuple[Tensor, Tensor]:
        """Return S (T, E) and the prior (T,) over the tasks known by now, float64; moves the running mean."""
        running_TE = self._running[name].to(sums.prob_sum_TE.device)
        seen_T1 = sums.tokens_T[:, None] > 0
        met_T1 = running_TE.sum(1, keepdim=True) > 0
        S_TE = torch.where(seen_T1, sums.prob_sum_TE / sums.tokens_T[:, None].clamp_min(1), running_TE.double())

        fresh_TE = S_TE.detach().float()
        moved_TE = torch.where(met_T1, torch.lerp(fresh_TE, running_TE, self.config.ema_decay), fresh_TE)
        self._running[name] = torch.where(seen_T1, moved_TE, running_TE)

        prior_T = self._prior_T * (seen_T1 | met_T1)[:, 0]
        return S_TE, prior_T / prior_T.sum().clamp_min(_TINY)


_TINY = torch.finfo(torch.float32).tiny


def _log(p: Tensor) -> Tensor:
    """Logarithm for terms p log q: exact for every normal float32, finite with a zero gradient at 0."""
    return p.clamp_min(_TINY).log()


def _detached(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().float() for name, value in values.items()}


def _sum_packed(
    routing: Sequence[LayerRouting], process_group: torch.distributed.ProcessGroup | None
) -> list[_GlobalSums]:
    """Sum the statistics of all layers over all ranks in one collective; a model without experts needs none."""
    if not routing:
        return []
    parts = [
        part.double() for layer in routing for part in (layer.prob_sum_TE, layer.counts_TE, layer.tokens_T, layer.z_sum)
    ]
    flat = sum_over_ranks(torch.cat([part.reshape(-1) for part in parts]), process_group)
    summed = [
        piece.view(part.shape)
        for piece, part in zip(torch.split(flat, [part.numel() for part in parts]), parts, strict=True)
    ]
    return [
        _GlobalSums(prob_sum_TE=prob, counts_TE=counts, tokens_T=tokens, z_sum=z)
        for prob, counts, tokens, z in zip(*(summed[i::4] for i in range(4)), strict=True)
    ]
