"""How time and memory grow: with the number of experts, with uneven loads, with pairs."""

import torch
from torch import Tensor, nn

from trainer.bench.comparison import DTYPES, Batch, Case, Comparison, Row, Settings, compare, layer_case, token_batches
from trainer.bench.expert_layers import ROUNDS, expert_mlp
from trainer.bench.peers import DeepSpeedMLP
from trainer.bench.training_step import TASKS, image_batches, mod_squad, pairs_case

EXPERTS = (8, 16, 32, 64)
SKEWED_SHARE = 0.6
IMAGES = (1, 2, 4)


def compare_scaling(settings: Settings, dtype: str) -> list[Comparison]:
    """Measure the growth of time with E and with skew, and that of memory with pairs."""
    return [_experts(settings, dtype), *_skew(settings, dtype), _pairs(settings, dtype)]


def _experts(settings: Settings, dtype: str) -> Comparison:
    few, *more = (layer_case(f"E = {count}", expert_mlp(settings, dtype, num_experts=count)) for count in EXPERTS)
    title = f"expert MLP: {settings.layer_rows * settings.tokens} tokens, K {settings.model.mlp_top_k}"
    draw = token_batches(settings, dtype)
    return compare("experts", title, dtype, settings, few, more, draw, rounds=ROUNDS)


def _skew(settings: Settings, dtype: str) -> list[Comparison]:
    ours = expert_mlp(settings, dtype)
    padded = DeepSpeedMLP(settings.model, capacity=None).to(DTYPES[dtype])
    prefer_first_expert(ours.router.weight[:, :, 0].T)
    prefer_first_expert(padded.moe.deepspeed_moe.gate.wg.weight[0])
    even = settings.model.mlp_top_k / settings.model.mlp_experts
    return [
        compare(
            name,
            title,
            dtype,
            settings,
            forced_case("even loads", layer, even),
            [forced_case(f"{SKEWED_SHARE:.0%} of tokens on one expert", layer, SKEWED_SHARE)],
            token_batches(settings, dtype),
            rounds=ROUNDS,
        )
        for name, title, layer in (("skew", "expert MLP", ours), ("skew, DeepSpeed", "DeepSpeed, no drops", padded))
    ]


def prefer_first_expert(weight: Tensor) -> None:
    """Let a token's first feature, 1 or -1, decide alone for or against the first expert.

    Args:
        weight: (D, ...) the router's weights of that expert; changed in place.
    """
    with torch.no_grad():
        weight[0] = 10.0


def forced_case(name: str, layer: nn.Module, share: float) -> Case:
    """Return the case in which that share of the tokens chooses the first expert, and no other token does.

    The layer's router must know it: see `prefer_first_expert`.
    """

    def forward(batch: Batch) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            first = batch.x.flatten(0, 1)[:, 0]
            first.fill_(-1.0)[: round(share * len(first))] = 1.0
        return layer(batch.x), batch.grad

    return Case(name=name, module=layer, passes=[forward])


def _pairs(settings: Settings, dtype: str) -> Comparison:
    """Measure the bytes saved for backward by the whole model; time is no part of it."""
    model = mod_squad(settings, dtype)
    case = pairs_case("", model)
    one, *more = (
        Row(
            name=f"{images * len(TASKS)} pairs",
            timing=None,
            saved_bytes=case.saved_bytes(image_batches(settings, images)(0)),
        )
        for images in IMAGES
    )
    return Comparison(name="pairs", title="Mod-Squad: memory", dtype=dtype, reference=one, rows=tuple(more))
