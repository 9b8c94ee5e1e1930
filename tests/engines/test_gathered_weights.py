"""Full copies, and parts, of weights that FSDP leaves in a module are not taken for what the optimizer steps."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from support.models import CASES, batch, build
from support.oracle import DenseAverage

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, ShardingStrategy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from dist_ema import ShardedEMA
from dist_ema.engines import detect
from dist_ema.errors import EMAEngineError, EMAStateError

DECAY = 0.5
CPU = torch.device("cpu")


def _evaluate(model: nn.Module) -> Tensor:
    """A sanity validation: no backward follows."""
    model.eval()
    with torch.no_grad():
        output = model(batch(0)).float()
    model.train()
    return output


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    model(batch(step)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _full(model: nn.Module) -> dict[str, Tensor]:
    """The full live weights, as the wrapper itself gives them, on every rank."""
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, FSDP):
        with FSDP.summon_full_params(model, writeback=False):
            state = {name: value.detach().clone() for name, value in model.named_parameters(remove_duplicate=False)}
            state |= {name: value.clone() for name, value in model.named_buffers()}
    else:
        received = [get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))]
        dist.broadcast_object_list(received, src=0)
        state = {name: value.clone() for name, value in received[0].items()}
    plain = {
        re.sub("(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)[.]", "", name): value
        for name, value in state.items()
    }
    plain.pop("cache", None)  # not persistent
    return plain


def _trained(model: nn.Module) -> set[str]:
    return {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.requires_grad}


def _unshard(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.unshard()


# An average that begins while weights are full.

FSDP1 = ["fsdp1-full", "fsdp1-full-orig", "fsdp1-grad-op", "fsdp1-grad-op-orig-mixed", "fsdp1-hybrid-orig"]
FSDP2 = [(name, 2) for name in ("fsdp2", "fsdp2-compiled", "fsdp2-offloaded", "fsdp2-keep", "fsdp2-mixed")]
FSDP2 += [("hsdp", 4), ("fsdp2-tp", 4)]


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), [*((name, 2) for name in FSDP1), *FSDP2])
def test_an_average_that_begins_after_a_forward_without_backward_is_right(
    case: str, rank: int, world_size: int, tmp_path: Path
) -> None:
    """The root's weights are full then. Taken for this rank's shard, they made ``update()`` read past the shard."""
    model = CASES[case].model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _evaluate(model)
    assert detect(model).ranks() == set(range(world_size))
    _evaluate(model)
    ema = ShardedEMA(model, decay=DECAY)
    for begin in ("constructed", "reset"):
        oracle = DenseAverage(_trained(CASES[case].plain()), DECAY)
        for step in range(3):
            _train(model, optimizer, step)
            ema.update()
            oracle.update(_full(model))
        state = ema.full_state_dict()
        ema.export(tmp_path / begin)
        if rank == 0:
            oracle.check(state)
            exported = load_file(tmp_path / begin / "model.safetensors")
            for name, tensor in exported.items():
                torch.testing.assert_close(tensor.double(), oracle.average[name].double(), rtol=1e-5, atol=1e-6)
        _evaluate(model)
        ema.reset()


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size"), FSDP2)
def test_units_that_are_unsharded_by_hand_are_read_and_written_where_training_writes(
    case: str, rank: int, world_size: int
) -> None:
    """``unshard()`` leaves full copies as a forward does, and an asynchronous one is about to."""
    model = CASES[case].model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _unshard(model)
    ema = ShardedEMA(model, decay=DECAY)
    oracle = DenseAverage(_trained(CASES[case].plain()), DECAY)
    for step in range(3):
        _train(model, optimizer, step)
        _unshard(model)
        ema.update()
        oracle.update(_full(model))
    live, now = _evaluate(model), _full(model)
    _unshard(model)
    state = ema.full_state_dict()
    if rank == 0:
        oracle.check(state)
    reference = build(CASES[case].scalar, hidden=CASES[case].hidden)
    reference.load_state_dict({name: value.to(now[name].dtype) for name, value in oracle.average.items()})
    expected = _evaluate(reference)
    loose = {"rtol": 0.1, "atol": 0.1} if case == "fsdp2-mixed" else {"rtol": 1e-4, "atol": 1e-5}
    pending = [module.unshard(async_op=True) for module in model.modules() if isinstance(module, FSDPModule)]
    with ema.average_parameters():
        inside = _evaluate(model)
        torch.testing.assert_close(inside, expected, **loose)
        assert not torch.equal(inside, live)
        pending += [module.unshard(async_op=True) for module in model.modules() if isinstance(module, FSDPModule)]
    assert torch.equal(_evaluate(model), live)
    assert all(torch.equal(value, now[name]) for name, value in _full(model).items())
    del pending


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", FSDP1)
def test_inside_summon_full_params_every_call_is_refused_and_the_weights_survive(
    case: str, rank: int, tmp_path: Path
) -> None:
    """To reshard in there would free the full copies that the context writes back: the live weights were lost."""
    model = CASES[case].model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    _train(model, optimizer, 0)
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    _train(model, optimizer, 1)
    before = _full(model)
    calls: list[Callable[[], object]] = [
        lambda: ShardedEMA(model, decay=DECAY),
        ema.update,
        ema.reset,
        ema.full_state_dict,
        ema.copy_to,
        lambda: ema.save(tmp_path / "saved"),
        lambda: ema.average_parameters().__enter__(),
    ]
    with FSDP.summon_full_params(model):
        for call in calls:
            with pytest.raises(EMAStateError, match="summon_full_params"):
                call()
    assert all(torch.equal(value, before[name]) for name, value in _full(model).items())
    assert not list(tmp_path.iterdir())
    assert ema.update() and ema.num_updates == 2


@pytest.mark.world_size(2)
def test_an_error_in_a_forward_under_the_average_is_the_error_that_is_raised(rank: int) -> None:
    """It leaves units in the middle of a forward, where ``reshard()`` does nothing; the weights came back, but
    with an error about replaced parameters on top."""
    model = CASES["fsdp2-keep"].model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    ema = ShardedEMA(model, decay=DECAY)
    for step in range(2):
        _train(model, optimizer, step)
        ema.update()
    before = _full(model)

    def fail(*_: object) -> None:
        raise KeyError("no such token")

    hook = model.head.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="no such token"), ema.average_parameters():
        _evaluate(model)
    hook.remove()
    assert all(torch.equal(value, before[name]) for name, value in _full(model).items())


# A module whose weights belong to a unit around it.


class _Task(nn.Module):
    """As a LightningModule is: the network is an attribute of what is wrapped."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.probe = nn.Linear(5, 3)
        self.ignored = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.ignored(self.probe(self.net(tokens)))


