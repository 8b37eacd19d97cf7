"""What a GPU asks of this code, checked without one: tensors on the `meta` device have no values to wait for."""

import pytest
import torch

from configs.schema import MatchingConfig
from model import expert_runs
from model.expert_order import expert_order
from model.matching import Matching
from model.mod_squad import ModSquad
from model.routing_stats import RoutingLedger
from tests.model.models import NAMES, SIDE, TASKS, VARIANTS, config, images, model, pairs


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_between_pairs_and_gradients_waits_for_the_device(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_runs, "_has_kernel", lambda *_: True)
    built = ModSquad(config(**{**VARIANTS[variant], "head_width": 8}), TASKS, SIDE).to("meta", torch.bfloat16)
    matching = Matching(MatchingConfig(load_balance_weight=0.1, z_loss_weight=0.1), built.expert_layers, len(TASKS))
    ledger = RoutingLedger(built.expert_layers, NAMES)
    images = torch.empty(2, 3, SIDE, SIDE, device="meta")
    pairs = torch.empty(5, dtype=torch.int64, device="meta")
    turns = torch.empty(2, 2, dtype=torch.int64, device="meta")
    tokens, routing = built.backbone(images, pairs, pairs, turns)
    loss = matching(routing, None).loss
    for head in built.heads.values():
        loss = loss + head(tokens).square().mean()
    loss.backward()
    ledger.update(routing)
    assert all(parameter.grad is not None for parameter in built.parameters())


def test_the_device_without_values_notices_who_reads_them() -> None:
    chosen = torch.empty(4, dtype=torch.int64, device="meta")
    order = expert_order(chosen, chosen, 4, 2)
    with pytest.raises(RuntimeError, match="meta"):
        expert_runs.ends_on_host(order, torch.empty(4, 8, device="meta"), [8])


def test_without_the_fused_kernel_the_host_waits_once_per_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    built = model().train()
    asked: list[str] = []
    real = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: (asked.append("ends"), real(tensor))[1])
    tokens, _ = built.backbone(images(2), *pairs([0, 1], [1]))
    assert len(asked) == len(built.expert_layers)
    tokens.sum().backward()
    assert len(asked) == len(built.expert_layers)
