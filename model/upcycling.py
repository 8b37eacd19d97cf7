"""Experts made from a dense layer (sparse upcycling, arXiv 2212.05055), so that training starts near the dense model.

A dense layer is cut into K parts that sum to it, and every expert holds one part. K experts with one part each form a
virtual group (arXiv 2410.07524): routers start with the same column for all of a group, so that the K experts of a
token are a whole layer. Outputs are scaled by the inverse of the mean gate. At the start, up to the noise below, and
where K divides E (in an incomplete group a token's gates differ):

- MLP: part k is the k-th slice of hidden units. A token gets the dense output times the sum of its gates over that
  sum's mean; with renormalised gates it is the dense output.
- Attention: part k is a dense head, or several where K is below their number. All share one key and one value
  projection, so this is an approximation. Of all projections to d dimensions those are taken that keep most of the
  heads' products of query and key, and of value and output, matrices (Eckart and Young 1936); the mean of the heads,
  as in arXiv 2305.13245, depends on the basis that each head happens to have.

Noise tells experts with the same part from each other. It depends on seed, layer and expert alone.

Shape legend: D (and F) width, E experts, K chosen, H hidden width of an expert, h dense heads, c their width, d head
width of the experts, r = min(d, D).
"""

import math
from collections.abc import Mapping
from random import Random

import torch
from torch import Tensor, nn

from model.attention import ExpertAttention
from model.router import seeded_generator
from model.vit import ExpertLayer

NOISE = 0.02
"""Deviation of the noise on an expert's matrix, over the root mean square of the matrix."""
_PROBES = 1024  # tokens from which mean gates are measured
_STEP_BACK = 1e-3
_NARROWEST = 1e-3  # over the mean scale of a norm
_WEAKEST = 1e-2  # singular value that counts, over the largest: smaller ones would make for huge biases


def upcycle_mlp(layer: ExpertLayer, norm: nn.LayerNorm, dense: Mapping[str, Tensor], *, seed: int) -> None:
    """Overwrite experts and routers of an MLP layer.

    Args:
        layer: freshly built; K times its hidden width is the dense hidden width.
        norm: the layer norm before it, with its final weights.
        dense: the block's weights `mlp.fc1` and `mlp.fc2`.
        seed: of the model.
    """
    K = layer.info.top_k
    gain = 1.0 / _form_groups(layer, norm, seed)
    width = norm.weight.shape[0]
    w1_KDH = dense["mlp.fc1.weight"].reshape(K, -1, width).mT
    w2_KHD = dense["mlp.fc2.weight"].T.reshape(K, -1, width) * gain
    _fill_experts(layer, {"w1": w1_KDH, "w2": w2_KHD}, seed)
    b1_KH = dense["mlp.fc1.bias"].reshape(K, -1)
    b2_KD = (dense["mlp.fc2.bias"] * gain / K).expand(K, -1)
    _fill_experts(layer, {"b1": b1_KH, "b2": b2_KD}, seed, noise=0.0)


def upcycle_attention(
    layer: ExpertLayer, norm: nn.LayerNorm, dense: Mapping[str, Tensor], *, heads: int, seed: int
) -> None:
    """Overwrite experts, shared keys and values, and routers of an attention layer.

    Biases: those of dense keys cancel in the softmax, those of dense queries are left out, as experts have none. Those
    of values and output become the bias of the shared values that comes nearest.

    Args:
        layer: freshly built; any number of experts and any head width.
        norm: the layer norm before it, with its final weights.
        dense: the block's weights `attn.qkv` and `attn.proj`.
        heads: h.
        seed: of the model.
    """
    K, experts, D = layer.info.top_k, layer.experts, norm.weight.shape[0]
    assert isinstance(experts, ExpertAttention)
    d, c = experts.kv.out_features // 2, D // heads
    gain = 1.0 / _form_groups(layer, norm, seed)
    query_hcD, key_hcD, value_hcD = dense["attn.qkv.weight"].double().reshape(3, heads, c, D)
    out_hcD = dense["attn.proj.weight"].double().T.reshape(heads, c, D)

    # Head by head: logits are x A x^T / sqrt(c), and x B is what a token adds wherever it is attended to. Heads that
    # become one expert share one attention, the (normalised) product of theirs, and add what all of them add.
    share_Kh = _deal_heads(heads, K)
    mean_Kh = (share_Kh > 0) / (share_Kh > 0).sum(1, keepdim=True)
    a_KDF = torch.einsum("Kh,hcD,hcF->KDF", mean_Kh.double(), query_hcD, key_hcD)
    b_KDF = torch.einsum("Kh,hcD,hcF->KDF", share_Kh, value_hcD, out_hcD)

    # Distances are measured on tokens as the norm scales them; the floor only keeps the inverse finite.
    scale_D1 = norm.weight.double().abs()[:, None]
    scale_D1 = scale_D1.clamp_min(_NARROWEST * scale_D1.mean())
    key_Dr = _main_directions(scale_D1 * a_KDF * scale_D1.T, d)
    value_Dr = _main_directions((scale_D1 * b_KDF).mT, d)
    r = key_Dr.shape[1]
    wq_KDd, wo_KdF = torch.zeros(K, D, d), torch.zeros(K, d, D)
    wq_KDd[:, :, :r] = a_KDF @ (scale_D1 * key_Dr) * math.sqrt(d / c)
    wo_KdF[:, :r] = (scale_D1 * value_Dr).T @ b_KDF
    _fill_experts(layer, {"wq": wq_KDd, "wo": wo_KdF * gain}, seed)

    key_weight_dD, value_weight_dD = experts.kv.weight.chunk(2)
    key_weight_dD[:r] = (key_Dr / scale_D1).T
    value_weight_dD[:r] = (value_Dr / scale_D1).T
    constant_F = dense["attn.qkv.bias"].double().chunk(3)[2] @ out_hcD.flatten(0, 1) + dense["attn.proj.bias"]
    experts.kv.bias[d:] = constant_F @ torch.linalg.pinv(wo_KdF.double().sum(0), rtol=_WEAKEST)


