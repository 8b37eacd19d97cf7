"""The routing record: shares of what a squad leaves alone, against a plain count and against the squad itself."""

import pytest
import torch
from torch import Tensor

from model.extract import extract_squad, select_experts
from model.mod_squad import ModSquad
from model.routing_record import RoutingRecord
from model.routing_stats import RoutingLedger
from tests.model.models import NAMES, VARIANTS, images, model, pairs

BATCH = images(3, seed=9)
TWO = ["normal", "reshading"]
# Image 1 is not seen with normals, image 2 not with reshading.
PAIRS = pairs([0, 2], [], [0, 1], [])


def recorded(built: ModSquad) -> tuple[RoutingRecord, RoutingLedger]:
    """The record of `PAIRS`, run in two batches, and the usage that it counted."""
    record, ledger = RoutingRecord(built.eval()), RoutingLedger(built.expert_layers, NAMES)
    for rows in (slice(None, 1), slice(1, None)):
        with torch.no_grad():
            ledger.update(record.run(BATCH, PAIRS[0][rows], PAIRS[1][rows]).routing)
    return record, ledger


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("threshold", [0.7, 1.0])
def test_shares_are_what_a_plain_count_gives(variant: str, threshold: float) -> None:
    built = model(**VARIANTS[variant])
    record, ledger = recorded(built)
    kept = select_experts(ledger, TWO, built.expert_layers, threshold)
    found: dict[str, Tensor] = {}
    for layer in built.expert_layers:
        router = built.get_submodule(f"backbone.{layer.name}.router")
        router.register_forward_hook(
            lambda _m, _x, routing, layer=layer: found.update(
                {layer.name: torch.tensor([set(row) <= set(kept[layer.name]) for row in routing.experts_SK.tolist()])}
            )
        )
    with torch.no_grad():
        built(BATCH, *PAIRS)
    of_pair = {}
    for layer in built.expert_layers:
        alive = found[layer.name].view(-1, 16)
        of_pair[layer.name] = alive if layer.sees_task else alive[PAIRS[0]]
    everywhere = torch.stack([torch.ones(4, 16, dtype=torch.bool), *of_pair.values()]).all(0)

    share = record.unaffected(kept)
    assert share.layers == pytest.approx({name: alive.double().mean().item() for name, alive in of_pair.items()})
    for number, task in enumerate(TWO):
        alive = everywhere[2 * number : 2 * number + 2]
        assert share.tokens[task] == pytest.approx(alive.double().mean().item())
        assert share.images[task] == pytest.approx(alive.all(1).double().mean().item())
    assert min(share.tokens.values()) < 1 or not built.expert_layers


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_and_their_choices_are_those_of_the_ledger(variant: str) -> None:
    record, ledger = recorded(model(**VARIANTS[variant]))
    image, task = PAIRS
    second_run = torch.tensor([0, 3, 3, 3])  # whose three images are numbered after those of the first
    assert torch.equal(record.pairs, torch.stack([image + second_run, task], dim=1))
    for layer in record.model.expert_layers:
        chosen = record.choices(layer.name)
        assert chosen.shape == (4, 16, layer.top_k)
        for task in (0, 2):
            rows = chosen[record.pairs[:, 1] == task].flatten()
            assert torch.equal(torch.bincount(rows, minlength=layer.num_experts), ledger.counts[layer.name][task])


def test_unaffected_images_are_those_whose_predictions_stay() -> None:
    built = model(spread=0.05)
    record, ledger = recorded(built)
    steps = sorted({value for layer in built.expert_layers for value in ledger.share(layer.name, "normal").tolist()})
    for threshold in steps:
        kept = select_experts(ledger, ["normal"], built.expert_layers, threshold)
        squad = extract_squad(built, ["normal"], kept)
        with torch.no_grad():
            expected = built(BATCH, *PAIRS).predictions["normal"]
            change = (squad(BATCH)["normal"][PAIRS[0][:2]] - expected).abs().flatten(1).amax(1)
        assert (change < 1e-5).double().mean().item() == record.unaffected(kept).images["normal"]


def test_running_gives_what_the_model_gives_and_leaves_no_trace() -> None:
    built = model().eval()
    record = RoutingRecord(built)
    with torch.no_grad():
        expected, found = built(BATCH, *PAIRS).predictions, record.run(BATCH, *PAIRS).predictions
    assert all(torch.equal(found[task], expected[task]) for task in NAMES)
    assert record.tasks == TWO
    built(BATCH, *PAIRS)
    everything = {layer.name: range(layer.num_experts) for layer in built.expert_layers}
    assert record.unaffected(everything).tokens == {"normal": 1.0, "reshading": 1.0}


def test_nothing_recorded_is_an_error() -> None:
    built = model()
    with pytest.raises(ValueError, match="no pair is recorded"):
        RoutingRecord(built).unaffected({layer.name: [0, 1] for layer in built.expert_layers})
