"""A training step on a GPU only enqueues. Without one, tensors on "meta", which have no contents, stand for its."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.tiny import SIZES
from vamoh import geometry as geometry_module
from vamoh import points as points_module
from vamoh._checks import skip_value_checks, values_readable
from vamoh.config import Config, ContextConfig, DataConfig, ModelConfig, TrainConfig
from vamoh.data import Dataset
from vamoh.data.dataset import grid_dataset
from vamoh.ops import knn, neighbor_mean
from vamoh.points import PointSet
from vamoh.train import NonFiniteLoss, Trainer

aten = torch.ops.aten
COPIES = {aten._to_copy.default: 0, aten.copy_.default: 1}

CONFIG = Config(
    data=DataConfig(name="arrays"),
    model=ModelConfig(
        **{**SIZES, "pool_centroids": (8,), "pool_neighbors": (4,), "inr_widths": (5, 5), "kl_samples": 3}
    ),
    train=TrainConfig(steps=5, batch_size=6, lr=5e-3, point_dropout=0.0, flow_warmup=0, gating_warmup=0),
)


class Waits(AssertionError):
    """The host would wait for the GPU."""


class Pretend(TorchDispatchMode):
    """Lets "meta" stand for a GPU: what would wait for it raises, and ops run their plain torch there, seen as well.

    Torch itself refuses contents of "meta": item, nonzero, equal, copies to the host. The rest is refused here.
    """

    uploading = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(isinstance(t, Tensor) and t.is_meta for t in tree_leaves((args, kwargs)))
        if there and func.namespace == "vamoh":
            with self:
                return func._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args, **kwargs)
        source = args[COPIES[func]] if func in COPIES else None
        thither = there or torch.device(kwargs.get("device") or "cpu").type == "meta"
        if source is not None and thither and not source.is_meta and not self.uploading:
            raise Waits(f"{func} from pageable memory")
        masks = [t for t in tree_leaves(args[1:2]) if isinstance(t, Tensor) and t.dtype == torch.bool]
        if there and masks and func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            raise Waits(f"{func} by a mask")
        try:
            return func(*args, **kwargs)
        except (RuntimeError, NotImplementedError) as error:
            if there:
                raise Waits(f"{func}: {error}") from error
            raise


class Written(TorchFunctionMode):
    """Refuses tensors that are written out in Python, which are copied from pageable memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type == "meta":
            raise Waits(f"{func} with a device")
        return func(*args, **kwargs)


@contextmanager
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pretend]:
    mode = Pretend()
    upload = points_module.upload

    def unblocked(value: Tensor, device: torch.device) -> Tensor:
        mode.uploading = True
        try:
            return upload(value, device)
        finally:
            mode.uploading = False

    for name in ("points", "geometry", "model"):
        monkeypatch.setattr(f"vamoh.{name}.upload", unblocked)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *a, **k: None)
    with Written(), mode:
        yield mode


def dataset(mask: str = "none") -> Dataset:
    generator = np.random.default_rng(0)
    data = grid_dataset("arrays", generator.integers(0, 256, (30, 6, 7, 1), dtype=np.uint8))
    observed = torch.from_numpy(generator.random((30, 42))) < 0.9
    return replace(data, mask={"none": None, "shared": observed[0], "each": observed}[mask])


def placed(config: Config, data: Dataset) -> Trainer:
    """A trainer as it is on a GPU, on "meta"."""
    trainer = Trainer(config, data, device="meta")
    trainer.optimizer = torch.optim.Adam(trainer.parameters, lr=1e-3, fused=True)
    trainer._asynchronous = True
    return trainer


def _configs() -> Iterator[Any]:
    for mask in ("none", "shared", "each"):
        for train in ({}, {"point_dropout": 0.5}, {"num_points": 20}):
            yield pytest.param(mask, {}, train, id=f"{mask}-{'-'.join(train)}")
    models = [
        {"neighbor_metric": "raw"},
        {"frequencies": 0},
        {"learn_frequencies": True},
        {"prior": "normal", "likelihood": "bernoulli"},
        {"kl": "cross_entropy", "weight_net_slope": 0.1, "gating_bound": "tanh"},
        {"likelihood": "continuous_bernoulli", "inr_activation": "sine", "learn_scale": False},
    ]
    for model in models:
        yield pytest.param("none", model, {}, id="-".join(map(str, model.values())), marks=pytest.mark.slow)
    yield pytest.param("each", {"learn_frequencies": True}, {"num_points": 20}, id="each-learned-20")
    yield pytest.param("none", {}, {"flow_warmup": 9.0, "gating_warmup": 9.0}, id="warm-up")
    for centroids in ("ordered", "fixed"):
        hidden = {"context": ContextConfig(random=0.5, box=0.2), "target": "all"}
        yield pytest.param("none", {"centroids": centroids}, hidden, id=f"context-{centroids}")