def _form_groups(layer: ExpertLayer, norm: nn.LayerNorm, seed: int) -> float:
    """Give all experts of a virtual group the router columns of its first, and return the mean gate that then results.

    The gates are those of standard normal tokens after `norm`: routers are random, so all that counts of a token is
    its length.
    """
    router, E, K = layer.router, layer.info.num_experts, layer.info.top_k
    router.weight.copy_(router.weight[:, :, [expert - expert % K for expert in range(E)]])
    if last := E % K:
        # A token that prefers the incomplete group takes the rest from the next best. There, and only there, those that
        # would double its parts must come last: their logits z fall by a little of (z_incomplete - z).
        doubled = [expert for expert in range(E - last) if _part(expert, E, K) >= K - last]
        columns = router.weight[:, :, doubled]
        router.weight[:, :, doubled] = columns + _STEP_BACK * (columns - router.weight[:, :, -1:])
    routers, width = router.weight.shape[:2]
    probes_ND = norm(torch.randn(_PROBES, width, generator=_generator(layer, seed, E)))
    training = router.training
    router.eval()  # without noise
    gates_SK = router(probes_ND.expand(routers, -1, -1), torch.arange(routers)).gates_SK
    router.train(training)
    return float(gates_SK.mean())


def _part(expert: int, num_experts: int, top_k: int) -> int:
    """Return which part an expert holds: its place in its group; an incomplete group holds the last parts."""
    group, place = divmod(expert, top_k)
    return place + max(0, (group + 1) * top_k - num_experts)


def _deal_heads(heads: int, parts: int) -> Tensor:
    """Return (K, h) float64: the share of each head in each part; columns sum to 1."""
    dealt_Kh = torch.zeros(parts, heads, dtype=torch.float64)
    for turn in range(max(heads, parts)):
        dealt_Kh[turn % parts, turn % heads] = 1.0
    return dealt_Kh / dealt_Kh.sum(0)


def _main_directions(matrices_KDF: Tensor, count: int) -> Tensor:
    """Return (F, min(count, F)): orthonormal columns; the rows of all matrices lose least when projected onto them."""
    gram_FF = torch.einsum("KDF,KDG->FG", matrices_KDF, matrices_KDF)
    directions_Fr: Tensor = torch.linalg.eigh(gram_FF).eigenvectors.flip(1)[:, :count]
    # Signs are arbitrary, and ranks must agree on them whatever their processors.
    largest_1r = directions_Fr.gather(0, directions_Fr.abs().argmax(0, keepdim=True))
    return directions_Fr * largest_1r.sign()


def _fill_experts(layer: ExpertLayer, parts: Mapping[str, Tensor], seed: int, *, noise: float = NOISE) -> None:
    """Overwrite the named parameters of this rank's experts with their parts (K, ...), plus noise."""
    E, K = layer.info.num_experts, layer.info.top_k
    for row, expert in enumerate(layer.experts.layout.owned):
        generator = _generator(layer, seed, expert)
        for name, part in parts.items():
            value = part[_part(expert, E, K)]
            drawn = torch.randn(value.shape, generator=generator) * value.square().mean().sqrt()
            layer.experts.get_parameter(name)[row] = value + noise * drawn


def _generator(layer: ExpertLayer, seed: int, number: int) -> torch.Generator:
    return seeded_generator(Random(f"{seed}/{layer.info.name}/upcycled").getrandbits(62), number)
