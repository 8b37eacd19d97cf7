"""Weights of a dense vision transformer, under the names of timm, DeiT and MAE, as the start of a Mod-Squad.

Dense parts are copied: a model without experts and task embedding gives the patch tokens of the source without its
class token. Experts and their routers are upcycled (`model.upcycling`), heads begin with the source's last layer norm.
All depends on the weights and the seed alone, whatever shard of the experts a rank holds.

Assumed, as no file says so: the source saw images normalised by ImageNet's mean and deviation (so DeiT, MAE and most of
timm), has as many heads as the model, and exact GELUs.

Shape legend: D width, p patch side, G patches along a side, h heads, d head width of the source, e of the model, T
tasks.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from configs.schema import MODEL_PRESETS, ModelConfig
from model.attention import DenseAttention
from model.heads import DenseHead, VectorHead
from model.mod_squad import ModSquad
from model.upcycling import upcycle_attention, upcycle_mlp
from model.vit import Block, DenseMLP, ExpertLayer, VisionTransformer

# Of ImageNet's training images in [0, 1]: what DeiT, MAE and most of timm subtract and divide by.
_PIXEL_MEAN, _PIXEL_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# Deviation at which task embeddings start. Their usual one, in every block, would drown what the source computes: in a
# small dense model it changed tokens by half of their variance.
_TASK_STD = 0.02
_PATCH = "patch_embed.proj.weight"
_BLOCK_PARTS = ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
_FINAL_NORMS = ("norm", "fc_norm")  # of the tokens, or of their mean; a file has one of them
# What else of a file acts on patch tokens; everything beside it (class token, heads, decoder) can be left out.
_ACTS_ON_PATCHES = re.compile(r"blocks\.|patch_embed\.|norm_pre|reg_token|register_tokens|rope|rel_pos")


@dataclass(frozen=True, kw_only=True)
class DenseViT:
    """A dense vision transformer's weights, float32.

    Attributes:
        source: names it in messages.
        width, depth, patch_size, hidden: its sizes; `hidden` is that of an MLP.
        weights: by the names of timm, without prefix; the final norm is `norm`, whichever the file has.
        positions: (G, G, D), of the patches alone.
        unused: first parts of the names in the file that stay unused, sorted.
    """

    source: str
    width: int
    depth: int
    patch_size: int
    hidden: int
    weights: Mapping[str, Tensor]
    positions: Tensor
    unused: tuple[str, ...]

    def block(self, index: int) -> dict[str, Tensor]:
        """Return the weights of block number `index` by their names within it."""
        prefix = f"blocks.{index}."
        return {name.removeprefix(prefix): value for name, value in self.weights.items() if name.startswith(prefix)}


def read_dense_vit(tensors: Mapping[str, Tensor], source: str) -> DenseViT:
    """Find the vision transformer in a file's tensors, under whatever prefix.

    Args:
        tensors: by name, as the file has them.
        source: names the file in errors.

    Raises:
        UserError: there is none, or several, or parts of it are missing, misshapen or unknown to our model.
    """
    prefix = _find_prefix(tensors, source)
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    final_norm = next((name for name in _FINAL_NORMS if f"{name}.weight" in own), _FINAL_NORMS[0])
    depth = 1 + max((int(name.split(".")[1]) for name in own if re.match(r"blocks\.\d+\.", name)), default=0)

    parts = [f"blocks.{index}.{part}" for index in range(depth) for part in _BLOCK_PARTS]
    needed = {f"{part}.{kind}" for part in ("patch_embed.proj", final_norm, *parts) for kind in ("weight", "bias")}
    needed.add("pos_embed")
    if unknown := sorted(name for name in own.keys() - needed if _ACTS_ON_PATCHES.match(name)):
        raise UserError(
            f"{source}: our model has no place for {_some(unknown)}: only plain vision transformers can be read (no "
            "LayerScale, register tokens, or norms of queries and keys)"
        )
    if missing := sorted(needed - own.keys()):
        raise UserError(f"{source}: {_some(missing)} missing: only names as timm, DeiT and MAE use them can be read")

    weights = {name: own[name].float() for name in needed}
    _check_shapes(weights, depth, final_norm, source)
    for kind in ("weight", "bias"):
        weights[f"norm.{kind}"] = weights.pop(f"{final_norm}.{kind}")
    others = [name.removeprefix(prefix) for name in tensors if name.removeprefix(prefix) not in needed]
    return DenseViT(
        source=source,
        width=weights[_PATCH].shape[0],
        depth=depth,
        patch_size=weights[_PATCH].shape[-1],
        hidden=weights["blocks.0.mlp.fc1.weight"].shape[0],
        positions=_patch_positions(weights.pop("pos_embed"), source),
        weights=weights,
        unused=tuple(sorted({name.split(".")[0] for name in others})),
    )


@torch.no_grad()
def start_from_dense(model: ModSquad, dense: DenseViT, *, seed: int) -> None:
    """Overwrite a freshly built model's weights with those of a dense vision transformer.

    Args:
        model: on the CPU in float32; may hold a shard of the experts.
        dense: of the same width, depth, patch side and MLP width; positions of another grid are resampled.
        seed: of the noise that tells experts apart.

    Raises:
        UserError: the sizes differ; names what to set.
    """
    _check_fits(model.config, dense)
    _copy_embedding(model.backbone, dense)
    if model.config.task_embedding != "none":
        embedding_TD = model.backbone.task_embedding
        embedding_TD.mul_(_TASK_STD / embedding_TD.square().mean().sqrt())
    for index, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        _start_block(block, dense.block(index), heads=model.config.heads, seed=seed)
    for head in model.heads.values():
        assert isinstance(head, DenseHead | VectorHead)
        _copy_affine(head.norm, dense.weights, "norm")


def _find_prefix(tensors: Mapping[str, Tensor], source: str) -> str:
    """Return what precedes the names of the vision transformer: "", "module.", "backbone.", "encoder." or any other."""
    found = sorted(name.removesuffix(_PATCH) for name in tensors if name.endswith(_PATCH))
    if not found:
        raise UserError(f"{source}: {_PATCH} missing: only names as timm, DeiT and MAE use them can be read")
    if len(found) > 1:
        raise UserError(f"{source} holds several vision transformers ({_some(found)}): keep one of them")
    return found[0]


def _check_shapes(weights: Mapping[str, Tensor], depth: int, final_norm: str, source: str) -> None:
    width, patch_size = weights[_PATCH].shape[0], weights[_PATCH].shape[-1]
    hidden = weights["blocks.0.mlp.fc1.bias"].numel()
    matrices = {
        "patch_embed.proj": (width, 3, patch_size, patch_size),
        "attn.qkv": (3 * width, width),
        "attn.proj": (width, width),
        "mlp.fc1": (hidden, width),
        "mlp.fc2": (width, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for part in (
        "patch_embed.proj",
        final_norm,
        *(f"blocks.{i}.{part}" for i in range(depth) for part in _BLOCK_PARTS),
    ):
        matrix = matrices.get(re.sub(r"^blocks\.\d+\.", "", part), (width,))
        shapes |= {f"{part}.weight": matrix, f"{part}.bias": matrix[:1]}
    for name, shape in shapes.items():
        if weights[name].shape != shape:
            raise UserError(f"{source}: {name} has shape {tuple(weights[name].shape)}, expected {shape}")
    if weights["pos_embed"].shape[-1] != width:
        raise UserError(f"{source}: pos_embed has width {weights['pos_embed'].shape[-1]}, the patches have {width}")


def _patch_positions(pos_embed: Tensor, source: str) -> Tensor:
    """(1, extra + G * G, D) -> (G, G, D); the first up to two belong to class and distillation token."""
    rows = pos_embed.flatten(0, -2)
    for extra in range(3):
        side = math.isqrt(max(len(rows) - extra, 0))
        if side and side**2 + extra == len(rows):
            return rows[extra:].reshape(side, side, -1)
    raise UserError(f"{source}: pos_embed holds {len(rows)} positions, which is no square of patches")


def _check_fits(config: ModelConfig, dense: DenseViT) -> None:
    theirs = {"width": dense.width, "depth": dense.depth, "patch_size": dense.patch_size}
    ours = {name: getattr(config, name) for name in theirs}
    if theirs != ours:
        fitting = [name for name, sizes in MODEL_PRESETS.items() if theirs.items() <= sizes.items()]
        advice = f"set model.preset={fitting[0]}" if fitting else "no preset has these sizes, so set them one by one"
        raise UserError(
            f"{dense.source} is a vision transformer of {_sizes(theirs)}, the model has {_sizes(ours)}: {advice}"
        )
    if dense.hidden != config.dense_hidden:
        raise UserError(
            f"{dense.source} has MLPs of width {dense.hidden}, the model's mlp_ratio {config.mlp_ratio:g} gives "
            f"{config.dense_hidden}: set model.mlp_ratio={dense.hidden / dense.width:g}"
        )
    if dense.width % config.heads:
        raise UserError(
            f"{dense.source} has width {dense.width}, which model.heads {config.heads} does not divide: set it to the "
            "number of heads of that vision transformer"
        )
    has_dense_attention = not all(config.has_expert_attention(index) for index in range(config.depth))
    if has_dense_attention and config.attention_head_width < (needed := dense.width // config.heads):
        raise UserError(
            f"{dense.source} has heads of width {needed}, which model.head_width {config.head_width} cannot hold: set "
            f"at least {needed}"
        )


def _copy_embedding(backbone: VisionTransformer, dense: DenseViT) -> None:
    """Copy patch embedding and positions.

    For a pixel value v in [0, 1] the model sees x = 2 v - 1 and the source saw (v - mean) / std per channel, which is
    x / (2 std) + (1/2 - mean) / std: the factor goes into the weights, the constant into the bias.
    """
    kernel_D3pp = dense.weights[_PATCH].double()
    mean_3, std_3 = torch.tensor(_PIXEL_MEAN).double(), torch.tensor(_PIXEL_STD).double()
    weight_D3pp = kernel_D3pp / (2 * std_3[:, None, None])
    bias_D = dense.weights["patch_embed.proj.bias"] + kernel_D3pp.sum((2, 3)) @ ((0.5 - mean_3) / std_3)
    backbone.patch.weight.copy_(weight_D3pp.flatten(1))
    backbone.patch.bias.copy_(bias_D)

    position_1DGG = dense.positions.permute(2, 0, 1)[None]
    if position_1DGG.shape[-1] != backbone.grid:
        size = (backbone.grid, backbone.grid)
        position_1DGG = F.interpolate(position_1DGG, size, mode="bicubic", antialias=True)
    backbone.position.copy_(position_1DGG[0].flatten(1).T)


def _start_block(block: Block, dense: Mapping[str, Tensor], *, heads: int, seed: int) -> None:
    _copy_affine(block.norm1, dense, "norm1")
    _copy_affine(block.norm2, dense, "norm2")
    attention, mlp = block.attention, block.mlp
    if isinstance(attention, ExpertLayer):
        upcycle_attention(attention, block.norm1, dense, heads=heads, seed=seed)
    else:
        assert isinstance(attention, DenseAttention)
        _copy_attention(attention, dense)
    if isinstance(mlp, ExpertLayer):
        upcycle_mlp(mlp, block.norm2, dense, seed=seed)
    else:
        assert isinstance(mlp, DenseMLP)
        _copy_affine(mlp.up, dense, "mlp.fc1")
        _copy_affine(mlp.down, dense, "mlp.fc2")


def _copy_attention(part: DenseAttention, dense: Mapping[str, Tensor]) -> None:
    """Copy each head into the first d of its e dimensions, so that the layer computes the same.

    Queries grow by sqrt(e / d), as their products with keys are divided by sqrt(e) instead of sqrt(d). In the other
    dimensions queries and values are zero, keys and outputs stay as initialised: so all of them receive gradients.
    """
    h, e, D = part.heads, part.head_width, part.out.out_features
    d = D // h
    _copy_heads(part.qkv.weight.view(3, h, e, D), dense["attn.qkv.weight"].reshape(3, h, d, D))
    _copy_heads(part.qkv.bias.view(3, h, e), dense["attn.qkv.bias"].reshape(3, h, d))
    part.out.weight.view(D, h, e)[:, :, :d] = dense["attn.proj.weight"].reshape(D, h, d)
    part.out.bias.copy_(dense["attn.proj.bias"])


def _copy_heads(ours: Tensor, theirs: Tensor) -> None:
    """Copy (3, h, d, ...) into (3, h, e, ...): queries, keys, values."""
    e, d = ours.shape[2], theirs.shape[2]
    query, key, value = ours
    query[:, :d], query[:, d:] = theirs[0] * math.sqrt(e / d), 0.0
    key[:, :d] = theirs[1]
    value[:, :d], value[:, d:] = theirs[2], 0.0


def _copy_affine(ours: nn.Module, dense: Mapping[str, Tensor], name: str) -> None:
    assert isinstance(ours, nn.Linear | nn.LayerNorm)
    ours.weight.copy_(dense[f"{name}.weight"])
    ours.bias.copy_(dense[f"{name}.bias"])


def _sizes(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
