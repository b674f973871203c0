"""The ranks of a training run: who has which rows, what each holds of the model, and what they add up.

Dimensions of the mesh, the last one varying fastest: `replicas` and `data` have different rows, `stages` are
layers one behind the other, `tensor` divides each layer. A run of one rank is a crew too, which says nothing
to anybody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import msgspec
import torch
from llmasos.syscalls.training import Mesh
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from ..torch.ranks import Ranks

_BUCKET = 1 << 24
"""Values of gradients that are summed at once."""

_T = TypeVar("_T")


class Crew:
    """This process among the ranks of `mesh`. `ranks` None: it is alone."""

    def __init__(self, mesh: Mesh, ranks: Ranks | None) -> None:
        self.shape, self.ranks = mesh, ranks
        self.size = 1 if ranks is None else ranks.size
        self.rank = 0 if ranks is None else ranks.rank
        rest, self.tensor = divmod(self.rank, mesh.tensor)
        self.data, self.stage = divmod(rest, mesh.stages)  # of mesh.data * mesh.replicas, of mesh.stages
        self.data_ranks = mesh.data * mesh.replicas
        self.mesh: DeviceMesh | None = None
        self._data: Any = None
        self._ends: Any = None
        if ranks is not None:
            self._connect(ranks)

    def _connect(self, ranks: Ranks) -> None:
        shape = self.shape
        sizes = {
            "replicas": shape.replicas,
            "data": shape.data,
            "stages": shape.stages,
            "tensor": shape.tensor,
        }
        sizes = {name: size for name, size in sizes.items() if size > 1}
        self.mesh = init_device_mesh(ranks.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        apart = shape.stages * shape.tensor  # ranks between those that have the same part of the model
        for first in range(apart):
            members = list(range(first, self.size, apart))
            group = distributed.new_group(members)
            if self.rank in members:
                self._data = group
        for data in range(self.data_ranks if shape.stages > 1 else 0):
            members = [data * apart, data * apart + apart - 1]
            group = distributed.new_group(members)
            if self.rank in members:
                self._ends = group

    @property
    def leads(self) -> bool:
        """Whether this is the rank that tells, and that writes what all have."""
        return self.rank == 0

    @property
    def counts(self) -> bool:
        """Whether what this rank measures of its rows counts: others may have the same."""
        return self.tensor == 0 and self.stage == self.shape.stages - 1

    def agree(self, verb: Callable[[], _T]) -> _T:
        """Runs `verb`, which talks to no other rank, on all; if one raises an error of ours, all do."""
        if self.ranks is None:
            return verb()
        made: list[_T] = []

        def run() -> None:
            made.append(verb())

        self.ranks.agree(run, type(None))
        return made[0]

    def from_leader(self, verb: Callable[[], Any]) -> Any:
        """What `verb` returns on rank 0 (of msgpack's types). Raises there only; the others follow."""
        if self.ranks is None:
            return verb()
        said = self.ranks.tell(msgspec.msgpack.encode(verb()) if self.leads else b"")
        return msgspec.msgpack.decode(said)

    def total(self, *values: float) -> list[float]:
        """Sums over the ranks that count."""
        if self.ranks is None:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64) * self.counts
        distributed.all_reduce(sums)
        return [float(value) for value in sums]

    def sum_gradients(self, parameters: Mapping[str, torch.Tensor], tied: Iterable[str]) -> None:
        """Makes the gradients those of all rows, where nothing else does; `tied` parameters are in the first
        and in the last stage."""
        if self._ends is not None:
            self._sum([parameters[name] for name in tied if name in parameters], self._ends)
        if self._data is not None and self.shape.shard == "ddp" and self.data_ranks > 1:
            self._sum(parameters.values(), self._data)

    def _sum(self, parameters: Iterable[torch.Tensor], group: Any) -> None:
        """In buckets: a few large sums instead of one for each parameter."""
        gradients = [local(gradient_of(parameter)) for parameter in parameters]
        for bucket in _buckets(gradients):
            flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
            distributed.all_reduce(flat, group=group)
            parts = torch.split(flat, [gradient.numel() for gradient in bucket])
            for gradient, part in zip(bucket, parts, strict=True):
                gradient.copy_(part.view_as(gradient))

    def norm(self, parameters: Mapping[str, torch.Tensor], tied: Iterable[str]) -> torch.Tensor:
        """Of all gradients of all ranks, each counted once however many have it."""
        if self.ranks is None:
            return torch.nn.utils.get_total_norm([p.grad for p in parameters.values() if p.grad is not None])
        both = set(tied)
        here = torch.zeros((), dtype=torch.float64)
        for name, parameter in parameters.items():
            copies = self.size // self.shape.stages // _parts(parameter)
            if self.shape.stages > 1 and name in both:
                copies *= 2
            gradient = local(gradient_of(parameter))
            here += torch.linalg.vector_norm(gradient).double().cpu() ** 2 / copies
        distributed.all_reduce(here)
        return here.sqrt()

    def whole(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Everybody's tensors in full, on rank 0's host; the others get nothing."""
        own = {name: full(tensor) for name, tensor in tensors.items()}
        if self.ranks is None:
            return own
        heads = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in own.items()]
        for rank, said in enumerate(self.ranks.gather(msgspec.msgpack.encode(heads))):
            if (
                rank == 0
                or rank % (self.shape.stages * self.shape.tensor) != rank
                or rank % self.shape.tensor
            ):
                continue  # another rank has the same
            for name, shape, dtype in msgspec.msgpack.decode(said):
                if self.rank == rank:
                    distributed.send(own[name], 0)
                elif self.leads:
                    found = torch.empty(shape, dtype=getattr(torch, dtype.removeprefix("torch.")))
                    distributed.recv(found, rank)
                    own.setdefault(name, found)
        return own if self.leads else {}


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor, sharing its memory."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of all of it on the host; asked for on every rank that has a part."""
    whole: torch.Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().cpu().contiguous()


def like(part: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """This rank's `part` of something that is divided as `parameter` is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    """Its gradient, divided as it is; zeros where nothing was learnt."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    if isinstance(parameter, DTensor) and parameter.grad.placements != parameter.placements:  # type: ignore[attr-defined]
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return parameter.grad


def _parts(parameter: torch.Tensor) -> int:
    """How many ranks share it."""
    if not isinstance(parameter, DTensor):
        return 1
    parts = 1
    for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
        parts *= 1 if placement.is_replicate() else size
    return parts


def _buckets(gradients: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        full_ = sum(g.numel() for g in bucket) + gradient.numel() > _BUCKET
        if bucket and (full_ or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
