"""Routing drawn at random, and how far two results are apart."""

import torch
from torch import Tensor

from model.router import Routing


def random_routing(tokens: int, num_experts: int, top_k: int, idle: int | None = None) -> Routing:
    """Routing whose leaf is `logits_SE`, the same at every call; expert `idle` is chosen by no token."""
    logits = torch.randn(tokens, num_experts, generator=torch.Generator().manual_seed(tokens))
    if idle is not None:
        logits[:, idle] = -100.0
    logits.requires_grad_()
    probs = logits.softmax(-1)
    chosen = probs.topk(top_k)
    return Routing(probs_SE=probs, gates_SK=chosen.values, experts_SK=chosen.indices, logits_SE=logits)


def relative_error(ours: Tensor, exact: Tensor) -> float:
    """Norm of the difference over the norm of `exact`, or over 1 where that is smaller: what should vanish, rounds."""
    assert ours.shape == exact.shape
    ours, exact = ours.detach(), exact.detach()
    error = (ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1)
    return float(error)
