"""The engine over DeepSpeed ZeRO (arXiv 1910.02054): optimizer, gradients and, in stage 3, weights are sharded.

Stage 2 shards AdamW's state and the summed gradients, stage 3 all weights too, the frozen ones included. The update is
that of PyTorch's own AdamW, so that the result is that of one process within rounding.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from medforge.train.parallel import MOMENTS, Engine, Parallel, State, World, adamw, whole_copy, whole_shape

if TYPE_CHECKING:
    from torch import Tensor, nn

MOST_IN_A_BUCKET = 500_000_000  # elements; DeepSpeed's default, and it allocates a bucket whole
SMALL = 10_000  # parameters of fewer elements stay whole in ZeRO-3: gathering them would cost more than it saves


class Zero(Engine):
    """ZeRO-2 or ZeRO-3 over several processes.

    Gradients stay in their process until `step` and are then reduced once. DeepSpeed's habit, to reduce while each
    backward runs, takes equally many micro-batches in each process and the same parameters in each of them. The price
    is a whole set of gradients in each process, which is little where adapters are trained.

    The DeepSpeed configuration has no section for bf16 or autocast: trainable parameters are float32, so that they are
    their own master weights and gradients are summed in float32, and frozen ones are what the caller loaded, bfloat16
    for instance. A caller that wants autocast puts it around the call of the engine. For that the module is called
    directly, where its hooks gather the weights of ZeRO-3; DeepSpeed's own forward would switch autocast off.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: Sequence[dict[str, Any]],
        world: World,
        max_grad_norm: float,
        betas: tuple[float, float],
        eps: float,
        parallel: Parallel,
    ) -> None:
        import torch

        deepspeed = _deepspeed(parallel.strategy)
        super().__init__(module, groups, world)
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise ValueError(
                    f"parallel.strategy: {parallel.strategy} trains float32 parameters only, and {name} is "
                    f"{str(parameter.dtype).removeprefix('torch.')}; make it float32, or choose ddp"
                )
        assert all(p.ndim for p in module.parameters()), "DeepSpeed takes no scalars; use a shape of (1,)"
        self.whole_forward = parallel.strategy == "zero3"
        elements = sum(parameter.numel() for parameter in self.parameters.values())
        config = {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed demands a number; the loop decides on batches
            "gradient_clipping": max_grad_norm,
            "zero_force_ds_cpu_optimizer": False,  # PyTorch's AdamW also on the CPU: no compiler needed, same result
            "zero_optimization": {
                "stage": 3 if self.whole_forward else 2,
                "offload_optimizer": {"device": parallel.offload, "pin_memory": world.device.type == "cuda"},
                "reduce_bucket_size": min(elements, MOST_IN_A_BUCKET),
                "stage3_param_persistence_threshold": SMALL,
            },
        }
        # one notice a collective, of names that DeepSpeed has not taken up yet
        warnings.filterwarnings("ignore", r"`torch.distributed.\w+` is deprecated", FutureWarning)
        if world.device.type == "cpu":
            # an operator for inference, not used here, that would be compiled now: it takes minutes and a g++
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(verbose=False)  # joins the process group that `start` made
        if self.whole_forward:
            # weight by weight from where it was loaded, since the whole model may be too big for a device
            deepspeed.zero.Init(module=module, config_dict_or_path=config)
            for buffer in module.buffers():
                buffer.data = buffer.data.to(world.device)
        self._zero = deepspeed.initialize(model=module, optimizer=adamw(groups, betas, eps), config=config)[0]
        self._counts = dict.fromkeys(self.parameters, 0.0)  # updates of each parameter
        self._make_state()

    def backward(self, share: Tensor) -> None:
        with self._kept():
            # DeepSpeed divides the sum over processes by their number; scale_wrt_gas would divide by micro-batches too
            self._zero.backward(share * self.world.size, scale_wrt_gas=False)

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Leave gradients on the parameters of this process.

        It is what DeepSpeed's coalesce_grad_reduction does, but that reduces at its end, also when the end is an error:
        the process would then wait for the others instead of failing.
        """
        assert not self._zero.optimizer._coalesce_grad_reduction
        self._zero.inside_no_sync_ctxt = self._zero.optimizer._coalesce_grad_reduction = True
        try:
            yield
        finally:
            self._zero.inside_no_sync_ctxt = self._zero.optimizer._coalesce_grad_reduction = False

    def step(self, learning_rates: Sequence[float]) -> float:
        used = self._with_gradient()
        unused = [name for name in self.parameters if name not in used]
        before = {name: self._read(name) for name in unused}
        norm = self._update(learning_rates)
        if self._zero.was_step_applied():
            for name in used:
                self._counts[name] += 1
        for name, values in before.items():  # a gradient of zeros would still decay them, and move them by momentum
            self._write(name, *values)
        return norm

    def _update(self, learning_rates: Sequence[float]) -> float:
        """Reduce and step, with zeros for all gradients that are missing. Returns the norm, inf where not finite."""
        import torch

        for parameter in self.parameters.values():
            if parameter.grad is None:
                # PyTorch wants a gradient of the data's shape, and in ZeRO-3 the data may be away
                data, parameter.data = parameter.data, torch.zeros(whole_shape(parameter), device=self.world.device)
                parameter.grad, parameter.data = torch.zeros_like(parameter.data), data
        with self._zero.coalesce_grad_reduction():
            pass  # its end is the one reduction
        groups = self._zero.optimizer.param_groups
        for group, rate in zip(groups, learning_rates, strict=True):
            group["lr"] = rate
        self._zero.step()
        return float(self._zero.get_global_grad_norm()) if self._zero.was_step_applied() else math.inf

    # --- the state, parameter by parameter

    def _make_state(self) -> None:
        """Make AdamW's state, which it makes at its first step otherwise, so that it can be read and loaded at once."""
        import torch

        optimizer = self._zero.optimizer.optimizer
        for group in optimizer.param_groups:  # DeepSpeed links the first group's state only, unless all is there
            for flat in group["params"]:
                moments = {part: torch.zeros_like(flat) for part in MOMENTS}
                optimizer.state[flat] = {"step": torch.tensor(0.0), **moments}
        self._update([0.0] * len(optimizer.param_groups))  # of zeros at rate 0: changes nothing but the count
        self._set_count(0.0)

    def state(self) -> State:
        import torch

        first = self.world.rank == 0
        state: State = {part: {} for part in ("weights", *MOMENTS, "step")} if first else {}
        for name in self.parameters:
            values = self._read(name)
            if first:
                for part, value in zip(("weights", *MOMENTS), values, strict=True):
                    state[part][name] = whole_copy(value)
                state["step"][name] = torch.tensor(self._counts[name])
        return state

    def load_state(self, state: State) -> None:
        self._check(state)
        for name in self.parameters:
            self._write(name, *(state[part][name] for part in ("weights", *MOMENTS)))
        self._counts = {name: float(step) for name, step in state["step"].items()}
        self._set_count(max(self._counts.values()))

    def weights(self) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.parameters.items():
            whole = safe_get_full_fp32_param(parameter)
            if self.world.rank == 0:
                weights[name] = whole_copy(whole)
        return weights

    def _read(self, name: str) -> tuple[Tensor, ...]:
        """Weights and moments of a parameter, gathered whole."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        parameter = self.parameters[name]
        moments = (safe_get_full_optimizer_state(parameter, part) for part in MOMENTS)
        return safe_get_full_fp32_param(parameter), *moments

    def _write(self, name: str, weights: Tensor, *moments: Tensor) -> None:
        """Put back what `_read` gave: the optimizer's copy of the weights, its moments, and the module's weights."""
        from deepspeed import zero
        from deepspeed.utils import (
            safe_set_full_fp32_param,
            safe_set_full_optimizer_state,
            safe_set_local_fp32_param,
            safe_set_local_optimizer_state,
        )

        parameter = self.parameters[name]
        gathered: AbstractContextManager[Any] = nullcontext()
        if self.whole_forward:
            # not safe_set_full_…, which fails where the last process's shard is padded
            safe_set_local_fp32_param(parameter, self._shard(parameter, weights))
            for part, value in zip(MOMENTS, moments, strict=True):
                safe_set_local_optimizer_state(parameter, self._shard(parameter, value), part)
            gathered = zero.GatheredParameters([parameter], modifier_rank=0)
        else:
            safe_set_full_fp32_param(parameter, weights)
            for part, value in zip(MOMENTS, moments, strict=True):
                safe_set_full_optimizer_state(parameter, value, part)
        with gathered:
            parameter.data.copy_(weights)

    def _shard(self, parameter: nn.Parameter, whole: Tensor) -> Tensor:
        """This process's piece of a parameter, padded with zeros to the length that all pieces have."""
        import torch

        length = parameter.ds_tensor.numel()
        start = length * self.world.rank
        piece = whole.flatten()[start : start + length]
        return torch.nn.functional.pad(piece, (0, length - len(piece)))

    def _set_count(self, step: float) -> None:
        """Set AdamW's count of steps, one for all parameters, where PyTorch has one for each (bias correction)."""
        for state in self._zero.optimizer.optimizer.state.values():
            state["step"].fill_(step)


def _deepspeed(strategy: str) -> Any:
    """The deepspeed package; ValueError where it is not installed."""
    try:
        import deepspeed
    except ImportError:
        raise ValueError(
            f"parallel.strategy: {strategy} needs DeepSpeed; install it with `pip install 'medforge[distributed]'`"
        ) from None
    return deepspeed
