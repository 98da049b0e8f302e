"""Training on one or several devices: one interface, whether weights are whole on each or sharded.

The loss of an optimizer step is a sum of shares over all micro-batches of all processes; each share is divided by the
step's totals already (its number of answer tokens, say). Gradients are therefore summed over processes, never averaged,
and the result is that of one process, within rounding, however the micro-batches are dealt out.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

BUCKET_BYTES = 25 << 20  # gradients travel in pieces of this size, as in PyTorch's own DDP
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's names for its two running means
State = dict[str, dict[str, "Tensor"]]


class Parallel(Protocol):
    """How several devices share the work; `medforge.config.ParallelConfig` is one."""

    @property
    def strategy(self) -> Literal["ddp", "zero2", "zero3"]:
        """Whole weights in each process, or DeepSpeed ZeRO."""

    @property
    def offload(self) -> Literal["none", "cpu"]:
        """Where ZeRO keeps the optimizer's state."""


@dataclass(frozen=True)
class World:
    """This process among all processes, and the device that it computes on."""

    rank: int
    local_rank: int
    size: int
    device: torch.device


def start() -> World:
    """Join the processes that torchrun started, by RANK, LOCAL_RANK and WORLD_SIZE; without them, be the only one.

    Devices talk over NCCL, processors over gloo. Raises ValueError when there are more processes than devices.
    """
    import torch
    import torch.distributed as dist

    rank, local_rank, size = (int(os.environ.get(name, "0")) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    size = max(size, 1)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"parallel.processes: process {local_rank} of this machine has no GPU of its own, as there are "
                f"{torch.cuda.device_count()}; start at most so many"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, local_rank, size, device)


def stop(world: World) -> None:
    """Wait for all processes and part from them. Call it when all went well: after an error it would wait for ever."""
    import torch.distributed as dist

    if world.size > 1:
        dist.barrier()
        dist.destroy_process_group()


