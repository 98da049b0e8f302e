"""The engine of one process, and what does not depend on the number of processes."""

from __future__ import annotations

import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from medforge.train.parallel import BUCKET_BYTES, Engine, Local, World, buckets, engine, start, stop

ALONE = World(0, 0, 1, torch.device("cpu"))
BETAS, EPS = (0.8, 0.95), 1e-6


class Net(torch.nn.Module):
    """A weight, a bias, a weight that only some batches use, and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
        self.bias = torch.nn.Parameter(torch.randn(3, generator=generator))
        self.extra = torch.nn.Parameter(torch.randn(3, generator=generator))
        self.frozen = torch.nn.Parameter(torch.randn(4, generator=generator), requires_grad=False)

    def forward(self, x: torch.Tensor, with_extra: bool = True) -> torch.Tensor:
        out = (x * self.frozen) @ self.weight.T + self.bias
        return (out * self.extra if with_extra else out).square().sum()


def make(max_grad_norm: float = 1.0) -> Engine:
    net = Net()
    groups: list[dict[str, Any]] = [
        {"params": [net.weight], "names": ["weight"], "lr": 1.0, "weight_decay": 0.3},
        {"params": [net.bias, net.extra], "names": ["bias", "extra"], "lr": 1.0, "weight_decay": 0.0},
    ]
    return engine(net, groups, SimpleNamespace(strategy="ddp", offload="none"), ALONE, max_grad_norm, BETAS, EPS)


def train(made: Engine, numbers: range) -> list[float]:
    norms = []
    for number in numbers:
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
        for row in x:
            made.backward(made(row, with_extra=number % 3 != 0) / 2)
        norms.append(made.step([0.05 / (number + 1), 0.02]))
    return norms


def test_the_update_is_adamws_formula_with_clipping() -> None:
    """Written out after algorithm 2 of Loshchilov and Hutter (arXiv 1711.05101), in float64."""
    made = make(max_grad_norm=2.0)
    net = Net().double()
    moments = {name: [torch.zeros_like(p), torch.zeros_like(p)] for name, p in net.named_parameters()}
    decays = {"weight": 0.3, "bias": 0.0, "extra": 0.0}
    clipped = 0
    for number in range(6):
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(number))
        for row in x:
            made.backward(made(row) / 2)
        rates = {"weight": 0.05 / (number + 1), "bias": 0.02, "extra": 0.02}
        norm = made.step([rates["weight"], rates["bias"]])

        loss = sum(net(row.double()) / 2 for row in x)
        names = list(decays)
        gradients = torch.autograd.grad(loss, [getattr(net, name) for name in names])
        expected = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        assert norm == pytest.approx(expected, rel=1e-5)
        scale = min(1.0, 2.0 / expected)
        clipped += scale < 1
        for name, gradient in zip(names, gradients, strict=True):
            first, second = moments[name]
            first.mul_(BETAS[0]).add_((1 - BETAS[0]) * gradient * scale)
            second.mul_(BETAS[1]).add_((1 - BETAS[1]) * (gradient * scale) ** 2)
            unbiased = first / (1 - BETAS[0] ** (number + 1)), second / (1 - BETAS[1] ** (number + 1))
            parameter = getattr(net, name).data
            parameter -= rates[name] * decays[name] * parameter
            parameter -= rates[name] * unbiased[0] / (unbiased[1].sqrt() + EPS)
            torch.testing.assert_close(getattr(made.module, name).data, parameter.float(), rtol=1e-5, atol=1e-6)
    assert clipped


def test_a_state_continues_bit_for_bit() -> None:
    unbroken = make()
    norms = train(unbroken, range(7))
    first = make()
    assert train(first, range(3)) == norms[:3]
    state = first.state()
    train(first, range(3, 5))  # the state is a copy: what comes later does not reach it
    second = make()
    second.load_state(state)
    assert train(second, range(3, 7)) == norms[3:]
    for name, weight in unbroken.weights().items():
        assert torch.equal(second.weights()[name], weight)
    assert second.state()["step"] == {"weight": 7, "bias": 7, "extra": 4}  # batches 0, 3 and 6 do without `extra`


def test_a_state_before_the_first_step_is_a_fresh_start() -> None:
    fresh, loaded = make(), make()
    loaded.load_state(make().state())
    assert train(loaded, range(3)) == train(fresh, range(3))


def test_a_state_holds_the_trainable_parameters_only() -> None:
    made = make()
    train(made, range(2))
    state = made.state()
    assert state.keys() == {"weights", "exp_avg", "exp_avg_sq", "step"}
    assert all(part.keys() == {"weight", "bias", "extra"} for part in state.values())
    assert made.weights().keys() == {"weight", "bias", "extra"}


def test_a_state_of_another_model_is_refused() -> None:
    made = make()
    state = made.state()
    lacking = state | {"exp_avg": {name: t for name, t in state["exp_avg"].items() if name != "bias"}}
    with pytest.raises(ValueError, match=r"exp_avg are not of this model's trainable parameters: 1 names .* bias"):
        made.load_state(lacking)
    state["weights"]["weight"] = torch.zeros(5, 4)
    with pytest.raises(ValueError, match=r"weights of weight have the shape \(5, 4\), the model's are \(3, 4\)"):
        made.load_state(state)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(poison: float) -> None:
    made, other = make(), make()
    train(made, range(2))
    train(other, range(2))
    made.backward(made(torch.ones(4)) * poison)
    assert not math.isfinite(made.step([1.0, 1.0]))
    for part, tensors in made.state().items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, other.state()[part][name])
    assert train(made, range(2, 4)) == train(other, range(2, 4))  # and nothing of it lingers


def test_a_parameter_without_gradient_stays_as_it_is() -> None:
    made = make()
    train(made, range(1, 3))  # it has momentum by now
    before = made.weights()["extra"]
    train(made, range(3, 4))
    assert torch.equal(made.weights()["extra"], before)


def test_each_parameter_group_needs_a_rate() -> None:
    made = make()
    made.backward(made(torch.ones(4)))
    with pytest.raises(ValueError, match="zip"):
        made.step([0.1])


def test_one_process_is_its_own_world(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = start()
    assert (world.rank, world.size) == (0, 1)
    assert not torch.distributed.is_initialized()
    made = make()
    assert made.total([1.5, 2]) == [1.5, 2.0]
    assert made.most(3) == 3
    assert made.any(True) and not made.any(False)
    stop(world)


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_one_process_shards_nothing(strategy: str) -> None:
    net = Net()
    groups = [{"params": [net.weight], "names": ["weight"], "lr": 1.0, "weight_decay": 0.0}]
    made = engine(net, groups, SimpleNamespace(strategy=strategy, offload="none"), ALONE, 1.0)
    assert type(made) is Local
    assert not made.whole_forward
    if strategy != "ddp":
        with pytest.raises(ValueError, match=r"parallel\.offload: takes several processes"):
            engine(net, groups, SimpleNamespace(strategy=strategy, offload="cpu"), ALONE, 1.0)


def test_buckets_are_of_one_dtype_and_bounded() -> None:
    sizes = [3, 5, 1, 9, 2, 2, 4]
    tensors = [torch.zeros(size, dtype=torch.bfloat16 if size == 2 else torch.float32) for size in sizes]
    found = list(buckets(tensors, 24))
    assert [[len(t) for t in bucket] for bucket in found] == [[3], [5, 1], [9], [4], [2, 2]]  # 9 is too big for any
    assert {id(t) for bucket in found for t in bucket} == {id(t) for t in tensors}
    assert list(buckets([], BUCKET_BYTES)) == []


def test_zero_without_deepspeed_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ValueError, match=r"parallel\.strategy: zero2 needs DeepSpeed; install it with .*distributed"):
        engine(Net(), [], SimpleNamespace(strategy="zero2", offload="none"), World(0, 0, 2, ALONE.device), 1.0)


def test_zero_refuses_trainable_weights_in_bfloat16() -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'medforge[distributed]'")
    net = Net().bfloat16()
    groups = [{"params": [net.bias], "names": ["bias"], "lr": 1.0, "weight_decay": 0.0}]
    with pytest.raises(ValueError, match="zero3 trains float32 parameters only, and bias is bfloat16"):
        engine(net, groups, SimpleNamespace(strategy="zero3", offload="none"), World(0, 0, 2, ALONE.device), 1.0)
