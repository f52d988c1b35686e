"""The order of a row that devices divide."""

import numpy as np
import pytest

from dsjax.mesh import from_stripes, to_stripes

LENGTH = 4096


@pytest.mark.core
@pytest.mark.parametrize("count", [1, 2, 8])
def test_each_device_has_every_so_manieth_token(count):
    rows = np.arange(3 * 16).reshape(3, 16)
    striped = to_stripes(rows, count)
    for place, part in enumerate(np.split(striped, count, axis=1)):
        np.testing.assert_array_equal(part, rows[:, place::count])
    np.testing.assert_array_equal(from_stripes(striped, count), rows)
    wide = rows.T[None]
    np.testing.assert_array_equal(from_stripes(to_stripes(wide, count), count), wide)


def work_of_devices(documents: list[int], order: np.ndarray, count: int) -> np.ndarray:
    """Pairs of query and key of each device, where it has an equal share of the row's order."""
    seen = np.concatenate([np.arange(1, size + 1) for size in documents])
    return seen[order].reshape(count, -1).sum(axis=1)


@pytest.mark.core
def test_devices_have_equal_work_however_documents_are_packed():
    """Blocks of a row, two a device (zigzag), balance one document and not several."""
    count, rng = 4, np.random.default_rng(0)
    row = np.arange(LENGTH)
    blocks = row.reshape(2 * count, -1)
    zigzag = np.concatenate([blocks[[i, 2 * count - 1 - i]] for i in range(count)]).reshape(-1)
    striped = to_stripes(row[None], count)[0]
    packed = [[LENGTH], [LENGTH // 2] + [64] * (LENGTH // 128)]
    for _ in range(10):
        cuts = np.sort(rng.choice(LENGTH - 1, 12, replace=False)) + 1
        packed.append(np.diff([0, *cuts, LENGTH]).tolist())
    unequal = []
    for documents in packed:
        work = work_of_devices(documents, striped, count)
        assert work.max() < 1.02 * work.mean()
        work = work_of_devices(documents, zigzag, count)
        unequal.append(work.max() / work.mean())
    assert unequal[0] < 1.001
    assert unequal[1] > 1.5


def test_rows_that_devices_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"rows of 30 tokens: must be divisible by mesh.context=4"):
        to_stripes(np.zeros((4, 30)), 4)