def engine(
    module: nn.Module,
    groups: Sequence[dict[str, Any]],
    parallel: Parallel,
    world: World,
    max_grad_norm: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> Engine:
    """The engine for this number of processes and this strategy. The module is moved to the world's device.

    `groups` are AdamW's parameter groups: {"params", "names", "lr", "weight_decay"}, of trainable parameters only. One
    process shards nothing, so that every strategy is then the plain one. Raises ValueError for settings or parameters
    that do not fit together.
    """
    if world.size == 1:
        if parallel.offload != "none":
            raise ValueError("parallel.offload: takes several processes (parallel.processes); leave it out")
        return Local(module, groups, world, max_grad_norm, betas, eps)
    if parallel.strategy == "ddp":
        return DataParallel(module, groups, world, max_grad_norm, betas, eps)
    from medforge.train.zero import Zero

    return Zero(module, groups, world, max_grad_norm, betas, eps, parallel)


class Engine(ABC):
    """A module with its optimizer (AdamW, arXiv 1711.05101).

    A step is: `engine(…)` and `backward(share)` for each micro-batch of this process, then `step` in every process.
    """

    # ZeRO-3 gathers weights while it computes: all processes must run the same submodules in the same order and equally
    # often, forward and backward, in training and evaluation. One that has nothing to do runs them with a share of 0;
    # `generate` takes synced_gpus=True.
    whole_forward = False

    def __init__(self, module: nn.Module, groups: Sequence[dict[str, Any]], world: World) -> None:
        self.module, self.world = module, world
        self.parameters: dict[str, nn.Parameter] = {}
        for group in groups:
            assert len(group["names"]) == len(group["params"])
            self.parameters.update(zip(group["names"], group["params"], strict=True))
        assert len(self.parameters) == sum(len(group["names"]) for group in groups), "a parameter is named twice"
        assert all(parameter.requires_grad for parameter in self.parameters.values())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns."""
        return self.module(*args, **kwargs)

    @abstractmethod
    def backward(self, share: Tensor) -> None:
        """Add the gradients of one micro-batch's share of the step's loss. Nothing is sent yet."""

    @abstractmethod
    def step(self, learning_rates: Sequence[float]) -> float:
        """Sum the gradients over all processes, clip them to `max_grad_norm`, take a step, and clear them.

        `learning_rates` has one a parameter group. A parameter without a gradient in any process stays as it is.
        Returns the gradients' norm before clipping. When that is not finite, the weights are left as they are.
        """

    @abstractmethod
    def state(self) -> State:
        """Weights and optimizer of the trainable parameters by name: {"weights", "exp_avg", "exp_avg_sq", "step"}.

        All processes must call it. Process 0 gets whole float32 tensors on the CPU, in a format that does not depend on
        strategy or number of processes; the others get {}. A parameter's `step` counts its updates (a scalar).
        """

    @abstractmethod
    def load_state(self, state: State) -> None:
        """Go on from what `state` returned, in whatever strategy and number of processes.

        All processes must call it, each with the whole state. Raises ValueError when it is of other parameters.
        """

    @abstractmethod
    def weights(self) -> dict[str, Tensor]:
        """The trainable parameters by name, whole and on the CPU, in process 0; {} elsewhere. All must call it."""

    def total(self, values: Sequence[float]) -> list[float]:
        """Each value summed over processes (in float64)."""
        import torch
        import torch.distributed as dist

        if self.world.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(list(values), dtype=torch.float64, device=self.world.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def most(self, value: int) -> int:
        """The greatest of all processes' values."""
        return max(self._most([value]))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.most(int(flag)) > 0

    def _most(self, values: Sequence[int]) -> list[int]:
        import torch
        import torch.distributed as dist

        if self.world.size == 1:
            return list(values)
        tensor = torch.tensor(list(values), dtype=torch.int64, device=self.world.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return [int(value) for value in tensor]

    def _with_gradient(self) -> set[str]:
        """Names of the parameters that have a gradient in at least one process."""
        has = self._most([int(parameter.grad is not None) for parameter in self.parameters.values()])
        return {name for name, one in zip(self.parameters, has, strict=True) if one}

    def _check(self, state: State) -> None:
        shapes = {name: whole_shape(parameter) for name, parameter in self.parameters.items()}
        for part in ("weights", *MOMENTS, "step"):
            found = state.get(part, {})
            if found.keys() != shapes.keys():
                differ = sorted(found.keys() ^ shapes.keys())
                raise ValueError(
                    f"the checkpoint's {part} are not of this model's trainable parameters: {len(differ)} names are in "
                    f"one of them only; first: {differ[0]}. Was it made with other stage settings? Start anew"
                )
            for name, tensor in found.items():
                if part != "step" and tuple(tensor.shape) != shapes[name]:
                    raise ValueError(
                        f"the checkpoint's {part} of {name} have the shape {tuple(tensor.shape)}, the model's are "
                        f"{shapes[name]}. Was it made with other stage settings (lora.r)? Start anew"
                    )


class Local(Engine):
    """One process."""

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        world: World,
        max_grad_norm: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(module.to(world.device), groups, world)
        self.max_grad_norm = max_grad_norm
        self.optimizer = adamw(groups, betas, eps)

    def backward(self, share: Tensor) -> None:
        share.backward()

    def step(self, learning_rates: Sequence[float]) -> float:
        import torch

        self._sum_gradients()
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm))
        if math.isfinite(norm):
            for group, rate in zip(self.optimizer.param_groups, learning_rates, strict=True):
                group["lr"] = rate
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def _sum_gradients(self) -> None:
        """There is no other process."""

    def state(self) -> State:
        import torch

        if self.world.rank:
            return {}
        state: State = {part: {} for part in ("weights", *MOMENTS, "step")}
        for name, parameter in self.parameters.items():
            found = self.optimizer.state.get(parameter, {})  # none before the parameter's first gradient
            state["weights"][name] = whole_copy(parameter)
            for part in MOMENTS:
                state[part][name] = whole_copy(found[part]) if found else torch.zeros(parameter.shape)
            state["step"][name] = torch.tensor(float(found["step"]) if found else 0.0)
        return state

    def load_state(self, state: State) -> None:
        self._check(state)
        for name, parameter in self.parameters.items():
            parameter.data.copy_(state["weights"][name])
            moments = {part: state[part][name].to(parameter, copy=True) for part in MOMENTS}
            self.optimizer.state[parameter] = {"step": state["step"][name].clone(), **moments}

    def weights(self) -> dict[str, Tensor]:
        return {} if self.world.rank else {name: whole_copy(p) for name, p in self.parameters.items()}


class DataParallel(Local):
    """Whole weights in each process; gradients are summed once a step.

    Not PyTorch's DistributedDataParallel: that averages, and it reduces while each backward runs, so that all
    processes must have equally many micro-batches and use the same parameters in each. Here a process may have more
    micro-batches than another, or none, and a task may be absent from its samples: what it lacks counts as zeros.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        world: World,
        max_grad_norm: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        import torch.distributed as dist

        super().__init__(module, groups, world, max_grad_norm, betas, eps)
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            dist.broadcast(tensor.data, 0)

    def _sum_gradients(self) -> None:
        import torch
        import torch.distributed as dist

        used = self._with_gradient()
        gradients = []
        for name, parameter in self.parameters.items():
            if name in used:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                gradients.append(parameter.grad)
        for bucket in buckets(gradients, BUCKET_BYTES):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            dist.all_reduce(flat)
            for gradient, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(piece.view_as(gradient))


def adamw(groups: Iterable[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """PyTorch's AdamW over `groups`, without their names."""
    import torch

    bare = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    return torch.optim.AdamW(bare, betas=betas, eps=eps)


def buckets(tensors: Iterable[Tensor], limit: int) -> Iterator[list[Tensor]]:
    """The tensors in lists of one dtype and of at most `limit` bytes each; a bigger tensor is a list of its own."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        bucket: list[Tensor] = []
        filled = 0
        for tensor in same:
            if bucket and filled + tensor.nbytes > limit:
                yield bucket
                bucket, filled = [], 0
            bucket.append(tensor)
            filled += tensor.nbytes
        yield bucket


def whole_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU in float32 that later steps leave alone."""
    import torch

    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """The shape of the whole parameter, also where ZeRO-3 keeps only a shard of it here."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
