"""Noise that depends on what it is for, not on when or where it is drawn.

Philox4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11, section 3.3) maps a
key and a counter to random words and has no state. So every rank draws the same noise for the same row, in any batch
and order, and a block that runs again in backward draws it again. Plain int64 arithmetic: the same bits on any device.

Shape legend: R rows (images or pairs), N tokens of a row, E numbers per token, Q = ceil(E / 4) counters per token.
"""

import math

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor, Tensor, Tensor]
"""Four int64 tensors that hold 32-bit words, from 0 to 2^32 - 1, and broadcast together."""

_ROUNDS = 10
_MASK = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # added to the key after each round: golden ratio, sqrt(3) - 1
_UNIT = 2.0**-32


def philox_4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Return four independent uniform words for each counter."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # Products wrap modulo 2^64, and the mask takes off the sign that the shift drags in: all 64 bits are there.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = _high(product1) ^ (c1 ^ k0), product1 & _MASK
        c2, c3 = _high(product0) ^ (c3 ^ k1), product0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def standard_normal(seed: int, stream_R3: Tensor, *, tokens: int, width: int) -> Tensor:
    """Return (R, tokens, width) float32 from N(0, 1), each row a function of `seed` and the row's stream alone.

    Box-Muller: sqrt(-2 ln u) (cos, sin)(2 pi v). In float64, so that the last bits of a device's functions do not
    reach the float32 result but in one of some 10^8 numbers.

    Args:
        seed: up to 64 bits.
        stream_R3: (R, 3) int64 from 0 to 2^32 - 1; rows with the same three numbers get the same noise.
        tokens: N.
        width: E; a row's noise also depends on it.
    """
    blocks = -(-width // 4)  # Q
    place_1C = torch.arange(tokens * blocks, device=stream_R3.device)[None]
    first_R1, second_R1, third_R1 = stream_R3[:, :, None].unbind(1)
    words = philox_4x32((place_1C, first_R1, second_R1, third_R1), (seed & _MASK, (seed >> 32) & _MASK))
    normal_RC4 = torch.stack([*_box_muller(*words[:2]), *_box_muller(*words[2:])], dim=-1)
    return normal_RC4.view(len(stream_R3), tokens, 4 * blocks)[..., :width].float()


def _high(product: Tensor) -> Tensor:
    """Return the upper 32 of 64 bits."""
    return (product >> 32).bitwise_and_(_MASK)


def _box_muller(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return two independent standard normal numbers, float64, of two words."""
    radius = (u.double() + 0.5).mul_(_UNIT).log_().mul_(-2.0).sqrt_()  # u + 0.5: never the logarithm of 0
    angle = v.double().mul_(2.0 * math.pi * _UNIT)
    return radius * angle.cos(), radius * angle.sin()
