"""Extraction: which experts stay, exactness, and its stated limits."""

import json
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from model.dispatch import ExpertGroup
from model.extract import SquadModel, extract_squad, select_experts, squad_cost
from model.mod_squad import ModSquad
from model.routing_stats import RoutingLedger
from tests.model.models import NAMES, TASKS, VARIANTS, images, model, parameters_of

BATCH = images(3, seed=9)


def predict(built: ModSquad, tasks: Sequence[str], x: Tensor) -> tuple[dict[str, Tensor], RoutingLedger]:
    """The large model's predictions of some tasks, and the usage it counted."""
    ids = sorted(NAMES.index(task) for task in tasks)
    pair_image = torch.arange(len(x)).repeat(len(ids))
    with torch.no_grad():
        output = built.eval()(x, pair_image, torch.tensor(ids).repeat_interleave(len(x)))
    ledger = RoutingLedger(built.expert_layers, NAMES)
    ledger.update(output.routing)
    return {task: output.predictions[task] for task in tasks}, ledger


def assert_same(squad: SquadModel, expected: dict[str, Tensor], x: Tensor) -> None:
    found = squad(x)
    assert list(found) == list(expected)
    for task, prediction in found.items():
        assert torch.allclose(prediction, expected[task], atol=1e-5), task


@pytest.mark.parametrize("tasks", [["class_scene"], ["semseg"], ["semseg", "normal", "class_scene"]], ids="+".join)
@pytest.mark.parametrize("variant", VARIANTS)
def test_threshold_zero_is_the_large_model_on_any_image(variant: str, tasks: list[str]) -> None:
    built = model(**VARIANTS[variant])
    _, ledger = predict(built, tasks, images(1, seed=1))
    squad = extract_squad(built, tasks, select_experts(ledger, tasks, built.expert_layers, 0.0))
    expected, _ = predict(built, tasks, BATCH)
    assert_same(squad, expected, BATCH)


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


def test_images_whose_experts_all_survive_keep_their_predictions() -> None:
    """Two tasks that use different experts: each alone, then both in one squad."""
    built = model(placement="every", mlp_experts=6)
    favour(built, "normal", [0, 2, 3])
    favour(built, "semseg", [2, 4])
    expected, ledger = predict(built, ["normal", "semseg"], BATCH)
    for tasks in (["normal"], ["semseg"], ["normal", "semseg"]):
        kept = select_experts(ledger, tasks, built.expert_layers, 1e-6)
        layers = zip(kept.values(), built.expert_layers, strict=True)
        assert all(len(experts) < layer.num_experts for experts, layer in layers)
        assert_same(extract_squad(built, tasks, kept), {task: expected[task] for task in tasks}, BATCH)


def test_tasks_that_leave_together_share_the_union_of_what_each_needs() -> None:
    built = model(placement="every", mlp_experts=6)
    favour(built, "normal", [0, 2, 3])
    favour(built, "semseg", [2, 4])
    _, ledger = predict(built, ["normal", "semseg"], BATCH)
    alone, other, union = (
        select_experts(ledger, tasks, built.expert_layers, 0.6)
        for tasks in (["normal"], ["semseg"], ["normal", "semseg"])
    )
    for layer in built.expert_layers:
        assert union[layer.name] == sorted({*alone[layer.name], *other[layer.name]})
        assert len(union[layer.name]) > len(alone[layer.name])


def test_blocks_shared_by_all_tasks_run_once_per_image() -> None:
    built = model(shared_blocks=1)
    _, ledger = predict(built, NAMES, BATCH)
    squad = extract_squad(built, NAMES, select_experts(ledger, NAMES, built.expert_layers, 0.0))
    rows: list[int] = []
    for block in squad.backbone.blocks:
        block.register_forward_hook(lambda _block, inputs, _output: rows.append(len(inputs[0])))
    squad(BATCH)
    assert rows == [len(BATCH), len(BATCH) * len(NAMES), len(BATCH) * len(NAMES)]


def test_a_router_renormalised_over_survivors_would_not_be_exact() -> None:
    """The softmax over all experts is what makes extraction exact: the removed experts hold some of its mass."""
    built = model()
    _, ledger = predict(built, ["normal"], BATCH)
    kept = select_experts(ledger, ["normal"], built.expert_layers, 0.2)
    squad = extract_squad(built, ["normal"], kept)
    router = squad.backbone.get_submodule("blocks.1.mlp.router")
    routing = router(torch.randn(1, 4, 16), torch.tensor([0]))
    assert routing.probs_SE.shape == (4, 4)
    assert (routing.gates_SK.sum(1) < 1).all()


