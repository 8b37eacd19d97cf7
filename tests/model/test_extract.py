"""Extraction: which experts stay, exactness, and its stated limits."""

import json

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from model.dispatch import ExpertGroup
from model.extract import SquadModel, extract_squad, select_experts, squad_cost, unaffected_share
from model.mod_squad import ModSquad
from model.routing_stats import RoutingLedger
from tests.model.models import NAMES, TASKS, VARIANTS, images, model, parameters_of

BATCH = images(3, seed=9)


def predict(built: ModSquad, task: str, x: Tensor) -> tuple[Tensor, RoutingLedger]:
    """The large model's prediction of one task, and the usage it counted."""
    pair_image = torch.arange(len(x))
    with torch.no_grad():
        output = built.eval()(x, pair_image, torch.full_like(pair_image, NAMES.index(task)))
    ledger = RoutingLedger(built.expert_layers, NAMES)
    ledger.update(output.routing)
    return output.predictions[task], ledger


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", ["class_scene", "semseg"])
def test_threshold_zero_is_the_large_model_on_any_image(variant: str, task: str) -> None:
    built = model(**VARIANTS[variant])
    _, ledger = predict(built, task, images(1, seed=1))
    squad = extract_squad(built, task, select_experts(ledger, task, built.expert_layers, 0.0))
    expected, _ = predict(built, task, BATCH)
    assert torch.allclose(squad(BATCH), expected, atol=1e-5)


def favour(built: ModSquad, task: str, experts: list[int]) -> None:
    """Give the task routers that choose among `experts` only: their logits outweigh all others."""
    row = NAMES.index(task)
    with torch.no_grad():
        for layer in built.expert_layers:
            weight = built.get_parameter(f"backbone.{layer.name}.router.weight")
            # Mean tokens differ from 0 (norm biases are spread), so a constant direction moves every token's logits.
            norm = "norm1" if layer.kind == "attention" else "norm2"
            bias = built.get_parameter(f"backbone.blocks.{layer.block}.{norm}.bias")
            gain = built.get_parameter(f"backbone.blocks.{layer.block}.{norm}.weight")
            gain.mul_(0.2)
            weight[row][:, experts] += 20 * (bias / bias.square().sum())[:, None]


def test_tokens_whose_experts_all_survive_are_untouched() -> None:
    built = model(placement="every")
    favour(built, "normal", [0, 2, 3])
    expected, ledger = predict(built, "normal", BATCH)
    kept = select_experts(ledger, "normal", built.expert_layers, 1e-6)
    assert all(
        len(experts) < layer.num_experts for experts, layer in zip(kept.values(), built.expert_layers, strict=True)
    )

    squad = extract_squad(built, "normal", kept)
    whole = unaffected_share(built, "normal", kept, [BATCH[:2], BATCH[2:]])
    assert whole.tokens == whole.images == 1.0
    assert set(whole.layers.values()) == {1.0}
    assert torch.allclose(squad(BATCH), expected, atol=1e-5)


def test_a_router_renormalised_over_survivors_would_not_be_exact() -> None:
    """The softmax over all experts is what makes extraction exact: the removed experts hold some of its mass."""
    built = model()
    _, ledger = predict(built, "normal", BATCH)
    kept = select_experts(ledger, "normal", built.expert_layers, 0.2)
    squad = extract_squad(built, "normal", kept)
    router = squad.backbone.get_submodule("blocks.1.mlp.router")
    routing = router(torch.randn(1, 4, 16), torch.tensor([0]))
    assert routing.probs_SE.shape == (4, 4)
    assert (routing.gates_SK.sum(1) < 1).all()


@pytest.mark.parametrize("threshold", [0.2, 0.5, 1.0])
def test_unaffected_share_is_what_a_plain_count_gives(threshold: float) -> None:
    built = model()
    _, ledger = predict(built, "reshading", BATCH)
    kept = select_experts(ledger, "reshading", built.expert_layers, threshold)
    found: dict[str, Tensor] = {}
    for layer in built.expert_layers:
        router = built.get_submodule(f"backbone.{layer.name}.router")
        router.register_forward_hook(
            lambda _m, _x, routing, layer=layer: found.update(
                {layer.name: torch.tensor([set(row) <= set(kept[layer.name]) for row in routing.experts_SK.tolist()])}
            )
        )
    share = unaffected_share(built, "reshading", kept, [BATCH])
    assert share.layers == pytest.approx({name: alive.double().mean().item() for name, alive in found.items()})
    everywhere = torch.stack(list(found.values())).all(0)
    assert share.tokens == pytest.approx(everywhere.double().mean().item())
    assert share.images == pytest.approx(everywhere.view(3, -1).all(1).double().mean().item())
    assert share.tokens < 1


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_first_layer_treats_surviving_tokens_alike_even_when_others_are_lost(kind: str, renormalize: bool) -> None:
    built = model(placement=kind, renormalize_gates=renormalize)
    _, ledger = predict(built, "normal", BATCH)
    kept = select_experts(ledger, "normal", built.expert_layers, 0.45)
    squad = extract_squad(built, "normal", kept)
    first, task = f"blocks.0.{kind}", torch.zeros(1, dtype=torch.int64)
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(2))
    member = torch.ones(1, 1)
    large_layer, small_layer = (part.backbone.get_submodule(first) for part in (built.eval(), squad))
    chosen = large_layer.router(x, task).experts_SK
    alive = torch.isin(chosen, torch.tensor(kept[first])).all(-1)
    assert 0 < alive.sum() < len(alive)
    large = large_layer(x, task, torch.eye(len(TASKS))[:, :1])[0][0]
    small = small_layer(x, task, member)[0][0]
    assert torch.allclose(small[alive], large[alive], atol=1e-6)
    assert not torch.allclose(small[~alive], large[~alive], atol=1e-3)