@pytest.mark.slow
@pytest.mark.parametrize(("mask", "model", "train"), list(_configs()))
def test_no_step_waits(
    mask: str, model: dict[str, Any], train: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, **model), train=replace(CONFIG.train, **train))
    trainer = placed(config, dataset(mask))
    with pretend(monkeypatch):
        lines = [trainer.step() for _ in range(3)]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert len(trainer._pending) == 3
    with pytest.raises(RuntimeError, match="meta"):
        lines[0]["elbo"]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.item(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x.masked_select(x > 0),
        lambda x: x.unique(),
        lambda x: torch.equal(x, x + 1),
        lambda x: torch.zeros(3).copy_(x),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: knn(x[:, None], x[:1, None], 1, x > 0),
    ],
)
def test_every_wait_is_noticed(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(3, device="meta")
    with pretend(monkeypatch), pytest.raises((Waits, RuntimeError, NotImplementedError)):
        read(x)


@pytest.mark.parametrize("train", [{}, {"point_dropout": 0.5}, {"num_points": 20}], ids=str)
@pytest.mark.parametrize("mask", ["none", "shared", "each"])
def test_it_computes_the_same(mask: str, train: dict[str, Any]) -> None:
    """On the CPU, where both ways run, against the one that looks; the clipped gradient is rounded in another place."""
    config = replace(CONFIG, train=replace(CONFIG.train, clip=30.0, **train))
    looking, unseeing = Trainer(config, dataset(mask)), Trainer(config, dataset(mask))
    unseeing._asynchronous = True
    clipped = 0
    for _ in range(6):
        expected, line = looking.step(), unseeing.step()
        assert dict(line) == pytest.approx(expected, rel=1e-4)
        assert len(line) == len(expected) and set(line) == set(expected)
        clipped += expected["grad_norm"] > 30
    assert clipped > 0
    for a, b in zip(looking.parameters, unseeing.parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not unseeing._pending


def state(trainer: Trainer) -> list[Tensor]:
    """Copies of the parameters and of what Adam remembers."""
    moments = [t for entry in trainer.optimizer.state.values() for t in entry.values()]
    return [t.detach().clone() for t in (*trainer.parameters, *moments)]


@pytest.mark.parametrize("term", ["gradient", "elbo", "kl_z"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_update_is_left_out_and_told_later(term: str, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(CONFIG, dataset())
    trainer._asynchronous = True
    trainer.step()
    before = state(trainer)
    with monkeypatch.context() as patch:
        if term == "gradient":
            hook = trainer.parameters[0].register_hook(lambda grad: grad * value)
        else:
            original = trainer.model.elbo

            def elbo(*args: Any, **kwargs: Any) -> Any:
                terms = original(*args, **kwargs)
                bad = torch.tensor([0.0, value, 0.0, 0.0, 0.0, 0.0])  # the gradient stays finite
                return replace(terms, **{term: getattr(terms, term) + bad})

            patch.setattr(trainer.model, "elbo", elbo)
        batch = trainer._batch_indices().tolist()
        trainer.step()
        if term == "gradient":
            hook.remove()
    assert all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))
    later = trainer.step()
    assert not all(torch.equal(a, b) for a, b in zip(before, state(trainer), strict=True))
    assert all(t.isfinite().all() for t in state(trainer))
    with pytest.raises(NonFiniteLoss) as caught:
        later["elbo"]
    name = "grad_norm" if term == "gradient" else term
    assert (caught.value.term, caught.value.step, caught.value.indices) == (name, 2, batch)
    assert caught.value.culprits == (batch if term == "gradient" else [batch[1]])
    assert math.isfinite(later["elbo"])


def test_nothing_is_saved_or_measured_before_all_is_looked_at(tmp_path: Path) -> None:
    for look in (lambda t: t.save(tmp_path), lambda t: t.evaluate(), lambda t: t.check()):
        trainer = Trainer(CONFIG, dataset())
        trainer._asynchronous = True
        trainer.parameters[0].register_hook(lambda grad: grad * math.nan)
        trainer.step()
        with pytest.raises(NonFiniteLoss, match="in step 1"):
            look(trainer)
    assert not list(tmp_path.iterdir())


def test_lines_that_nobody_reads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["vamoh.trainer"], "_MAX_PENDING", 3)
    trainer = Trainer(CONFIG, dataset())
    trainer._asynchronous = True
    unread = []
    for _ in range(6):
        trainer.step()
        unread.append(len(trainer._pending))
    assert unread == [1, 2, 3, 0, 1, 2]


def test_trust_ends_where_it_should() -> None:
    x, neighbors = torch.randn(1, 4, 2), torch.tensor([[[9]]])
    assert values_readable(x)
    with skip_value_checks():
        with skip_value_checks():
            assert not values_readable(x)
        assert not values_readable(x)
    assert values_readable(x)
    with pytest.raises(ValueError, match="neighbors must index the 4 points, got 9"):
        neighbor_mean(x, neighbors)


def test_what_is_read_of_points_is_known_of_their_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    coords, values = torch.rand(5, 2), torch.rand(3, 5, 1)
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, 1, 0, 1, 1]]).bool()
    points = PointSet(coords, values, mask).compact()
    assert (points.count, points.observed()) == (4, (2, 4))
    assert points.value_range() == (0.0, float(values[:, [0, 1, 3, 4]][mask[:, [0, 1, 3, 4]]].max()))
    model = Trainer(CONFIG, dataset(), device="meta").model
    with pretend(monkeypatch):
        there = model.prepare(points)
        assert model._compact(there) is there
        model._check_values(there)
        with pytest.raises(ValueError, match="at least 6 observed points per function .*, got 2"):
            model.neighborhoods(there)
        there.values.add_(1)
        with pytest.raises(Waits):
            model._check_values(there)
        there.mask.logical_not_()
        with pytest.raises(Waits):
            model._compact(there)
    assert points.with_mask(None).compact().mask is None
    assert PointSet(coords[:0], values[:, :0]).value_range() == (0.0, 0.0)


