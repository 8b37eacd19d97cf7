"""Pixels of a batch in one block, and a batch on its way between processes."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data_pipeline.batch import Batch
from data_pipeline.block import Parcel, allocate

DTYPES = (torch.uint8, torch.bool, torch.uint16, torch.float32)
SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=4).map(tuple)


def filled(tensor: Tensor, value: int) -> Tensor:
    return tensor.fill_(bool(value % 2) if tensor.dtype == torch.bool else value)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6), st.booleans())
def test_arrays_share_a_block_but_no_byte(wanted: list[tuple[tuple[int, ...], torch.dtype]], shared: bool) -> None:
    tensors = allocate({str(number): each for number, each in enumerate(wanted)}, shared=shared)
    assert [(tuple(tensor.shape), tensor.dtype) for tensor in tensors.values()] == wanted
    for value, tensor in enumerate(tensors.values()):
        assert tensor.is_contiguous()
        filled(tensor, value)
    for value, tensor in enumerate(tensors.values()):
        assert torch.equal(tensor, filled(torch.empty_like(tensor), value))
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) <= 1
    if any(tensor.numel() for tensor in tensors.values()):
        assert all(tensor.is_shared() == shared for tensor in tensors.values())  # type: ignore[no-untyped-call]


def a_batch(*, shared: bool = False, images: int = 2) -> Batch:
    pixels = allocate(
        {
            "images": ((images, 3, 4, 4), torch.uint8),
            "mask": ((images, 4, 4), torch.bool),
            "depth": ((images, 1, 4, 4), torch.uint16),
            "scene": ((images, 365), torch.float32),
        },
        shared=shared,
    )
    for tensor in pixels.values():
        tensor.copy_(torch.arange(tensor.numel()).view(tensor.shape).to(tensor.dtype))
    return Batch(
        images=pixels["images"],
        mask_valid=pixels["mask"],
        pair_image=torch.arange(images),
        pair_task=torch.zeros(images, dtype=torch.int64),
        labels={"depth_zbuffer": pixels["depth"], "class_scene": pixels["scene"]},
        global_pairs=torch.tensor([images]),
        flip=torch.tensor([True] * images),
        crop=torch.rand(images, 4),
        turns=torch.zeros(images, 2, dtype=torch.int64),
        keys=tuple(f"k{number}" for number in range(images)),
        photometric={"brightness": torch.rand(images)},
    )


def assert_same(found: Batch, expected: Batch) -> None:
    assert vars(found).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        if name != "keys":
            torch.testing.assert_close(vars(found)[name], value, rtol=0, atol=0)
    assert found.keys == expected.keys


@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_comes_out_of_its_parcel_as_it_was(images: int, shared: bool) -> None:
    batch = a_batch(images=images, shared=shared)
    again = Parcel.of(batch).unpack()
    assert_same(again, batch)
    assert again.images.data_ptr() == batch.images.data_ptr(), "nothing is copied"


def test_only_the_block_needs_shared_memory() -> None:
    parcel = Parcel.of(a_batch())
    assert len(pickle.dumps(parcel.parts)) < 2000, "pixels stay in the block"
    assert not any(isinstance(part, torch.Tensor) for part in parcel.parts.values())


def test_a_tensor_outside_the_block_travels_by_value() -> None:
    batch = a_batch()
    strided = Batch(**{**vars(batch), "labels": {"depth_zbuffer": batch.labels["depth_zbuffer"][..., ::2]}})
    assert_same(Parcel.of(strided).unpack(), strided)