def test_selection_keeps_what_is_used_enough_and_at_least_k() -> None:
    built = model()
    _, ledger = predict(built, "normal", BATCH)
    for threshold in (0.0, 0.3, 1.0):
        kept = select_experts(ledger, "normal", built.expert_layers, threshold)
        for layer in built.expert_layers:
            share = ledger.share(layer.name, "normal")
            used = {e for e in range(layer.num_experts) if share[e] >= threshold}
            assert used <= set(kept[layer.name])
            assert len(kept[layer.name]) == max(layer.top_k, len(used))
            removed = [share[e] for e in range(layer.num_experts) if e not in kept[layer.name]]
            assert all(share[kept[layer.name]].min() >= value for value in removed)


def test_costs_before_and_after() -> None:
    built = model(router_noise=True)
    _, ledger = predict(built, "class_scene", BATCH)
    squad = extract_squad(built, "class_scene", select_experts(ledger, "class_scene", built.expert_layers, 0.4))
    cost = squad_cost(built, squad)
    assert cost.parameters_before == parameters_of(built)
    assert cost.parameters_after == parameters_of(squad) < cost.parameters_before
    assert cost.macs_after == cost.macs_before


def test_a_squad_is_rebuilt_from_its_description_and_weights() -> None:
    built = model(shared_blocks=1, placement="every")
    _, ledger = predict(built, "semseg", BATCH)
    squad = extract_squad(built, "semseg", select_experts(ledger, "semseg", built.expert_layers, 0.4))
    copy = SquadModel.from_spec(json.loads(json.dumps(squad.spec()))).eval()
    copy.load_state_dict(squad.state_dict())
    assert torch.equal(copy(BATCH), squad(BATCH))
    assert copy.spec() == squad.spec()


def test_faults_are_named() -> None:
    built = model()
    _, ledger = predict(built, "normal", BATCH)
    everything = select_experts(ledger, "normal", built.expert_layers, 0.0)
    with pytest.raises(UserError, match="share of tokens"):
        select_experts(ledger, "normal", built.expert_layers, 1.5)
    with pytest.raises(UserError, match="no token of task 'semseg'"):
        select_experts(ledger, "semseg", built.expert_layers, 0.1)
    with pytest.raises(ValueError, match="no task 'edges'"):
        extract_squad(built, "edges", everything)
    with pytest.raises(ValueError, match="needs 2"):
        extract_squad(built, "normal", {**everything, "blocks.1.mlp": [1]})
    with pytest.raises(ValueError, match="ascending"):
        extract_squad(built, "normal", {**everything, "blocks.1.mlp": [1, 0]})
    with pytest.raises(ValueError, match="names the layers"):
        extract_squad(built, "normal", {"blocks.1.mlp": [0, 1]})
    with pytest.raises(ValueError, match="shard"):
        extract_squad(model(group=ExpertGroup(size=2)), "normal", everything)
    with pytest.raises(ValueError, match="no image"):
        unaffected_share(built, "normal", everything, [])
    spec = extract_squad(built, "normal", everything).spec()
    with pytest.raises(UserError, match="version 7"):
        SquadModel.from_spec({**spec, "version": 7})
    with pytest.raises(UserError, match="lacks 'kept'"):
        SquadModel.from_spec({key: value for key, value in spec.items() if key != "kept"})
    with pytest.raises(UserError, match="damaged"):
        SquadModel.from_spec({**spec, "kept": {}})
    with pytest.raises(UserError, match=r"damaged.*: width: [^\n]+\Z"):
        SquadModel.from_spec({**spec, "model": {**spec["model"], "depth": "deep", "width": -1}})
    with pytest.raises(UserError, match="no squad description"):
        SquadModel.from_spec(None)