class Stream:
    """Writes down who waits for whom."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("mask", ["none", "shared", "each"])
@pytest.mark.parametrize("lattice", [True, False])
def test_the_search_lies_beside_the_step_before(
    lattice: bool, mask: str, learned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its results are kept from being freed while the main stream reads them, and it waits for nothing it can help."""
    config = replace(CONFIG, model=replace(CONFIG.model, learn_frequencies=learned))
    data = dataset(mask)
    if not lattice:
        data = replace(data, coords=torch.rand(data.coords.shape, generator=torch.Generator().manual_seed(0)))
    trainer, log = placed(config, data), []
    main, beside = Stream("main", log), Stream("beside", log)
    recorded: list[Tensor] = []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        log.append(f"on {stream.name}")
        yield
        log.append("on main")

    trainer._side_stream = beside  # type: ignore[assignment]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: main)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: recorded.append(self))
    search = geometry_module.find_neighbors
    monkeypatch.setattr(geometry_module, "find_neighbors", lambda *a: (log.append("search"), search(*a))[1])
    with pretend(monkeypatch):
        for again in (False, True):
            del log[:], recorded[:]
            points, _ = trainer._place(trainer._drop_points(trainer.dataset.batch(trainer._batch_indices())))
            place = trainer.model.geometry(points)
            known = again and mask != "each"  # the same points of a grid
            search_here = [] if known else ["search"]
            before = ["beside waits for main"] if learned else []
            assert log == [*before, "on beside", *search_here, "on main", "main waits for beside"]
            hoods = [index for hood in place.neighborhoods for index in hood]
            used = [
                points.coords,
                points.values,
                points.mask,
                place.mirror,
                None if learned else place.features,
                *hoods,
            ]
            assert {id(t) for t in recorded} == {id(t) for t in used if t is not None}
            trainer.steps_done += 1