@pytest.mark.parametrize("kind", ["mlp", "attention"])
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_layer_treats_surviving_tokens_alike_even_when_others_are_lost(kind: str, renormalize: bool) -> None:
    """Among them are tokens that need an expert which only the other task asked for."""
    built = model(placement=kind, renormalize_gates=renormalize)
    tasks = ["normal", "reshading"]
    _, ledger = predict(built, tasks, BATCH)
    kept = select_experts(ledger, tasks, built.expert_layers, 0.7)
    squad = extract_squad(built, tasks, kept)
    first, x = f"blocks.0.{kind}", torch.randn(2, 64, 16, generator=torch.Generator().manual_seed(2))
    large_layer, small_layer = (part.backbone.get_submodule(first) for part in (built.eval(), squad))
    large_task, small_task = torch.tensor([NAMES.index(task) for task in tasks]), torch.arange(2)
    chosen = large_layer.router(x, large_task).experts_SK.view(2, 64, 2)
    alive = torch.isin(chosen, torch.tensor(kept[first])).all(-1)
    for row, task in enumerate(tasks):
        own = select_experts(ledger, [task], built.expert_layers, 0.7)[first]
        assert (alive[row] & ~torch.isin(chosen[row], torch.tensor(own)).all(-1)).any()
    assert (alive.sum(1) > 0).all()
    assert (alive.sum(1) < 64).all()
    large = large_layer(x, large_task, torch.eye(len(TASKS))[:, large_task])[0]
    small = small_layer(x, small_task, torch.eye(2))[0]
    assert torch.allclose(small[alive], large[alive], atol=1e-6)
    assert not torch.allclose(small[~alive], large[~alive], atol=1e-3)


def test_selection_keeps_what_is_used_enough_and_at_least_k() -> None:
    built = model()
    _, ledger = predict(built, ["normal"], BATCH)
    for threshold in (0.0, 0.3, 1.0):
        kept = select_experts(ledger, ["normal"], built.expert_layers, threshold)
        for layer in built.expert_layers:
            share = ledger.share(layer.name, "normal")
            used = {e for e in range(layer.num_experts) if share[e] >= threshold}
            assert used <= set(kept[layer.name])
            assert len(kept[layer.name]) == max(layer.top_k, len(used))
            removed = [share[e] for e in range(layer.num_experts) if e not in kept[layer.name]]
            assert all(share[kept[layer.name]].min() >= value for value in removed)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tasks", [["class_scene"], ["normal", "semseg"]], ids="+".join)
def test_costs_before_and_after(variant: str, tasks: list[str]) -> None:
    built = model(**VARIANTS[variant])
    _, ledger = predict(built, tasks, BATCH)
    squad = extract_squad(built, tasks, select_experts(ledger, tasks, built.expert_layers, 0.4))
    cost = squad_cost(built, squad)
    assert cost.parameters_before == parameters_of(built)
    assert cost.parameters_after == parameters_of(squad) < cost.parameters_before
    assert cost.macs_after == cost.macs_before


def test_a_squad_is_rebuilt_from_its_description_and_weights() -> None:
    built = model(shared_blocks=1, placement="every")
    tasks = ["semseg", "class_scene"]
    _, ledger = predict(built, tasks, BATCH)
    squad = extract_squad(built, tasks, select_experts(ledger, tasks, built.expert_layers, 0.4))
    copy = SquadModel.from_spec(json.loads(json.dumps(squad.spec()))).eval()
    copy.load_state_dict(squad.state_dict())
    assert_same(copy, squad(BATCH), BATCH)
    assert copy.spec() == squad.spec()


def test_faults_are_named() -> None:
    built = model()
    _, ledger = predict(built, ["normal"], BATCH)
    everything = select_experts(ledger, ["normal"], built.expert_layers, 0.0)
    with pytest.raises(UserError, match="share of tokens"):
        select_experts(ledger, ["normal"], built.expert_layers, 1.5)
    with pytest.raises(UserError, match="no token of task 'semseg'"):
        select_experts(ledger, ["normal", "semseg"], built.expert_layers, 0.1)
    with pytest.raises(ValueError, match="no task 'edges'"):
        extract_squad(built, ["normal", "edges"], everything)
    with pytest.raises(ValueError, match=r"not \[\]"):
        extract_squad(built, [], everything)
    with pytest.raises(ValueError, match="several different ones"):
        extract_squad(built, ["normal", "normal"], everything)
    with pytest.raises(ValueError, match="needs 2"):
        extract_squad(built, ["normal"], {**everything, "blocks.1.mlp": [1]})
    with pytest.raises(ValueError, match="ascending"):
        extract_squad(built, ["normal"], {**everything, "blocks.1.mlp": [1, 0]})
    with pytest.raises(ValueError, match="names the layers"):
        extract_squad(built, ["normal"], {"blocks.1.mlp": [0, 1]})
    with pytest.raises(ValueError, match="shard"):
        extract_squad(model(group=ExpertGroup(size=2)), ["normal"], everything)
    spec = extract_squad(built, ["normal"], everything).spec()
    with pytest.raises(UserError, match="version 7"):
        SquadModel.from_spec({**spec, "version": 7})
    with pytest.raises(UserError, match="lacks 'kept'"):
        SquadModel.from_spec({key: value for key, value in spec.items() if key != "kept"})
    with pytest.raises(UserError, match="damaged"):
        SquadModel.from_spec({**spec, "kept": {}})
    with pytest.raises(UserError, match="damaged"):
        SquadModel.from_spec({**spec, "tasks": ["nothing"]})
    with pytest.raises(UserError, match=r"damaged.*: width: [^\n]+\Z"):
        SquadModel.from_spec({**spec, "model": {**spec["model"], "depth": "deep", "width": -1}})
    with pytest.raises(UserError, match="no squad description"):
        SquadModel.from_spec(None)
