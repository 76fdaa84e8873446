"""Initial values: torch's own, from a generator of the model's own, whatever other threads do."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn

from vamoh._initial import linear_layer
from vamoh.model import VaMoH

SIZES: dict[str, Any] = {
    "coord_dim": 2,
    "channels": 1,
    "latent_dim": 4,
    "frequencies": 8,
    "encoder_centroids": (6, 3),
    "encoder_neighbors": (4, 3),
    "encoder_channels": (4, 4),
    "hypernet_widths": (16,),
    "inr_widths": (8,),
    "gating_widths": (8,),
}


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_torchs_own(bias: bool) -> None:
    torch.manual_seed(5)
    wanted = nn.Linear(7, 3, bias=bias)
    found = linear_layer(7, 3, torch.Generator().manual_seed(5), bias=bias)
    assert found.weight.requires_grad and torch.equal(found.weight, wanted.weight)
    assert (found.bias is None) == (not bias)
    assert found.bias is None or torch.equal(found.bias, wanted.bias)


@pytest.mark.parametrize("initialization", ["stable", "published"])
def test_the_global_generator_is_neither_read_nor_changed(initialization: str) -> None:
    torch.manual_seed(1)
    first = VaMoH(**SIZES, initialization=initialization, seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = VaMoH(**SIZES, initialization=initialization, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    other = VaMoH(**SIZES, initialization=initialization, seed=4)
    left, right = first.state_dict(), second.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert not torch.equal(first.hypernet.weights[0], other.hypernet.weights[0])


def test_models_built_by_threads_are_those_built_alone() -> None:
    """Many at once, while somebody draws from the global generator."""
    wanted = [VaMoH(**SIZES, seed=seed).state_dict() for seed in range(4)]
    found: list[tuple[int, dict[str, torch.Tensor]]] = []
    ended = threading.Event()

    def build(seed: int) -> None:
        for _ in range(10):
            found.append((seed, VaMoH(**SIZES, seed=seed).state_dict()))

    drawn: list[torch.Tensor] = []

    def draw() -> None:
        while not ended.is_set():
            drawn.append(torch.rand(()))

    torch.manual_seed(9)
    drawer = threading.Thread(target=draw)
    builders = [threading.Thread(target=build, args=(seed,)) for seed in range(4)]
    for thread in (drawer, *builders):
        thread.start()
    for thread in builders:
        thread.join()
    ended.set()
    drawer.join()
    torch.manual_seed(9)
    assert all(torch.equal(value, torch.rand(())) for value in drawn)
    assert len(found) == 40
    for seed, state in found:
        assert all(torch.equal(state[name], wanted[seed][name]) for name in state)


@pytest.mark.parametrize(
    "sizes",
    [{"latent_dim": 10**9}, {"hypernet_widths": (10**6, 10**6)}, {"flow_layers": 10**12}, {"components": 2**62}],
)
def test_what_no_memory_holds_is_refused(sizes: dict[str, Any]) -> None:
    """Before anything is allocated, with the bytes that it would take."""
    with pytest.raises(ValueError, match=r"VaMoH: the parameters would take (\d+|more than 2\^63) bytes"):
        VaMoH(**{**SIZES, **sizes})


def test_the_number_of_bytes_is_that_of_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    model = VaMoH(**SIZES)
    named = {name: value for name, value in model.state_dict().items() if not name.startswith("likelihood.")}
    size = sum(value.numel() * value.element_size() for value in named.values())
    monkeypatch.setattr("vamoh._checks.memory", lambda: size)
    VaMoH(**SIZES)
    monkeypatch.setattr("vamoh._checks.memory", lambda: size - 1)
    with pytest.raises(ValueError, match=f"would take {size} bytes .* this machine has {size - 1} bytes"):
        VaMoH(**SIZES)
