"""Dense weights: copied parts compute the same, experts start near the dense model, misfits are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from configs.schema import MODEL_PRESETS
from model.attention import DenseAttention
from model.dense_weights import read_dense_vit, start_from_dense
from model.dispatch import ExpertGroup
from model.mod_squad import ModSquad
from tests.model.dense_vit import DEPTH, GRID, HEADS, PATCH, SIDE, WIDTH, batch, trained
from tests.model.models import TASKS, config

SIZES = {"width": WIDTH, "depth": DEPTH, "heads": HEADS, "patch_size": PATCH}
EXPERTS = {"attention_experts": 8, "attention_top_k": 4, "mlp_experts": 8, "mlp_top_k": 4}


def fresh(*, group: ExpertGroup | None = None, side: int = SIDE, **changes: Any) -> ModSquad:
    return ModSquad(config(**SIZES, **{**EXPERTS, **changes}), TASKS, side, seed=7, group=group or ExpertGroup())


def started(weights: dict[str, Tensor] | None = None, **changes: Any) -> ModSquad:
    model = fresh(**changes)
    start_from_dense(model, read_dense_vit(weights or trained().state_dict(), "vit.pth"), seed=7)
    return model


@torch.no_grad()
def tokens_of(model: ModSquad, images: Tensor, task: int = 0) -> Tensor:
    """Tokens of images in [0, 1], which the model sees in [-1, 1]."""
    pair_image = torch.arange(len(images))
    tokens, _ = model.backbone(images * 2 - 1, pair_image, torch.full_like(pair_image, task))
    return tokens


@pytest.mark.parametrize("head_width", [WIDTH // HEADS, WIDTH // HEADS + 3, 2 * WIDTH // HEADS])
def test_a_model_without_experts_gives_the_tokens_of_the_source(head_width: int) -> None:
    images, _ = batch(8, torch.Generator().manual_seed(2))
    model = started(placement="dense", task_embedding="none", head_width=head_width)
    torch.testing.assert_close(tokens_of(model, images), trained().tokens(images), rtol=1e-4, atol=1e-4)


def test_heads_normalise_as_the_source_does() -> None:
    model = started()
    for head in model.heads.values():
        torch.testing.assert_close(head.norm.state_dict(), trained().norm.state_dict())


def test_every_dimension_beyond_the_dense_heads_learns() -> None:
    part = started(placement="dense").blocks[0].attention
    assert isinstance(part, DenseAttention)
    before = {name: value.clone() for name, value in part.state_dict().items()}
    optimizer = torch.optim.SGD(part.parameters(), lr=0.1)
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))
    for _ in range(2):  # in the first step queries and values leave zero
        optimizer.zero_grad()
        part(x).square().sum().backward()
        optimizer.step()
    for name in ("qkv.weight", "out.weight"):
        assert (part.state_dict()[name] != before[name]).all()


def start_loss(model: ModSquad) -> float:
    """The source's loss when the source's head reads the model's tokens, mean over tasks."""
    images, target = batch(64, torch.Generator().manual_seed(2))
    losses = [
        F.mse_loss(trained().head(trained().norm(tokens_of(model, images, task))), target).item()
        for task in range(len(TASKS))
    ]
    return sum(losses) / len(losses)


@pytest.mark.parametrize("renormalize", [False, True], ids=["raw gates", "renormalised gates"])
@pytest.mark.parametrize("placement", ["mlp", "attention", "alternate", "every"])
def test_training_starts_near_the_dense_model(placement: str, renormalize: bool) -> None:
    changes = {"placement": placement, "renormalize_gates": renormalize}
    _, target = batch(64, torch.Generator().manual_seed(2))
    mean_predictor = target.var().item()
    assert start_loss(started(**changes)) < 0.05 * mean_predictor
    assert start_loss(fresh(**changes)) > mean_predictor


@pytest.mark.parametrize(
    "changes",
    [
        {"attention_top_k": 2},  # two heads to an expert
        {"attention_top_k": 8},  # two experts to a head
        {"attention_experts": 6},  # the last group lacks two
        {"routers": "shared"},
        {"shared_blocks": 2},
        {"router_noise": True},
    ],
    ids=str,
)
def test_training_starts_near_the_dense_model_with_any_routing(changes: dict[str, Any]) -> None:
    _, target = batch(64, torch.Generator().manual_seed(2))
    assert start_loss(started(placement="every", **changes).eval()) < 0.15 * target.var().item()


