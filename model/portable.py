"""A squad in plain tensor operations, for torch.export and what reads its graphs (ONNX).

The layers that train do not trace: they have backward passes of their own and loops over lengths read on the host. Here
stands the same mathematics on the same weights, forward only: every expert runs once, on the rows of the choices that
named it, so the cost stays that of K experts per token. The lengths of these runs stay unknown in the graph. (All
experts on all tokens, weighted by a matrix, would need no such lengths: a graph made in a third of the time that takes
1.7 times as long to run, in onnxruntime with 4 blocks of `small`, 16 experts, K = 4.)

Routing is the squad's own, ties included. Nothing is summed for losses or telemetry.

Shape legend: B images, T tasks, V views of an image (1 in blocks that see no task, then T), R = V * B rows, N patch
tokens, S = R * N tokens, K chosen experts, C = S * K choices, token-major; E experts that the squad holds, D width,
d head width, F any width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import ExpertAttention
from model.experts import ExpertMLP
from model.extract import SquadModel
from model.router import Routing, TaskRouter
from model.vit import Block, ExpertLayer


class PortableSquad(nn.Module):
    """A squad that torch.export can trace; it holds the squad itself, so both always have the same weights."""

    def __init__(self, squad: SquadModel) -> None:
        """Wrap a squad, which is neither copied nor changed."""
        super().__init__()
        self.squad = squad

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return what `SquadModel.forward` returns.

        Args:
            images: (B, 3, S, S) float32, in [-1, 1].
        """
        backbone, config, tasks = self.squad.backbone, self.squad.config, len(self.squad.tasks)
        shared = config.shared_blocks
        embedded = {"none": (), "first": (shared,), "every_block": range(shared, config.depth)}[config.task_embedding]

        # A linear map of each p x p patch is a convolution of stride p.
        p = config.patch_size
        grid_BDGG = F.conv2d(images, backbone.patch.weight.view(-1, 3, p, p), backbone.patch.bias, stride=p)
        x_VBND = (grid_BDGG.flatten(2).transpose(1, 2) + backbone.position)[None]

        for index, block in enumerate(backbone.blocks):
            assert isinstance(block, Block)
            if index == shared:
                x_VBND = x_VBND.expand(tasks, -1, -1, -1)
            if index in embedded:
                x_VBND = x_VBND + backbone.task_embedding[:, None, None]
            x_VBND = x_VBND + _apply(block.attention, block.norm1(x_VBND))
            x_VBND = x_VBND + _apply(block.mlp, block.norm2(x_VBND))

        x_TBND = x_VBND.expand(tasks, -1, -1, -1)
        return {name: head(x_TBND[task]) for task, (name, head) in enumerate(self.squad.heads.items())}


