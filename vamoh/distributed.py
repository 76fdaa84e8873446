"""Several processes that train one model: who computes what, and what they exchange.

Each process of a job that `torchrun` started holds the same random streams and draws for the whole batch, then computes
its own functions of it. So a step is that of one process, up to rounding, whatever their number. Gradients are averaged
by DistributedDataParallel, or by FSDP2, which also shards the parameters.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """The processes of a job: this is number `rank` of `count`. A single one communicates with none.

    Everything but `main`, `share` and `weight` is a collective call.
    """

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def share(self, functions: int) -> slice:
        """This process's part of a batch, as even as can be; all of a batch too small to be shared."""
        if functions < self.count:
            return slice(0, functions)
        return slice(self.rank * functions // self.count, (self.rank + 1) * functions // self.count)

    def weight(self, functions: int) -> float:
        """What a mean over this process's part counts in a mean over the processes; exactly 1 where parts are even."""
        part = self.share(functions)
        return 1.0 if functions < self.count else (part.stop - part.start) * self.count / functions

    def gather(self, values: Mapping[str, Tensor], functions: int) -> dict[str, Tensor]:
        """Values [functions] of the whole batch from those of every process's part; without gradients."""
        local = {name: value.detach() for name, value in values.items()}
        if self.count == 1 or functions < self.count:
            return local
        rows = torch.stack(list(local.values()))
        most = -(-functions // self.count)
        sent = rows.new_zeros(len(rows), most)
        sent[:, : rows.shape[1]] = rows
        received = [torch.empty_like(sent) for _ in range(self.count)]
        dist.all_gather(received, sent)
        sizes = [
            part.stop - part.start for part in (Workers(r, self.count).share(functions) for r in range(self.count))
        ]
        full = torch.cat([part[:, :size] for part, size in zip(received, sizes, strict=True)], 1)
        return dict(zip(local, full.unbind(), strict=True))

    def largest(self, number: int) -> int:
        """The largest of one number per process."""
        if self.count == 1:
            return number
        value = torch.tensor(number)  # on the CPU: no synchronisation with a GPU
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return int(value)

    def from_main(self, text: str) -> str:
        """The text of the main process."""
        if self.count == 1:
            return text
        content = torch.frombuffer(bytearray(text.encode() or b"\0"), dtype=torch.uint8)
        size = self.largest(len(text.encode()) if self.main else 0)
        if not self.main:
            content = torch.empty(max(size, 1), dtype=torch.uint8)
        dist.broadcast(content, 0)
        return bytes(content[:size].tolist()).decode()

    def by_main(self, job: Callable[[], T]) -> T | None:
        """Let the main process do it, others wait; an error there ends all: the others get RuntimeError."""
        result, error = None, None
        if self.main:
            try:
                result = job()
            except Exception as caught:
                error = caught
        reason = self.from_main(f"{type(error).__name__}: {error}" if error else "")
        if error is not None:
            raise error
        if reason:
            raise RuntimeError(f"train: the main process failed: {reason}")
        return result


ALONE = Workers()


class Calls(nn.Module):
    """Runs methods of a model by name: DDP and FSDP see only what goes through `forward`.

    A dataclass of tensors comes as a dictionary, in which they find the tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call the method."""
        result = getattr(self.model, method)(*args, **kwargs)
        return dict(vars(result)) if is_dataclass(result) else result


_left: list[Any] = []
"""Process groups that are no longer used, kept alive. Freeing one joins its threads while holding the GIL, and one of
them may need the GIL to release the tensor it sent last: a deadlock.
"""


@contextmanager
def init_process_group(where: str, device: torch.device) -> Iterator[tuple[Workers, torch.device]]:
    """Join the process group of the job that `torchrun` started, one worker where there is none; leave it at the end.

    Yields the workers and this process's own device: with several, "cuda" is the GPU of its LOCAL_RANK.
    Raises ValueError for a device that several processes cannot share.
    """
    count = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if count == 1:
        yield Workers(), device
        return
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and device.index is not None):
        raise ValueError(f"{where}: device must be cpu or cuda for {count} processes, got {str(device)!r}")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    yield Workers(dist.get_rank(), dist.get_world_size()), device
    # Only after success: where a process is missing, leaving would wait for it.
    if started:
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


def wrap(
    model: nn.Module, largest: nn.Module, workers: Workers, device: torch.device, *, phases: bool, shard: bool
) -> nn.Module:
    """The model's methods, called by name, with gradients that are means over the processes.

    phases: whether some steps use only some of the parameters, the same ones in every process.
    shard: every process keeps a shard of the parameters and of their optimizer state, and gathers the others while it
    needs them (FSDP2); those of `largest`, a part of the model, only while that part runs.
    """
    calls = Calls(model)
    if workers.count == 1:
        return calls
    if not shard:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the option gets another name
            return nn.parallel.DistributedDataParallel(
                calls, broadcast_buffers=False, find_unused_parameters=phases, gradient_as_bucket_view=True
            )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard

    def even(parameter: nn.Parameter) -> Shard:
        """Along the first dimension that divides evenly; uneven parts are allowed along dimension 0 only."""
        return Shard(next((d for d, size in enumerate(parameter.shape) if size % workers.count == 0), 0))

    # θ is a view, which nothing changes in place.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(device.type, (workers.count,))
    _left.append(mesh)
    for part in (largest, calls):
        fully_shard(part, mesh=mesh, shard_placement_fn=even)
    return calls


def to_local(tensor: Tensor) -> Tensor:
    """This process's shard of a DTensor; any other tensor as it is."""
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def full_tensor(tree: Any, device: str | None = None) -> Any:
    """Nested dictionaries and lists with every DTensor gathered; a collective call.

    device: where the gathered ones go; None leaves them.
    """
    if isinstance(tree, Mapping):
        return {key: full_tensor(value, device) for key, value in tree.items()}
    if isinstance(tree, list):
        return [full_tensor(value, device) for value in tree]
    return tree.full_tensor().to(device) if _is_sharded(tree) else tree


def shard(state: Mapping[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """A full optimizer state, sharded as the parameters are: the inverse of `full_tensor`."""

    def part(value: Any, parameter: Tensor) -> Any:
        if not _is_sharded(parameter) or not isinstance(value, Tensor) or value.shape != parameter.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
        return distribute_tensor(value.to(parameter.device), mesh, placements, src_data_rank=None)

    parts = {i: {k: part(v, parameters[i]) for k, v in entry.items()} for i, entry in state["state"].items()}
    return {**state, "state": parts}


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the job can no longer be reached."""
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def _is_sharded(value: Any) -> bool:
    return hasattr(value, "full_tensor")