def _task() -> _Task:
    torch.manual_seed(3)
    return _Task(build(scalar=False, hidden=12))


def _around(way: str) -> _Task:
    """The outer module is the unit that holds the weights of the net, or those that no unit in the net holds."""
    task = _task()
    sizes = (2, 2) if way in ("hsdp", "tp") else (2,)
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp")[: len(sizes)])
    if way == "tp":
        for block in task.net.module:
            parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        mesh = mesh["dp"]
    if way == "nested":
        for block in task.net.module:
            fully_shard(block, mesh=mesh)
    return fully_shard(
        task,
        mesh=mesh,
        reshard_after_forward=False if way == "keep" else None,
        ignored_params=set(task.ignored.parameters()),
    )


@pytest.mark.world_size()
@pytest.mark.parametrize(("way", "world_size"), [("flat", 2), ("nested", 2), ("keep", 2), ("hsdp", 4), ("tp", 4)])
@pytest.mark.parametrize("evaluated", [False, True])
def test_a_module_inside_of_an_fsdp2_unit_is_averaged_alone(
    way: str, evaluated: bool, rank: int, world_size: int
) -> None:
    """Only the outer module can reshard its weights, and it does not lie in the target."""
    task = _around(way)
    optimizer = torch.optim.SGD(task.parameters(), 0.1)
    if evaluated:
        _evaluate(task)
    ema = ShardedEMA(task.net, decay=DECAY)
    oracle = DenseAverage(_trained(_task().net), DECAY)
    for step in range(3):
        _train(task, optimizer, step)
        live = _evaluate(task)
        ema.update()
        oracle.update({name[4:]: value for name, value in _full(task).items() if name.startswith("net.")})
    state = ema.full_state_dict()
    before = _full(task)
    if rank == 0:
        oracle.check(state)
    reference = _task()
    reference.load_state_dict(
        before | {f"net.{name}": value.float() for name, value in oracle.average.items()}, strict=False
    )
    _evaluate(task)
    with ema.average_parameters():
        inside = _evaluate(task)
        torch.testing.assert_close(inside, _evaluate(reference), rtol=1e-4, atol=1e-5)
        assert not torch.equal(inside, live)
    assert torch.equal(_evaluate(task), live)
    assert all(torch.equal(value, before[name]) for name, value in _full(task).items())


