"""The model and its training on a GPU: nothing waits, graphs, streams, the same numbers as on the CPU."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vamoh import VaMoH, grid_coords
from vamoh.config import Config, DataConfig, ModelConfig, TrainConfig
from vamoh.data import Dataset
from vamoh.data.dataset import grid_dataset
from vamoh.model import Noise
from vamoh.ops import CounterNoise
from vamoh.points import PointSet
from vamoh.train import NonFiniteLoss, Trainer

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    latent_dim=8,
    components=3,
    frequencies=16,
    encoder_centroids=(40, 12),
    encoder_neighbors=(9, 8),
    encoder_channels=(16, 16),
    pool_centroids=(20,),
    pool_neighbors=(6,),
    weight_net=(16,),
    flow_layers=4,
    hypernet_widths=(16,),
    inr_widths=(16, 16),
    gating_widths=(16,),
    kl_samples=16,
)
CONFIG = Config(
    data=DataConfig(name="arrays"),
    model=MODEL,
    train=TrainConfig(steps=5, batch_size=6, lr=1e-3, point_dropout=0.0, flow_warmup=0, gating_warmup=0),
)
THINNED = [{}, {"point_dropout": 0.5}, {"num_points": 100}]


def dataset(mask: str = "none") -> Dataset:
    generator = np.random.default_rng(0)
    data = grid_dataset("arrays", generator.integers(0, 256, (30, 12, 14, 3), dtype=np.uint8))
    observed = torch.from_numpy(generator.random((30, 168)) < 0.9)
    return replace(data, mask={"none": None, "shared": observed[0], "each": observed}[mask])


def with_train(**values: Any) -> Config:
    return replace(CONFIG, train=replace(CONFIG.train, **values))


@contextmanager
def never_waiting() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("train", THINNED, ids=str)
@pytest.mark.parametrize("mask", ["none", "shared", "each"])
def test_no_step_waits(mask: str, train: dict[str, Any]) -> None:
    trainer = Trainer(with_train(**train), dataset(mask), device="cuda")
    for _ in range(3):  # kernels are compiled, tables and pairs of opposite points made
        trainer.step()
    with never_waiting():
        lines = [trainer.step() for _ in range(3)]
    assert all(math.isfinite(value) for line in lines for value in line.values())


@pytest.mark.parametrize("train", THINNED, ids=str)
@pytest.mark.parametrize("mask", ["none", "shared", "each"])
def test_training_is_that_of_the_cpu(mask: str, train: dict[str, Any]) -> None:
    here, there = (Trainer(with_train(**train), dataset(mask), device=place) for place in ("cpu", "cuda"))
    start = flat(here)
    for _ in range(3):
        assert dict(there.step()) == pytest.approx(here.step(), rel=1e-3)
    # Adam makes a whole step of a gradient that is all rounding, so a few parameters may go the other way
    assert float((flat(there) - flat(here)).norm()) < 0.05 * float((flat(here) - start).norm())


def flat(trainer: Trainer) -> Tensor:
    """All parameters in one row."""
    return torch.cat([p.detach().cpu().flatten() for p in trainer.parameters])


def test_a_bad_update_is_left_out_and_told_later() -> None:
    trainer = Trainer(CONFIG, dataset(), device="cuda")
    trainer.step()
    before = [p.detach().clone() for p in trainer.parameters]
    hook = trainer.parameters[0].register_hook(lambda grad: grad * math.nan)
    trainer.step()
    hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.parameters, strict=True))
    trainer.step()
    with pytest.raises(NonFiniteLoss, match="grad_norm became NaN or infinite in step 2"):
        trainer.check()
    assert all(bool(p.isfinite().all()) for p in trainer.parameters)


def test_the_same_bits_twice() -> None:
    runs = []
    for _ in range(2):
        trainer = Trainer(with_train(point_dropout=0.5), dataset(), device="cuda")
        lines = [dict(trainer.step()) for _ in range(4)]
        runs.append((lines, [p.detach().clone() for p in trainer.parameters]))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][1], runs[1][1], strict=True))


def test_neighbors_are_searched_beside_the_step_before() -> None:
    trainer = Trainer(with_train(num_points=100), dataset(), device="cuda")
    for _ in range(2):
        trainer.step()
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # the step before
    trainer._place(trainer._drop_points(trainer.dataset.batch(trainer._batch_indices())))
    searched = torch.cuda.Event()
    searched.record(trainer._side_stream)
    searched.synchronize()
    assert not torch.cuda.current_stream().query(), "the search waited for the step before"
    torch.cuda.synchronize()


def prepared(model: VaMoH, masked: bool) -> tuple[PointSet, Noise]:
    generator = torch.Generator().manual_seed(1)
    coords, values = grid_coords((12, 14)), torch.rand(4, 168, 3, generator=generator)
    mask = torch.rand(4, 168, generator=generator) < 0.9 if masked else None
    points = model.prepare(PointSet(coords, values, mask).compact())
    noise = torch.randn(4, 8, generator=generator).cuda()
    return points, Noise(noise, CounterNoise(torch.tensor(5).cuda(), 16))


def gradients(model: VaMoH) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("masked", [False, True])
def test_the_bound_in_a_cuda_graph(masked: bool) -> None:
    model = VaMoH(coord_dim=2, channels=3, **vars(MODEL)).cuda()
    points, noise = prepared(model, masked)
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            model.zero_grad()
            model.elbo(points, noise=noise).loss.backward()
    torch.cuda.current_stream().wait_stream(beside)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        terms = model.elbo(points, noise=noise)
        terms.loss.backward()
    for seed in (1, 2):  # other data in the same memory
        generator = torch.Generator("cuda").manual_seed(seed)
        points.values.copy_(torch.rand(points.values.shape, device="cuda", generator=generator))
        noise.z.normal_(generator=generator)
        graph.replay()
        replayed, found = terms.elbo.clone(), gradients(model)
        eager = copy.deepcopy(model)
        eager.zero_grad()
        expected = eager.elbo(points, noise=noise)
        expected.loss.backward()
        torch.testing.assert_close(replayed, expected.elbo, rtol=1e-5, atol=1e-3)
        for a, b in zip(found, gradients(eager), strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert float((a - b).norm()) <= 1e-4 * float(b.norm()) + 1e-6


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_device_computes_the_same() -> None:
    bounds = []
    for place in ("cuda:0", "cuda:1"):
        trainer = Trainer(with_train(num_points=100), dataset(), device=place)
        bounds.append([dict(trainer.step()) for _ in range(3)])
        assert torch.cuda.current_device() == 0
    assert bounds[0] == bounds[1]


def test_a_reconstruction_is_that_of_the_cpu() -> None:
    model = VaMoH(coord_dim=2, channels=3, **vars(MODEL))
    points, finer = dataset("each").batch(torch.arange(3)), grid_coords((12, 14), scale=2)
    expected = model.reconstruct(points), model.reconstruct(points, finer)
    model.cuda()
    there = points.to("cuda")
    for a, b in zip((model.reconstruct(there), model.reconstruct(there, finer.cuda())), expected, strict=True):
        torch.testing.assert_close(a.mean.cpu(), b.mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(a.pi.cpu(), b.pi, rtol=1e-4, atol=1e-4)
