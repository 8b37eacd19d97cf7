"""Philox against its published vectors, and its Gaussians: their law, and that nothing but the stream decides them."""

from collections.abc import Callable

import pytest
import torch
from scipy import stats
from torch import Tensor

from model.counter_noise import philox_4x32, standard_normal

# tests/kat_vectors of the authors' Random123 library, "philox4x32 10": counter, key, words.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEED = 0x299F31D0A4093822


def numbers(words: str) -> list[int]:
    return [int(word, 16) for word in words.split()]


def streams(*first: int, epoch: int = 0, task: int = 1) -> Tensor:
    return torch.tensor([(number, epoch, task) for number in first])


@pytest.mark.parametrize(("counter", "key", "words"), PUBLISHED)
def test_published_vectors(counter: str, key: str, words: str) -> None:
    c0, c1, c2, c3 = torch.tensor(numbers(counter))
    low, high = numbers(key)
    assert [int(word) for word in philox_4x32((c0, c1, c2, c3), (low, high))] == numbers(words)


def test_counters_broadcast() -> None:
    rows, columns = torch.tensor([[3], [2**32 - 1]]), torch.arange(5)[None]
    zero = torch.zeros(1, 1, dtype=torch.int64)
    together = philox_4x32((columns, rows, zero, zero), (1, 2))
    for row in range(2):
        for column in range(5):
            alone = philox_4x32((columns[0, column], rows[row, 0], zero[0, 0], zero[0, 0]), (1, 2))
            assert [int(word) for word in alone] == [int(word[row, column]) for word in together]


def test_the_noise_is_made_of_the_words_of_its_counter() -> None:
    noise = standard_normal(SEED, torch.tensor([(7, 8, 9)]), tokens=2, width=6)
    place = torch.tensor(3)  # token 1, numbers 4 and 5: the second counter of the second token
    u, v, _, _ = philox_4x32((place, *torch.tensor([7, 8, 9])), (0xA4093822, 0x299F31D0))
    radius, angle = (-2 * ((u + 0.5).double() / 2**32).log()).sqrt(), 2 * torch.pi * v.double() / 2**32
    torch.testing.assert_close(noise[0, 1, 4:], torch.stack([radius * angle.cos(), radius * angle.sin()]).float())


def test_numbers_are_standard_normal_and_independent() -> None:
    noise = standard_normal(SEED, streams(*range(64)), tokens=64, width=64).double()
    assert stats.kstest(noise.flatten(), "norm").pvalue > 0.01
    deviation = len(noise.flatten()) ** -0.5
    assert abs(noise.mean()) < 3 * deviation
    assert abs(noise.var() - 1) < 3 * 2**0.5 * deviation
    assert noise.abs().max() > 4  # of 262,144 numbers, 17 are expected beyond
    others = {
        **{f"{apart} experts on": noise.roll(apart, 2) for apart in (1, 2, 3, 4)},
        "token": noise.roll(1, 1),
        "sample": noise.roll(1, 0),
        "epoch": standard_normal(SEED, streams(*range(64), epoch=1), tokens=64, width=64).double(),
        "task": standard_normal(SEED, streams(*range(64), task=2), tokens=64, width=64).double(),
        "seed": standard_normal(SEED + 1, streams(*range(64)), tokens=64, width=64).double(),
        "upper half of the seed": standard_normal(SEED + 2**32, streams(*range(64)), tokens=64, width=64).double(),
    }
    functions: tuple[Callable[[Tensor], Tensor], ...] = (lambda x: x, lambda x: x.square() - 1, torch.sign)
    for name, other in others.items():
        for function in functions:
            scale = function(noise).square().mean()
            correlation = (function(noise) * function(other)).mean() / scale
            assert abs(correlation) < 4 * deviation, name


def test_a_row_depends_on_its_stream_alone() -> None:
    rows = streams(5, 2**32 - 1, 0, 5, 11)
    noise = standard_normal(SEED, rows, tokens=3, width=5)
    assert noise.dtype == torch.float32
    for row in range(len(rows)):
        assert torch.equal(standard_normal(SEED, rows[row : row + 1], tokens=3, width=5)[0], noise[row])
    assert torch.equal(standard_normal(SEED, rows.flip(0), tokens=3, width=5), noise.flip(0))
    assert torch.equal(noise[0], noise[3])
    assert standard_normal(SEED, rows[:0], tokens=3, width=5).shape == (0, 3, 5)


def test_torchs_generator_has_no_part_in_it() -> None:
    before = torch.get_rng_state()
    first = standard_normal(SEED, streams(1), tokens=2, width=4)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(int(torch.initial_seed()) + 1)
    assert torch.equal(standard_normal(SEED, streams(1), tokens=2, width=4), first)
