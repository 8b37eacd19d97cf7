"""The vision transformer over (image, task) pairs, with dense or expert parts in every block.

Patches are embedded once per image. The first `shared_blocks` blocks run once per image too, as they see no task. Then
images fan out to their pairs, and from there all pairs of all tasks run together. There is no class token: heads read
patch tokens. Blocks take and return plain tensors, so that activation checkpointing can wrap each of them.

Shape legend: B images, P pairs, R rows (images or pairs), N patch tokens, D width, T tasks, S image side.
"""

from collections.abc import Mapping, Sequence
from random import Random
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.schema import ModelConfig
from model.attention import DenseAttention, ExpertAttention
from model.dispatch import ExpertGroup
from model.experts import ExpertMLP
from model.layer_routing import SUMS_PER_LAYER, ExpertLayerInfo, LayerRouting, routing_sums
from model.router import TaskRouter

NORM_EPS = 1e-6
"""Added to the variance in every layer norm: as in timm, DeiT and MAE, whose weights a run may start from."""

Kept = Mapping[str, Sequence[int]]
"""Expert layer name -> ascending numbers of the experts that the layer holds; a layer not named holds all."""


class ExpertLayer(nn.Module):
    """A router and its experts.

    Attributes:
        info: facts of the layer.
        experts: the experts; whoever changes where they lie (`experts.layout`) moves the weights along. Routers and
            statistics always count experts by their own numbers.
    """

    def __init__(
        self,
        config: ModelConfig,
        info: ExpertLayerInfo,
        *,
        num_tasks: int,
        kept: Sequence[int] | None,
        group: ExpertGroup,
        seed: int,
    ) -> None:
        """Build the layer described by `info`, holding all experts or, with all routes intact, only those in `kept`."""
        super().__init__()
        # Every layer draws from its own stream, so that its weights depend on nothing built before it.
        layer_seed = Random(f"{seed}/{info.name}").getrandbits(62)
        self.info = info
        self._one_router_per_task = info.sees_task and config.routers == "task"
        self.router = TaskRouter(
            width=config.width,
            num_experts=info.num_experts,
            num_tasks=num_tasks if self._one_router_per_task else 1,
            top_k=info.top_k,
            renormalize_gates=config.renormalize_gates,
            noise=config.router_noise,
            seed=layer_seed,
            kept=None if kept is None else torch.tensor(kept),
        )
        num_experts = info.num_experts if kept is None else len(kept)
        self.experts: ExpertAttention | ExpertMLP
        if info.kind == "attention":
            self.experts = ExpertAttention(
                width=config.width,
                head_width=config.attention_head_width,
                num_experts=num_experts,
                top_k=info.top_k,
                group=group,
                seed=layer_seed,
                init=config.init,
            )
        else:
            self.experts = ExpertMLP(
                width=config.width,
                hidden=config.expert_hidden,
                num_experts=num_experts,
                top_k=info.top_k,
                group=group,
                seed=layer_seed,
                init=config.init,
            )

    def forward(
        self, x_RND: Tensor, task_R: Tensor, membership_TR: Tensor, stream_R3: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the output (R, N, D) and the tensors of `routing_sums`."""
        routing = self.router(x_RND, task_R if self._one_router_per_task else None, stream_R3)
        if isinstance(self.experts, ExpertAttention):
            y_RND = self.experts(x_RND, routing)
        else:
            y_RND = self.experts(x_RND.flatten(0, 1), routing).view_as(x_RND)
        return (y_RND, *routing_sums(routing, membership_TR, self.router.kept))


class DenseMLP(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, *, width: int, hidden: int) -> None:
        """Build and initialise the two maps."""
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)
        for linear in (self.up, self.down):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)

    def forward(self, x_RND: Tensor) -> Tensor:
        """Return (R, N, D)."""
        y_RND: Tensor = self.down(F.gelu(self.up(x_RND)))
        return y_RND


class Block(nn.Module):
    """Pre-norm attention and MLP, each dense or made of experts.

    Attributes:
        layers: facts of its expert layers: attention first.
    """

    def __init__(
        self, config: ModelConfig, index: int, *, num_tasks: int, kept: Kept, group: ExpertGroup, seed: int
    ) -> None:
        """Build block number `index`."""
        super().__init__()
        self.layers = block_layers(config, index)
        experts: dict[str, nn.Module] = {
            info.kind: ExpertLayer(config, info, num_tasks=num_tasks, kept=kept.get(info.name), group=group, seed=seed)
            for info in self.layers
        }
        self.norm1 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.attention = experts.get("attention") or DenseAttention(
            width=config.width, heads=config.heads, head_width=config.attention_head_width
        )
        self.norm2 = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.mlp = experts.get("mlp") or DenseMLP(width=config.width, hidden=config.dense_hidden)

    def forward(
        self, x_RND: Tensor, task_R: Tensor, membership_TR: Tensor, stream_R3: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return the tokens (R, N, D), then the tensors of `routing_sums` of each of `layers`.

        Args:
            x_RND: tokens; rows are pairs, or images in a block that sees no task.
            task_R: (R,) int64, task of each row; not read in a block that sees no task.
            membership_TR: (T, R) float32, how often row r counts for task t.
            stream_R3: (R, 3) int64, what each row's router noise is drawn from; None: no noise.
        """
        x_RND, attention_sums = _residual(x_RND, self.norm1, self.attention, task_R, membership_TR, stream_R3)
        x_RND, mlp_sums = _residual(x_RND, self.norm2, self.mlp, task_R, membership_TR, stream_R3)
        return (x_RND, *attention_sums, *mlp_sums)


def _residual(
    x_RND: Tensor,
    norm: nn.Module,
    part: nn.Module,
    task_R: Tensor,
    membership_TR: Tensor,
    stream_R3: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return x + part(norm(x)) and the sums of an expert part."""
    if isinstance(part, ExpertLayer):
        y_RND, *sums = part(norm(x_RND), task_R, membership_TR, stream_R3)
        return x_RND + y_RND, tuple(sums)
    return x_RND + part(norm(x_RND)), ()


def block_layers(config: ModelConfig, index: int) -> tuple[ExpertLayerInfo, ...]:
    """Return the facts of the expert layers of block number `index`: attention first."""
    parts: list[tuple[Literal["attention", "mlp"], bool, int, int]] = [
        ("attention", config.has_expert_attention(index), config.attention_experts, config.attention_top_k),
        ("mlp", config.has_expert_mlp(index), config.mlp_experts, config.mlp_top_k),
    ]
    return tuple(
        ExpertLayerInfo(
            name=f"blocks.{index}.{kind}",
            kind=kind,
            block=index,
            num_experts=num_experts,
            top_k=top_k,
            sees_task=index >= config.shared_blocks,
        )
        for kind, present, num_experts, top_k in parts
        if present
    )


def expert_layers(config: ModelConfig) -> list[ExpertLayerInfo]:
    """Return the facts of all expert layers of a model, in order."""
    return [info for index in range(config.depth) for info in block_layers(config, index)]


class VisionTransformer(nn.Module):
    """The backbone: images and pairs in, tokens of the pairs out.

    Attributes:
        grid: patches along a side.
        blocks: the blocks, in order; each may be wrapped for activation checkpointing.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_tasks: int,
        image_size: int,
        kept: Kept | None = None,
        group: ExpertGroup = ExpertGroup(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> None:
        """Build the backbone; the caller seeds torch's generator, `seed` alone decides the experts.

        Raises:
            ValueError: `image_size` is not a multiple of the patch side.
        """
        super().__init__()
        if image_size % config.patch_size:
            raise ValueError(f"image_size {image_size} is not a multiple of patch_size {config.patch_size}")
        self.config, self.num_tasks, self.image_size = config, num_tasks, image_size
        self.grid = image_size // config.patch_size
        self.patch = nn.Linear(3 * config.patch_size**2, config.width)
        self.position = nn.Parameter(torch.empty(self.grid**2, config.width))
        if config.task_embedding != "none":
            self.task_embedding = nn.Parameter(torch.empty(num_tasks, config.width))
            # Routers must feel the task from the start: at equal routers the gradient of the mutual information is
            # zero. In toy runs it left zero several times sooner than with 0.02, and 1 (as published) cost task loss.
            nn.init.trunc_normal_(self.task_embedding, std=0.3 if config.init == "standard" else 1.0)
        nn.init.trunc_normal_(self.patch.weight, std=0.02)
        nn.init.zeros_(self.patch.bias)
        nn.init.trunc_normal_(self.position, std=0.02)
        self.blocks = nn.ModuleList(
            Block(config, index, num_tasks=num_tasks, kept=kept or {}, group=group, seed=seed)
            for index in range(config.depth)
        )

    def forward(
        self, images: Tensor, pair_image: Tensor, pair_task: Tensor, turns: Tensor | None = None
    ) -> tuple[Tensor, list[LayerRouting]]:
        """Return the tokens of every pair (P, N, D) and the routing sums of every expert layer.

        Args:
            images: (B, 3, S, S) floating; B may be 0.
            pair_image: (P,) int64, index into `images`; P may be 0.
            pair_task: (P,) int64, task of each pair.
            turns: (B, 2) int64 from 0 to 2^32 - 1, sample and epoch of each image: router noise is drawn from them.
                Read in training with `router_noise` only.

        Raises:
            ValueError: images of another size, or router noise without turns.
        """
        x = self._embed_patches(images)
        pair_TP = F.one_hot(pair_task, self.num_tasks).T.float()
        image_TB = pair_TP @ F.one_hot(pair_image, len(images)).float() if len(images) else pair_TP[:, :0]
        image_B3, pair_P3 = self._noise_streams(turns, pair_image, pair_task)
        routing: list[LayerRouting] = []
        shared = self.config.shared_blocks
        for index, block in enumerate(self.blocks):
            if index == shared:
                x = x[pair_image]
            if self._adds_task_embedding(index):
                x = x + (pair_TP.T.to(x.dtype) @ self.task_embedding)[:, None]
            x, *sums = block(x, pair_task, *((image_TB, image_B3) if index < shared else (pair_TP, pair_P3)))
            routing += _unpack(block_layers(self.config, index), sums)
        return (x if shared < len(self.blocks) else x[pair_image]), routing

    def _embed_patches(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, N, D): a linear map of each patch's pixels plus the learned position."""
        if images.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, 3, {self.image_size}, same)")
        G, p = self.grid, self.config.patch_size
        pixels_BGG3pp = images.reshape(len(images), 3, G, p, G, p).permute(0, 2, 4, 1, 3, 5)
        patches_BNF = pixels_BGG3pp.reshape(len(images), G * G, 3 * p * p)
        embedded_BND: Tensor = self.patch(patches_BNF.to(self.patch.weight.dtype))
        return embedded_BND + self.position

    def _noise_streams(
        self, turns: Tensor | None, pair_image: Tensor, pair_task: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (B, 3) of images and (P, 3) of pairs: the turn, then 0 or the task; None where no noise is drawn."""
        if turns is None or not (self.config.router_noise and self.training):
            return None, None
        return F.pad(turns, (0, 1)), torch.cat([turns[pair_image], pair_task[:, None]], dim=1)

    def _adds_task_embedding(self, index: int) -> bool:
        if self.config.task_embedding == "first":
            return index == self.config.shared_blocks
        return self.config.task_embedding == "every_block" and index >= self.config.shared_blocks


def _unpack(layers: Sequence[ExpertLayerInfo], sums: Sequence[Tensor]) -> list[LayerRouting]:
    """Name the sums that a block returned."""
    assert len(sums) == SUMS_PER_LAYER * len(layers), "a block returned other sums than its layers have"
    routing = []
    for number, info in enumerate(layers):
        prob_sum_TE, tokens_T, counts_TE, z_sum, entropy_sum_T = sums[number * SUMS_PER_LAYER :][:SUMS_PER_LAYER]
        routing.append(
            LayerRouting(
                info=info,
                prob_sum_TE=prob_sum_TE,
                tokens_T=tokens_T.detach(),  # checkpointed blocks return every tensor with a gradient
                counts_TE=counts_TE,
                z_sum=z_sum,
                entropy_sum_T=entropy_sum_T.detach(),
            )
        )
    return routing