@pytest.mark.world_size(2)
@pytest.mark.parametrize("use_orig_params", [False, True])
@pytest.mark.parametrize("strategy", [ShardingStrategy.FULL_SHARD, ShardingStrategy.SHARD_GRAD_OP])
def test_a_module_inside_of_an_fsdp1_unit_is_refused_at_any_moment(
    use_orig_params: bool, strategy: ShardingStrategy, rank: int
) -> None:
    """A rank finds half a weight in it, one-dimensional, or none: it was averaged and exported as if it were whole."""
    task = _task()
    task.net.frozen.requires_grad_(True)
    options: dict = {"use_orig_params": use_orig_params, "sharding_strategy": strategy, "device_id": CPU}
    task.net.module[0] = FSDP(task.net.module[0], **options)
    outer = FSDP(task, ignored_modules=[task.ignored], **options)
    optimizer = torch.optim.SGD(outer.parameters(), 0.1)

    def refused() -> None:
        for target in (task, task.net, task.net.module[1], task.net.embed, task.probe, [task.net]):
            with pytest.raises(EMAEngineError, match=r"FullyShardedDataParallel unit outside.*include="):
                ShardedEMA(target, decay=DECAY)
        for target in (task.ignored, task.net.module[0], outer):
            ShardedEMA(target, decay=DECAY)

    refused()
    output = outer(batch(0))
    with pytest.raises(EMAEngineError, match="FullyShardedDataParallel unit outside"):
        ShardedEMA(task.net, decay=DECAY)
    output.sum().backward()
    optimizer.step()
    refused()
    _evaluate(outer)
    with pytest.raises(EMAEngineError, match="FullyShardedDataParallel unit outside"):
        ShardedEMA(task.net, decay=DECAY)
    with torch.inference_mode():
        outer(batch(0))
    refused()
    ema = ShardedEMA(outer, decay=DECAY, include="^net[.]", exclude="frozen")
    assert ema.update() and len(ema.fingerprint()) > 10


# What is sharded between construction and first use.


def _shard_fsdp2(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (2,)))


def _shard_tp(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.module:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def _shard_fsdp1(use_orig_params: bool) -> Callable[[nn.Module], nn.Module]:
    return lambda model: FSDP(model, use_orig_params=use_orig_params, device_id=CPU)


LATER = {"fsdp2": _shard_fsdp2, "tp": _shard_tp, "fsdp1": _shard_fsdp1(False), "fsdp1-orig": _shard_fsdp1(True)}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("way", LATER)
def test_a_model_that_is_sharded_after_the_average_was_made_is_refused(way: str, rank: int) -> None:
    """The average knows whole tensors, and the local ones are shorter: a kernel would read past them."""
    model = build(scalar=False, frozen=False, hidden=12)
    ema = ShardedEMA(model, decay=DECAY)
    wrapped = LATER[way](model)
    for call in (ema.update, ema.full_state_dict, lambda: ema.average_parameters().__enter__(), ema.reset):
        with pytest.raises((EMAStateError, EMAEngineError), match=r"after|since|when the average was made|outside"):
            call()
    assert ShardedEMA(wrapped, decay=DECAY).update()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("outer", [False, True])
def test_fully_shard_after_the_average_of_a_tensor_parallel_model_was_made_is_noticed(outer: bool, rank: int) -> None:
    """Here the local shards keep their sizes: what is missed is the resharding."""
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    model = build(scalar=False, hidden=12)
    for block in model.module:
        parallelize_module(block, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    ema = ShardedEMA(model, decay=DECAY)
    fully_shard(nn.Sequential(model) if outer else model, mesh=mesh["dp"])
    with pytest.raises(EMAStateError, match="fully_shard was applied"):
        ema.update()
    ema.reset()
    _evaluate(model) if not outer else _unshard(model)
    assert ema.update() and ema.update()


@pytest.mark.world_size(2)
def test_a_source_that_is_shorter_than_announced_is_named(rank: int) -> None:
    """Whatever an engine overlooks: no kernel is called with it."""
    model = CASES["fsdp2"].model()
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    weight = model.one.weight if model.one.weight._local_tensor.numel() else model.norm.weight
    name = "one.weight" if weight is model.one.weight else "norm.weight"
    size = weight._local_tensor.numel()
    weight._local_tensor = weight._local_tensor.flatten()[: size - 1]
    with pytest.raises(EMAStateError, match=f"'{name}' has {size - 1} elements on this rank, and had {size}"):
        ema.update()


def test_plain_tensors_of_a_model_are_no_reason_to_refuse_it() -> None:
    model = build()
    model.view = model.embed.weight[:2]
    model.rotary = torch.ones(3)[1:]
    with torch.inference_mode():
        model.seen = torch.ones(3)[1:]
    assert detect(model).specs()
    ema = ShardedEMA(model, decay=DECAY)
    assert ema.update() and ema.update()
