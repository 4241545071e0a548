"""Several processes that train one model: the one place that knows torch.distributed.

Every process holds every step's order and takes its slice of the images. The rest is PyTorch's:
DistributedDataParallel (DDP) or fully_shard (FSDP2), over gloo on CPUs and NCCL on GPUs.
"""

import copy
import inspect
import os
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastmim.methods import Method
from fastmim.nn.layers import Block


class PeerError(RuntimeError):
    """Another process failed; the message names it and says why."""


def launched() -> bool:
    """Whether torchrun, or a launcher that sets its variables, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """Of this process among all that train; 0 writes, prints and evaluates."""
    if dist.is_initialized():
        return dist.get_rank()
    return int(os.environ["RANK"]) if launched() else 0


@contextmanager
def process_group() -> Iterator[None]:
    """Join the processes that torchrun has started, and leave them at the end.

    Does nothing in a process of its own, or where a group exists.
    """
    if dist.is_initialized() or not launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def together(group: dist.ProcessGroup | None = None) -> Iterator[None]:
    """Let all processes fail if one does in the block, which must not wait for another.

    Those that fail raise their own error, with the attribute ``told`` where rank 0 tells it.

    Args:
        group: Default: all processes.

    Raises:
        PeerError: In the others.
    """
    if not dist.is_initialized():
        yield
        return
    failure = None
    try:
        yield
    except Exception as error:  # whatever it is, the others would wait for this process
        failure = error
    told = None if failure is None else f"{type(failure).__name__}: {failure}"
    everyone = _gather(told, group)
    if failure is not None:
        failure.told = True
        raise failure
    for number, text in enumerate(everyone):
        if text is not None:
            raise PeerError(f"rank {number}: {text}")


def _gather(value: Any, group: dist.ProcessGroup | None) -> list:
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Wrapped(NamedTuple):
    """A method whose gradients are averaged over the processes.

    Attributes:
        forward: To be called as the method.
        teach: As :meth:`fastmim.methods.Method.teach`.
    """

    forward: nn.Module
    teach: Callable[[Tensor, Any], Tensor | None]


class World:
    """The processes that train together: those of the process group if there is one.

    Args:
        timeout_minutes: That a process waits for the others before it gives up. All of the group
            must then construct one. None: this process alone.

    Attributes:
        rank, size: Of this process; how many there are.
        leads: Whether this is rank 0, which alone writes.
        parallel: How the model is spread: none, ddp or fsdp2.
    """

    def __init__(self, timeout_minutes: float | None = None) -> None:
        self.rank, self.size, self.parallel = 0, 1, "none"
        self._plain: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()
        self._group = self._control = None
        if timeout_minutes is not None and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            timeout = timedelta(minutes=timeout_minutes)
            self._group = dist.new_group(timeout=timeout)
            self._control = dist.new_group(backend="gloo", timeout=timeout)  # never stops a GPU
        self.leads = self.rank == 0

    def choose(self, parallel: str) -> None:
        """Take ``efficiency.parallel``: auto, ddp, fsdp2 or none.

        Raises:
            ValueError: If it does not go with the number of processes.
        """
        started = os.environ.get("WORLD_SIZE", "1")
        if self._group is None and started != "1":
            raise ValueError(
                f"started as one of several processes (WORLD_SIZE is {started}) that have not "
                "joined; start it with torchrun, and in a script of your own wrap the training in "
                "fastmim.train.distributed.process_group()"
            )
        if parallel == "none" and self.size > 1:
            raise ValueError(
                f"efficiency.parallel: none trains in one process, but {self.size} were started; "
                "use auto, ddp or fsdp2, or start it without torchrun"
            )
        if parallel in ("ddp", "fsdp2") and self._group is None:
            raise ValueError(
                f"efficiency.parallel: {parallel} needs processes that torchrun starts: "
                "torchrun --nproc-per-node=N -m fastmim pretrain ..."
            )
        alone = "none" if self.size == 1 else "ddp"
        self.parallel = alone if parallel == "auto" else parallel

    def together(self) -> AbstractContextManager:
        """See :func:`together`."""
        return nullcontext() if self._group is None else together(self._control)

    def gather(self, value: Any) -> list:
        """What every process gave, in the order of ranks. Picklable."""
        return [value] if self.size == 1 else _gather(value, self._control)

    def broadcast(self, value: Any) -> Any:
        """What rank 0 gave. Picklable."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def mean(self, values: Tensor) -> Tensor:
        """Over the processes; changed in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group)  # gloo knows no mean
            values /= self.size
        return values

    def norm(self, grads: Sequence[Tensor]) -> Tensor:
        """Global L2 norm, of whole tensors where these are shards."""
        norm = torch.nn.utils.get_total_norm(grads)
        return norm.full_tensor() if self.parallel == "fsdp2" else norm

    def wrap(self, method: Method) -> Wrapped:
        """Spread a method over the processes, with the weights of rank 0 in all."""
        if self.parallel == "none":
            return Wrapped(method, method.teach)
        if self.parallel == "ddp":
            return Wrapped(self._replicate(method), method.teach)
        return self._shard(method)

    def _replicate(self, method: Method) -> nn.Module:
        known = inspect.signature(DistributedDataParallel).parameters
        # Buffers hold constants; the option has this name from torch 2.13 on.
        sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        return DistributedDataParallel(
            method, process_group=self._group, gradient_as_bucket_view=True, **{sync: False}
        )

    def _shard(self, method: Method) -> Wrapped:
        from torch.distributed.device_mesh import DeviceMesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        teacher = [] if method.teacher is None else [method.teacher.module]
        for network in (method.student, *teacher):
            self._plain[network] = _without_weights(network)
            for tensor in network.state_dict().values():
                dist.broadcast(tensor, 0, group=self._group)
        device = next(method.parameters()).device
        mesh = DeviceMesh.from_group(self._group, device.type)
        # Nothing changes the output of a block in place.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .FSDPBlock. returned a view")
        for module in method.modules():
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
        root = fully_shard(_Root(method), mesh=mesh)
        register_fsdp_forward_method(root, "teach")
        return Wrapped(root, root.teach)

    @contextmanager
    def accumulating(self, module: nn.Module, last: bool) -> Iterator[None]:
        """Around forward and backward pass: gradients are averaged in the last one of a step."""
        if self.parallel == "fsdp2":
            module.set_requires_gradient_sync(last)
        if self.parallel == "ddp" and not last:
            with module.no_sync():
                yield
            return
        yield

    def full(self, tensors: Mapping[str, Tensor], everywhere: bool = False) -> dict[str, Tensor]:
        """Whole tensors on the CPU where they are shards; others as they are.

        Args:
            tensors: The same names in every process.
            everywhere: In all processes; else nothing in others than rank 0.
        """
        if self.parallel != "fsdp2":
            return dict(tensors)
        from torch.distributed.tensor import DTensor

        found = {}
        for name, tensor in tensors.items():  # one at a time is whole on the device
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.leads or everywhere:
                found[name] = whole.cpu()
        return found

    def whole(self, network: nn.Module, everywhere: bool = False) -> nn.Module:
        """A sharded network as a plain copy on its device; others as they are.

        Args:
            network: Student or teacher of a method that was wrapped.
            everywhere: In all processes; else others than rank 0 get ``network``.
        """
        plain = self._plain.get(network)
        if plain is None:
            return network
        device = next(network.parameters()).device
        state = self.full(network.state_dict(), everywhere)
        if not state:
            return network
        plain = copy.deepcopy(plain)
        plain.load_state_dict(state, assign=True)
        return plain.to(device).train(network.training)

    @torch.no_grad()
    def load(self, targets: Mapping[str, Tensor], sources: Mapping[str, Tensor] | None) -> None:
        """Copy rank 0's whole tensors into those of all processes, whole or shards.

        Args:
            targets: Name to tensor.
            sources: Likewise, of the same shapes; unused in others than rank 0.
        """
        for name, target in targets.items():
            if self.size == 1:
                whole = sources[name].to(target.device)
            else:
                whole = torch.empty(target.shape, dtype=target.dtype, device=target.device)
                if self.leads:
                    whole.copy_(sources[name])
                dist.broadcast(whole, 0, group=self._group)
            if self.parallel == "fsdp2":
                whole = _placed_like(target, whole)
            target.copy_(whole)


class _Root(nn.Module):
    """Gathers the weights outside blocks for a method's two entries."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def forward(self, *args, **options):
        return self.method(*args, **options)

    def teach(self, *args):
        return self.method.teach(*args)


def _without_weights(network: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory: a sharded module cannot be copied."""
    meta = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
        for p in network.parameters()
    }
    return copy.deepcopy(network, meta)


def _placed_like(target: Tensor, whole: Tensor) -> Tensor:
    """The same in every process, as shards."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(target, DTensor):
        return whole
    return distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
