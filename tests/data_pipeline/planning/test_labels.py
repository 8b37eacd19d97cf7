"""Label sets are bits, and a view of stored sets renumbers its tasks."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.planning.labels import LabelTable, code_dtype, pack_codes, tasks_of, unpack_codes


@given(st.integers(1, 64), st.integers(0, 2**32))
def test_sets_tell_what_the_table_told(tasks: int, seed: int) -> None:
    table = np.random.default_rng(seed).random((9, tasks)) < 0.5
    codes = pack_codes(table)
    assert codes.dtype == code_dtype(tasks)
    np.testing.assert_array_equal(unpack_codes(codes, tasks), table)
    assert [tasks_of(code) for code in codes.tolist()] == [tuple(np.flatnonzero(row).tolist()) for row in table]


def test_the_smallest_type_is_used() -> None:
    assert [code_dtype(tasks).itemsize for tasks in (8, 9, 16, 17, 32, 33, 64)] == [1, 2, 2, 4, 4, 8, 8]
    with pytest.raises(ValueError, match="65 tasks"):
        code_dtype(65)


@given(st.integers(0, 2**32), st.lists(st.integers(0, 11) | st.none(), min_size=1, max_size=12))
def test_a_view_renumbers_tasks(seed: int, bits: list[int | None]) -> None:
    rng = np.random.default_rng(seed)
    stored = rng.random((20, 12)) < 0.5
    labels = LabelTable(pack_codes(stored), bits)
    expected = np.stack([np.zeros(20, bool) if bit is None else stored[:, bit] for bit in bits], axis=1)
    rows = rng.permutation(20)[:7]
    np.testing.assert_array_equal(unpack_codes(labels.codes(rows), len(bits)), expected[rows])
    np.testing.assert_array_equal(unpack_codes(labels.codes(slice(3, 9)), len(bits)), expected[3:9])
    for task in range(len(bits)):
        np.testing.assert_array_equal(labels.has(task, rows), expected[rows, task])
    wanted = (rng.random(len(bits)) < 0.5).tolist()
    np.testing.assert_array_equal(unpack_codes(labels.only(wanted).codes(rows), len(bits)), expected[rows] & wanted)
