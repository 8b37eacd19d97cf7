"""What a GPU asks of this code, checked without one: tensors on the `meta` device have no values to wait for."""

import pytest
import torch

from configs.schema import MatchingConfig
from model import experts
from model.matching import Matching
from model.mod_squad import ModSquad
from model.routing_stats import RoutingLedger
from tests.model.models import NAMES, SIDE, TASKS, VARIANTS, config


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_between_pairs_and_gradients_waits_for_the_device(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts, "_has_kernel", lambda *_: True)
    built = ModSquad(config(**{**VARIANTS[variant], "head_width": 8}), TASKS, SIDE).to("meta", torch.bfloat16)
    matching = Matching(MatchingConfig(load_balance_weight=0.1, z_loss_weight=0.1), built.expert_layers, len(TASKS))
    ledger = RoutingLedger(built.expert_layers, NAMES)
    images = torch.empty(2, 3, SIDE, SIDE, device="meta")
    pairs = torch.empty(5, dtype=torch.int64, device="meta")
    tokens, routing = built.backbone(images, pairs, pairs)
    loss = matching(routing, None).loss
    for head in built.heads.values():
        loss = loss + head(tokens).square().mean()
    loss.backward()
    ledger.update(routing)
    assert all(parameter.grad is not None for parameter in built.parameters())


def test_the_device_without_values_notices_who_reads_them() -> None:
    rows, ends = torch.empty(4, 8, device="meta"), torch.empty(2, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        experts.grouped_linear(rows, torch.empty(2, 8, 8, device="meta"), ends)