def trace_squad(squad: SquadModel) -> torch.export.ExportedProgram:
    """Return the graph of a squad: `images` (B, 3, S, S) float32, any B >= 1, to a dictionary by task."""
    example = torch.zeros(2, 3, squad.image_size, squad.image_size)  # two: a batch of one would be fixed for ever
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(
            PortableSquad(squad).eval(), (example,), dynamic_shapes={"images": {0: batch}}, strict=True
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine, which would stand in every file
    return program


@torch.no_grad()
def images_clear_of_ties(squad: SquadModel, images: Tensor, count: int) -> Tensor:
    """Return the `count` images on which every token is farthest from a tie between its K-th and its next expert.

    At a tie, rounding decides which expert a token uses: there even two machines that run the same squad disagree. With
    13 tasks of the `small` model, untrained, 1 of 8 random images came so near (logits 1e-6 apart or less) that the
    predictions of two correct programs differed by 5.6e-2; on the other 7 they agreed to 4e-6.

    Args:
        squad: in eval mode.
        images: (B, 3, S, S) float32, in [-1, 1]; B >= count.
        count: how many to return, the clearest first.
    """
    margins: list[float] = []

    def note_margin(router: TaskRouter, _inputs: Any, routing: Routing) -> None:
        logits_SQ = routing.logits_SE if router.kept is None else routing.logits_SE[:, router.kept]
        if logits_SQ.shape[1] > router.top_k:
            best = logits_SQ.topk(router.top_k + 1).values
            margins[-1] = min(margins[-1], float((best[:, -2] - best[:, -1]).min()))

    hooks = [part.register_forward_hook(note_margin) for part in squad.modules() if isinstance(part, TaskRouter)]
    try:
        for image in images:
            margins.append(math.inf)
            squad(image[None])
    finally:
        for hook in hooks:
            hook.remove()
    return images[torch.tensor(margins).argsort(descending=True, stable=True)[:count]]


def _apply(part: nn.Module, x_VBND: Tensor) -> Tensor:
    """Run the attention or the MLP of a block, dense or made of experts."""
    x_RND = x_VBND.flatten(0, 1)
    if not isinstance(part, ExpertLayer):
        y_RND: Tensor = part(x_RND)
        return y_RND.view_as(x_VBND)
    # Where every task has its router, the tokens of all its images are one long row of the task.
    routers = len(part.router.weight)
    task_T = torch.arange(routers, device=x_VBND.device) if routers > 1 else None
    routing = part.router(x_VBND.reshape(routers, -1, x_VBND.shape[-1]), task_T)
    if isinstance(part.experts, ExpertAttention):
        return _expert_attention(part.experts, x_RND, routing).view_as(x_VBND)
    return _expert_mlp(part.experts, x_RND.flatten(0, 1), routing).view_as(x_VBND)


def _expert_mlp(layer: ExpertMLP, x_SD: Tensor, routing: Routing) -> Tensor:
    """Return (S, D): see `model.experts`."""

    def ffn(rows_D: Tensor, expert: int) -> Tensor:
        hidden_H = F.gelu(torch.addmm(layer.b1[expert], rows_D, layer.w1[expert]))
        return torch.addmm(layer.b2[expert], hidden_H, layer.w2[expert])

    order_C, sizes = _by_expert(routing.experts_SK, len(layer.w1))
    y_CD = _run_experts(ffn, x_SD[order_C // layer.top_k], order_C, sizes)
    return _combine(y_CD, routing.gates_SK)


def _expert_attention(layer: ExpertAttention, x_RND: Tensor, routing: Routing) -> Tensor:
    """Return (S, D): see `model.attention`."""
    rows, tokens, _ = x_RND.shape
    order_C, sizes = _by_expert(routing.experts_SK, len(layer.wq))
    x_CD = x_RND.flatten(0, 1)[order_C // layer.top_k]
    q_Cd = _run_experts(lambda rows_D, expert: rows_D @ layer.wq[expert], x_CD, order_C, sizes)
    key_R1Nd, value_R1Nd = layer.kv(x_RND).unsqueeze(1).chunk(2, dim=-1)
    q = q_Cd.view(rows, 1, tokens * layer.top_k, q_Cd.shape[1])
    a_Cd = F.scaled_dot_product_attention(q, key_R1Nd, value_R1Nd).reshape(q_Cd.shape)
    y_CD = _run_experts(lambda rows_d, expert: rows_d @ layer.wo[expert], a_Cd[order_C], order_C, sizes)
    return _combine(y_CD, routing.gates_SK)


def _by_expert(experts_SK: Tensor, experts: int) -> tuple[Tensor, list[int]]:
    """Return the choices in the order of their experts, and how many each expert has."""
    expert_C = experts_SK.flatten()
    counts_E = (expert_C == torch.arange(experts, device=expert_C.device)[:, None]).sum(1)
    return expert_C.sort(stable=True).indices, counts_E.tolist()


def _run_experts(
    function: Callable[[Tensor, int], Tensor], rows_CF: Tensor, order_C: Tensor, sizes: list[int]
) -> Tensor:
    """Run every expert on its run of the sorted rows; return the results in the order of the choices."""
    out_CF = torch.cat([function(run, expert) for expert, run in enumerate(torch.split(rows_CF, sizes))])
    # Their number is C again, which a graph cannot tell from a sum of unknown lengths.
    return out_CF.new_zeros(len(order_C), out_CF.shape[1]).index_copy(0, order_C, out_CF)


def _combine(y_CD: Tensor, gates_SK: Tensor) -> Tensor:
    """Return (S, D): each token's choices, weighted by their gates."""
    return (y_CD.view(*gates_SK.shape, y_CD.shape[1]) * gates_SK[..., None]).sum(1)