def test_every_rank_starts_with_its_shard_of_the_same_experts() -> None:
    whole = started(placement="every")
    ranks = [started(placement="every", group=ExpertGroup(size=2, rank=rank)) for rank in range(2)]
    shards = [rank.state_dict() for rank in ranks]
    sharded = {name for name, parameter in whole.named_parameters() if hasattr(parameter, "is_expert")}
    assert sharded
    for name, expected in whole.state_dict().items():
        if name in sharded:
            assert torch.equal(torch.cat([shard[name] for shard in shards]), expected)
        else:
            assert all(torch.equal(shard[name], expected) for shard in shards)


@pytest.mark.parametrize("weight", ["mlp.experts.w1", "attention.experts.wq"])
def test_the_seed_alone_decides_the_noise(weight: str) -> None:
    dense = read_dense_vit(trained().state_dict(), "vit.pth")
    found = []
    for seed, elsewhere in ((7, 0), (7, 1), (8, 0)):
        model = fresh(placement="every", router_noise=True)
        with torch.random.fork_rng():
            torch.manual_seed(elsewhere)
            start_from_dense(model, dense, seed=seed)
        found.append(model.state_dict())
    first, same, other = found
    torch.testing.assert_close(first, same, rtol=0, atol=0)
    assert not torch.equal(first[f"backbone.blocks.0.{weight}"], other[f"backbone.blocks.0.{weight}"])


