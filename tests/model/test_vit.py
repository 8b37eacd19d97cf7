"""The backbone: what depends on the task, what is computed once, what survives checkpointing."""

import copy
import itertools

import pytest
import torch
from fairscale.nn.checkpoint import checkpoint_wrapper

from model.layer_routing import LayerRouting
from model.router import TaskRouter
from model.vit import expert_layers
from tests.model.models import SIDE, TASKS, VARIANTS, config, images, model, pairs

EVERYTHING = pairs([0, 1], [0, 1], [0], [])
TURNS = torch.tensor([(3, 0), (8, 1)])
NOISY = {"placement": "every", "router_noise": True, "shared_blocks": 1}


def test_placement_names_the_expert_layers() -> None:
    def names(**changes: object) -> list[str]:
        return [layer.name for layer in expert_layers(config(**changes))]

    assert names() == ["blocks.0.attention", "blocks.1.mlp", "blocks.2.attention"]
    assert names(placement="mlp") == ["blocks.0.mlp", "blocks.1.mlp", "blocks.2.mlp"]
    assert names(placement="every", depth=1) == ["blocks.0.attention", "blocks.0.mlp"]
    modules = dict(model().backbone.named_modules())
    assert all(layer.name in modules for layer in expert_layers(config()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pairs_do_not_influence_each_other(variant: str) -> None:
    backbone = model(**VARIANTS[variant]).eval().backbone
    x = images(2)
    together, _ = backbone(x, *EVERYTHING)
    for number, (image, task) in enumerate(zip(*EVERYTHING, strict=True)):
        alone, _ = backbone(x[image : image + 1], torch.tensor([0]), task.view(1))
        assert torch.allclose(alone[0], together[number], atol=1e-5)


def test_tasks_differ_from_the_first_task_dependent_block_on() -> None:
    backbone = model(shared_blocks=2).eval().backbone
    rows: dict[int, int] = {}
    for index, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda _m, inputs, _y, index=index: rows.update({index: len(inputs[0])}))
    tokens, _ = backbone(images(2), *EVERYTHING)
    assert rows == {0: 2, 1: 2, 2: 5}
    assert not torch.allclose(tokens[0], tokens[2])


@pytest.mark.parametrize("variant", ["published", "shared"])
def test_every_layer_counts_each_pair_s_tokens_for_its_task(variant: str) -> None:
    built = model(**VARIANTS[variant]).eval()
    tokens_per_image = (SIDE // built.config.patch_size) ** 2
    _, routing = built.backbone(images(2), *EVERYTHING)
    assert [layer.info for layer in routing] == built.expert_layers
    expected = torch.tensor([2, 2, 1, 0]) * tokens_per_image
    for layer in routing:
        assert torch.equal(layer.tokens_T, expected.float())
        assert torch.equal(layer.counts_TE.sum(1), expected * layer.info.top_k)
        assert torch.allclose(layer.prob_sum_TE.sum(1), expected.float(), rtol=1e-5)
        assert (layer.entropy_sum_T <= expected * torch.tensor(layer.info.num_experts).log() + 1e-3).all()


def test_a_shared_layer_counts_an_image_once_per_task_that_it_serves() -> None:
    _, routing = model(shared_blocks=2).eval().backbone(images(2), *EVERYTHING)
    first = routing[0]
    assert not first.info.sees_task
    assert torch.equal(first.counts_TE[0], first.counts_TE[1])  # both serve images 0 and 1
    _, only_image_0 = model(shared_blocks=2).eval().backbone(images(2)[:1], *pairs([], [], [0]))
    assert torch.equal(first.counts_TE[2], only_image_0[0].counts_TE[2])


def losses(routing: list[LayerRouting]) -> torch.Tensor:
    return sum((layer.prob_sum_TE.square().sum() + layer.z_sum for layer in routing), torch.zeros(()))


@pytest.mark.parametrize("variant", ["every", "shared", "mlp"])
@pytest.mark.parametrize("offload", [False, True])
def test_checkpointed_blocks_give_the_same_tokens_sums_and_gradients(variant: str, offload: bool) -> None:
    plain = model(**VARIANTS[variant]).backbone
    wrapped = copy.deepcopy(plain)
    for block in wrapped.blocks:
        checkpoint_wrapper(block, offload_to_cpu=offload)
    results = []
    for backbone in (plain, wrapped):
        tokens, routing = backbone(images(2), *EVERYTHING, TURNS)
        (tokens.square().sum() + losses(routing)).backward()
        results.append((tokens, routing, [parameter.grad for parameter in backbone.parameters()]))
    assert torch.equal(results[0][0], results[1][0])
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(one.counts_TE, other.counts_TE)
        assert torch.equal(one.tokens_T, other.tokens_T)
        assert torch.equal(one.entropy_sum_T, other.entropy_sum_T)
        assert not other.entropy_sum_T.requires_grad
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(results[0][2], results[1][2], strict=True))


def test_noise_of_a_pair_does_not_depend_on_its_batch() -> None:
    backbone = model(**NOISY).backbone
    x = images(2)
    together, routing = backbone(x, *EVERYTHING, TURNS)
    for number, (image, task) in enumerate(zip(*EVERYTHING, strict=True)):
        rows = slice(int(image), int(image) + 1)
        alone, _ = backbone(x[rows], torch.tensor([0]), task.view(1), TURNS[rows])
        assert torch.allclose(alone[0], together[number], atol=1e-5)
    _, clean = backbone.eval()(x, *EVERYTHING, TURNS)
    for noisy, without in zip(routing, clean, strict=True):
        assert not torch.equal(noisy.counts_TE, without.counts_TE), noisy.info.name


def test_pairs_of_an_image_and_layers_of_a_pair_have_noise_of_their_own() -> None:
    backbone = model(**NOISY, routers="shared", task_embedding="none").backbone
    logits: list[torch.Tensor] = []
    for layer in backbone.modules():
        if isinstance(layer, TaskRouter):
            layer.weight.data.zero_()  # logits are noise of deviation log 2 alone
            assert layer.noise_weight is not None
            layer.noise_weight.data.zero_()
            layer.register_forward_hook(lambda _m, _x, routing: logits.append(routing.logits_SE))
    backbone(images(2), *EVERYTHING, TURNS)
    by_row = [rows for layer in logits for rows in layer[:, :4].unflatten(0, (-1, 16))]
    assert len(by_row) == 2 * 2 + 4 * 5  # two layers of images, four of pairs
    for one, other in itertools.combinations(by_row, 2):
        assert (one - other).abs().min() > 0
    before = [layer.clone() for layer in logits]
    logits.clear()
    backbone(images(2), *EVERYTHING, TURNS)
    assert all(torch.equal(one, other) for one, other in zip(before, logits, strict=True))


def test_a_shared_router_serves_all_tasks_of_a_layer_that_runs_per_pair() -> None:
    built = model(placement="every", routers="shared", shared_blocks=1)
    assert [layer.sees_task for layer in built.expert_layers] == [False, False, True, True, True, True]
    routers = {name: p.shape[0] for name, p in built.named_parameters() if name.endswith("router.weight")}
    assert set(routers.values()) == {1}
    # Tasks still differ by their embedding, so usage is counted for each of them.
    _, routing = built.eval().backbone(images(2), *EVERYTHING)
    assert not torch.equal(routing[-1].counts_TE[0], routing[-1].counts_TE[1])


def test_a_model_may_be_all_trunk_or_have_no_experts() -> None:
    trunk = model(placement="dense", shared_blocks=3, task_embedding="none")
    rows: list[int] = []
    for block in trunk.blocks:
        block.register_forward_hook(lambda _m, inputs, _y: rows.append(len(inputs[0])))
    tokens, routing = trunk.eval().backbone(images(2), *EVERYTHING)
    assert rows == [2, 2, 2]
    assert routing == []
    assert len(tokens) == 5
    assert torch.equal(tokens[0], tokens[2])  # the same image, whatever the task


def test_published_experts_start_near_zero_and_task_embeddings_at_deviation_one() -> None:
    published, standard = model(spread=0.0, init="published"), model(spread=0.0)
    for name, parameter in published.named_parameters():
        if hasattr(parameter, "is_expert") and parameter.dim() == 3:
            assert parameter.abs().max() <= 1 / parameter.shape[1]
            other = standard.get_parameter(name).detach()
            assert other.std() == pytest.approx(parameter.shape[1] ** -0.5, rel=0.1)
    assert published.backbone.task_embedding.std() > 2 * standard.backbone.task_embedding.std()


def test_images_of_another_size_are_named() -> None:
    with pytest.raises(ValueError, match="16"):
        model().backbone(torch.zeros(1, 3, 8, 8), *pairs([0]))
    with pytest.raises(ValueError, match="not a multiple"):
        type(model().backbone)(config(), num_tasks=len(TASKS), image_size=18)
