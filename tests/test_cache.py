from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from vamoh._cache import ContentCache


class Counter:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> int:
        self.calls += 1
        return self.calls


def a(*values: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def test_content_counts_not_identity():
    cache, compute = ContentCache[int](), Counter()
    key = a(1, 2)
    assert cache.get([key, None], compute) == 1
    assert cache.get([a(1, 2), None], compute) == 1
    key[0] = 5
    assert cache.get([key, None], compute) == 2
    assert cache.get([a(1, 2), None], compute) == 1
    assert compute.calls == 2


@pytest.mark.parametrize(
    "other",
    [
        [a(1, 2)],
        [a(1, 2), a(0)],
        [None, None],
        [a(1, 2, dtype=torch.float64), None],
        [a(1, 2)[None], None],
        [a(1, 3), None],
        [a(1, 2).to("meta"), None],
    ],
)
def test_anything_else_is_another_key(other):
    cache, compute = ContentCache[int](), Counter()
    cache.get([a(1, 2), None], compute)
    assert cache.get(other, compute) == 2


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_least_recently_used_goes_first(size):
    cache, compute = ContentCache[int](size), Counter()
    for i in range(size):
        cache.get([a(i)], compute)
    cache.get([a(0)], compute)  # now the most recent
    cache.get([a(99)], compute)
    calls = compute.calls
    if size > 1:
        assert cache.get([a(0)], compute) == 1
    assert cache.get([a(99)], compute) == calls
    assert compute.calls == calls
    cache.get([a(min(1, size - 1))], compute)
    assert compute.calls == calls + 1


def test_a_copy_starts_empty():
    cache, compute = ContentCache[int](), Counter()
    cache.get([a(1)], compute)
    assert copy.deepcopy(cache).get([a(1)], compute) == 2


def test_results_of_inference_mode_can_be_trained_with():
    cache, weight = ContentCache[Tensor](), torch.ones(2, requires_grad=True)
    with torch.inference_mode():
        cache.get([a(1, 2)], lambda: 2 * a(1, 2))
    (weight * cache.get([a(1, 2)], lambda: 2 * a(1, 2))).sum().backward()
    assert weight.grad.tolist() == [2, 4]


def test_elsewhere_the_same_tensor_counts_until_it_is_written_to():
    """To compare contents would wait for a GPU; "meta" has none to compare."""
    cache, compute = ContentCache[int](), Counter()
    key = torch.empty(2, device="meta")
    assert [cache.get([key, a(1)], compute) for _ in range(2)] == [1, 1]
    assert cache.get([key, a(2)], compute) == 2
    assert cache.get([key.clone(), a(1)], compute) == 3
    assert cache.get([key, a(1)], compute) == 1
    key.mul_(2)
    assert cache.get([key, a(1)], compute) == 4
    with torch.inference_mode():  # no versions there
        fresh = torch.empty(2, device="meta")
        assert [cache.get([fresh], compute) for _ in range(2)] == [5, 6]


def test_what_is_put_is_found():
    cache, compute = ContentCache[int](), Counter()
    cache.put([a(1)], 7)
    assert cache.get([a(1)], compute) == 7 and compute.calls == 0