def with_class_token(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    position = weights["pos_embed"]
    tokens = {"cls_token": position[:, :1] + 1, "pos_embed": torch.cat([position[:, :1] - 1, position], 1)}
    return weights | tokens | {"head.weight": torch.ones(9, WIDTH), "head.bias": torch.ones(9)}


def with_distillation(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    weights = with_class_token(weights)
    position = torch.cat([weights["pos_embed"][:, :1] - 2, weights["pos_embed"]], 1)
    return weights | {"dist_token": weights["cls_token"], "head_dist.weight": torch.ones(9), "pos_embed": position}


def with_decoder(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    decoder = {"mask_token": torch.ones(1), "decoder_blocks.0.norm1.weight": torch.ones(8)}
    return with_class_token(weights) | decoder | {"decoder_pos_embed": torch.ones(1, 17, 8)}


def with_pooled_norm(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: weights[name] for name in weights}


def under(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {f"{prefix}{name}": value for name, value in weights.items()} | {"queue.size": torch.ones(1)}


@pytest.mark.parametrize(
    ("variant", "unused"),
    [
        (with_class_token, ("cls_token", "head")),
        (with_distillation, ("cls_token", "dist_token", "head", "head_dist")),
        (with_decoder, ("cls_token", "decoder_blocks", "decoder_pos_embed", "head", "mask_token")),
        (with_pooled_norm, ("head",)),
        (under("module."), ("head", "queue")),
        (under("module.backbone."), ("head", "queue")),
        (under("encoder."), ("head", "queue")),
    ],
)
def test_files_of_all_kinds_give_the_same_start(
    variant: Callable[[dict[str, Tensor]], dict[str, Tensor]], unused: tuple[str, ...]
) -> None:
    dense = read_dense_vit(variant(trained().state_dict()), "vit.pth")
    assert dense.unused == unused
    model = fresh(placement="every")
    start_from_dense(model, dense, seed=7)
    torch.testing.assert_close(model.state_dict(), started(placement="every").state_dict(), rtol=0, atol=0)


def test_half_precision_is_read() -> None:
    weights = {name: value.half() for name, value in trained().state_dict().items()}
    expected = started({name: value.float() for name, value in weights.items()}).state_dict()
    torch.testing.assert_close(started(weights).state_dict(), expected, rtol=0, atol=0)


def test_positions_of_another_grid_are_resampled() -> None:
    across = torch.arange(GRID).float().expand(GRID, GRID).flatten()
    weights = trained().state_dict() | {"pos_embed": across[None, :, None].expand(1, GRID**2, WIDTH)}
    position = started(weights, side=2 * SIDE).backbone.position.view(2 * GRID, 2 * GRID, WIDTH)
    torch.testing.assert_close(position, position[:1, :, :1].expand_as(position))  # the same in every row
    inner = position[0, 2:-2, 0]
    torch.testing.assert_close(inner.diff(), torch.full((2 * GRID - 5,), 0.5), atol=0.06, rtol=0)


def test_task_embeddings_start_small() -> None:
    model = started(init="published")
    assert model.backbone.task_embedding.square().mean().sqrt().item() == pytest.approx(0.02)
    assert len(model.backbone.task_embedding.unique(dim=0)) == len(TASKS)


Weights = Callable[[], dict[str, Tensor]]  # called in the test, so that nothing is trained while tests are collected


def extended(**more: Tensor) -> Weights:
    return lambda: trained().state_dict() | {name.replace("__", "."): value for name, value in more.items()}


def without(*names: str) -> Weights:
    return lambda: {name: value for name, value in trained().state_dict().items() if name not in names}


def twice() -> dict[str, Tensor]:
    return under("student.")(trained().state_dict()) | under("teacher.")(trained().state_dict())


ONES = torch.ones(WIDTH)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (extended(blocks__0__ls1__gamma=ONES), "no place for blocks.0.ls1.gamma: only plain"),
        (extended(blocks__1__attn__q_norm__weight=ONES), "no place for blocks.1.attn.q_norm.weight"),
        (extended(rel_pos_bias__table=ONES), "no place for rel_pos_bias.table"),
        (extended(reg_token=ONES), "no place for reg_token"),
        (extended(register_tokens=ONES), "no place for register_tokens"),
        (extended(norm_pre__weight=ONES), "no place for norm_pre.weight"),
        (extended(patch_embed__norm__weight=ONES), "no place for patch_embed.norm.weight"),
        (without("blocks.1.mlp.fc2.bias", "norm.bias"), "vit.pth: blocks.1.mlp.fc2.bias, norm.bias missing"),
        (without("pos_embed"), "vit.pth: pos_embed missing"),
        (lambda: {"embeddings.weight": ONES}, "vit.pth: patch_embed.proj.weight missing: only names as timm"),
        (twice, "several vision transformers .student., teacher."),
        (
            extended(blocks__2__attn__proj__weight=torch.ones(WIDTH, 8)),
            r"attn.proj.weight has shape \(32, 8\), expected",
        ),
        (extended(patch_embed__proj__weight=torch.ones(WIDTH, 1, 4, 4)), r"shape \(32, 1, 4, 4\), expected \(32, 3, 4"),
        (extended(pos_embed=torch.ones(1, 16, 8)), "pos_embed has width 8, the patches have 32"),
        (extended(pos_embed=torch.ones(1, 19, WIDTH)), "pos_embed holds 19 positions, which is no square"),
    ],
)
def test_what_cannot_be_read_is_named(weights: Weights, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_dense_vit(weights(), "vit.pth")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"width": 16},
            "vit.pth is a vision transformer of width 32, depth 3, patch_size 4, the model has width 16, dep",
        ),
        (
            {"depth": 2},
            "the model has width 32, depth 2, patch_size 4: no preset has these sizes, so set them one by one",
        ),
        ({"patch_size": 8}, "patch_size 4, the model has width 32, depth 3, patch_size 8"),
        ({"mlp_ratio": 2.0}, "MLPs of width 128, the model's mlp_ratio 2 gives 64: set model.mlp_ratio=4"),
        ({"heads": 3, "head_width": 32}, "has width 32, which model.heads 3 does not divide"),
        (
            {"head_width": 4, "placement": "mlp"},
            "heads of width 8, which model.head_width 4 cannot hold: set at least 8",
        ),
    ],
)
def test_a_model_of_other_sizes_is_refused(changes: dict[str, Any], message: str) -> None:
    dense = read_dense_vit(trained().state_dict(), "vit.pth")
    model = ModSquad(config(**{**SIZES, **EXPERTS, **changes}), TASKS, SIDE)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UserError, match=message):
        start_from_dense(model, dense, seed=7)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_preset_that_fits_is_named() -> None:
    small = MODEL_PRESETS["small"]
    width, patch = small["width"], small["patch_size"]
    shapes = {
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "pos_embed": (1, 197, width),
        "norm.weight": (width,),
    }
    shapes |= {"patch_embed.proj.bias": (width,), "norm.bias": (width,)}
    for index in range(small["depth"]):
        for part, rows, columns in (
            ("attn.qkv", 3 * width, width),
            ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width),
            ("mlp.fc2", width, 4 * width),
        ):
            shapes |= {f"blocks.{index}.{part}.weight": (rows, columns), f"blocks.{index}.{part}.bias": (rows,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{index}.{norm}.{kind}": (width,) for kind in ("weight", "bias")}
    dense = read_dense_vit({name: torch.empty(shape) for name, shape in shapes.items()}, "deit_small.pth")
    with pytest.raises(UserError, match=r"set model\.preset=small"):
        start_from_dense(fresh(), dense, seed=7)
