"""DeepSpeed ZeRO: what the engine reads and writes, against DeepSpeed's own view and against plain models."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

from support.oracle import DenseAverage
from support.zero_models import (
    DTYPES,
    Net,
    adam_in_two_groups,
    assembled,
    backward,
    batch,
    make_engine,
    plain_fused_adam,
    train,
)

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import ShardedEMA
from dist_ema.engines.base import Engine
from dist_ema.engines.deepspeed.zero import ZeroEngine
from dist_ema.errors import EMAConfigError, EMAEngineError, EMAStateError

pytestmark = pytest.mark.core

#: Every optimizer class that DeepSpeed 0.19.8 wraps around a plain one, and every branch of ours.
#: Of stage, dtype and offload every pair is there: offloading alternates over the products of the other two.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    f"zero{stage}-{dtype}{'-offload' if offload else ''}": (stage, {"dtype": dtype, "offload": offload})
    for stage in (0, 1, 2, 3)
    for number, dtype in enumerate(DTYPES)
    for offload in ((stage + number) % 2 == 0 and stage > 0,)
}
CASES["zero0-bf16-fused"] = (0, {"dtype": "bf16", "optimizer": plain_fused_adam})
CASES["zero1-bf16-optimizer"] = (1, {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}})
CASES["zero2-round-robin"] = (2, {"dtype": "bf16", "zero": {"round_robin_gradients": True}})
CASES["zero3-sub-groups"] = (3, {"dtype": "bf16", "zero": {"sub_group_size": 30}})
CASES["zero3-hpz"] = (3, {"dtype": "bf16", "zero": {"zero_hpz_partition_size": 2}})
CASES.update(
    (f"zero{stage}-two-groups", (stage, {"dtype": "bf16", "optimizer": adam_in_two_groups})) for stage in (1, 3)
)
CASES["zero3-all-persistent"] = (3, {"dtype": "bf16", "zero": {"stage3_param_persistence_threshold": 10**6}})
CASES["zero3-none-persistent"] = (3, {"dtype": "bf16", "zero": {"stage3_param_persistence_threshold": 0}})
CASES["zero3-param-offload"] = (
    3,
    {"dtype": "bf16", "offload": True, "zero": {"offload_param": {"device": "cpu", "pin_memory": False}}},
)
WORLDS = [(case, 2) for case in CASES] + [
    (case, size)
    for size in (1, 3)
    for case in ("zero0-bf16", "zero1-fp32", "zero1-bf16-optimizer", "zero2-bf16", "zero3-fp32", "zero3-bf16-offload")
]


def live(engine: Any) -> dict[str, Tensor]:
    """What the model really computes with: full copies where a parameter is gathered, else gathered for the purpose."""
    weights = {}
    for name, parameter in engine.module.named_parameters():
        gather = hasattr(parameter, "ds_status") and parameter.ds_status.name == "NOT_AVAILABLE"
        if gather:
            parameter.all_gather()
        weights[name] = parameter.detach().clone()
        if gather:
            parameter.partition()
    return weights


def evaluate(engine: Any) -> Tensor:
    """A forward pass without backward, in eval mode."""
    engine.eval()
    with torch.no_grad():
        output = engine(batch(99, 0))
    engine.train()
    return output


def plain_model(weights: dict[str, Tensor], dtype: str) -> Net:
    """A plain Net in eval mode with these trained and frozen weights and buffers."""
    model = Net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
            parameter.data = parameter.data.to(DTYPES[dtype])
        for name, buffer in model.named_buffers():
            buffer.copy_(weights[name])
    return model.eval()


def write(engine: Engine, values: list[Tensor]) -> None:
    """Overwrites every trained source."""
    for spec, source, value in zip(engine.specs(), engine.sources(), values, strict=True):
        if spec.kind == "parameter":
            source.copy_(value)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def check_sources_are_the_master_weights(engine: Any, zero: ZeroEngine, case: str) -> None:
    """Right after a step. A wrong offset, padding or order would average one parameter's elements into another's."""
    from deepspeed.utils import safe_get_full_fp32_param

    stage, options = CASES[case]
    full = assembled(zero)
    names = [name for spec in zero.specs() for name in (spec.name, *spec.aliases)]
    assert sorted(names) == sorted(Net().state_dict())
    weights = live(engine)
    for spec in zero.specs():
        assert (spec.kind == "frozen") == spec.name.startswith("frozen."), spec
        if spec.kind == "buffer":
            continue
        assert spec.shape == weights[spec.name].shape
        assert spec.dtype == weights[spec.name].dtype == DTYPES[options["dtype"]]
        # Right after a step the live weights are the masters, cast.
        assert torch.equal(full[spec.name].to(spec.dtype), weights[spec.name]), spec.name
    # With round_robin_gradients DeepSpeed's own lookup returns the wrong elements.
    if stage and "round-robin" not in case:
        for name, parameter in engine.module.named_parameters():
            if parameter.requires_grad:
                assert torch.equal(full[name].float(), safe_get_full_fp32_param(parameter)), name
    if options["dtype"] != "fp32":
        assert not torch.equal(full["up.weight"], weights["up.weight"].double()), "the source is not the fp32 master"


@pytest.mark.parametrize(("case", "world_size"), WORLDS)
@pytest.mark.world_size()
def test_sources_are_the_masters_and_evaluating_other_weights_leaves_no_trace(case: str, world_size: int) -> None:
    """Persistent parameters of ZeRO-3 and replicated weights of ZeRO-1/2 do not follow a write to the masters."""
    stage, options = CASES[case]
    untouched = make_engine(stage, **options)
    train(untouched, range(5))
    expected = live(untouched), assembled(ZeroEngine(untouched))

    engine = make_engine(stage, **options)
    train(engine, range(3))
    zero = ZeroEngine(engine)
    check_sources_are_the_master_weights(engine, zero, case)
    backward(engine, 3)  # gradients of the next step must survive what follows
    evaluate(engine)  # leaves parameters gathered under ZeRO-3
    before, masters = live(engine), assembled(zero)
    if stage == 3 and "all-persistent" not in case and world_size > 1:
        gathered = [name for name, p in engine.module.named_parameters() if p.ds_status.name == "AVAILABLE"]
        assert any(not engine.module.get_parameter(name).ds_persist for name in gathered), "nothing to be caught by"
    kept = [source.clone() for source in zero.sources()]
    write(zero, [value * 0.5 + 0.125 if value.is_floating_point() else value for value in kept])
    zero.publish()
    changed = assembled(zero)
    output = evaluate(engine)
    assert torch.equal(output, plain_model(changed, options["dtype"])(batch(99, 0)))
    assert not torch.equal(output, plain_model(masters, options["dtype"])(batch(99, 0)))
    same(live(engine), {name: value.to(DTYPES[options["dtype"]]) for name, value in changed.items() if name in before})

    write(zero, kept)
    zero.publish()
    for parameter in engine.module.parameters() if stage == 3 else ():
        assert (parameter.ds_status.name == "AVAILABLE") is parameter.ds_persist, "not as after a step"
    evaluate(engine)
    same(live(engine), before)
    same(assembled(zero), masters)
    engine.step()
    train(engine, range(4, 5))
    same(live(engine), expected[0])
    same(assembled(zero), expected[1])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.world_size(2)
def test_micro_steps_and_overflows_are_no_steps(stage: int) -> None:
    """engine.step() is called on every micro-batch, and returns as usual when the gradients overflowed."""
    engine = make_engine(stage, "fp16", gas=2)
    zero = ZeroEngine(engine)
    zero.specs()
    seen = []
    for step in range(8):
        backward(engine, step, factor=1e30 if step in (4, 5) else 1.0)
        engine.step()
        seen.append(zero.stepped())
        assert not zero.stepped(), "one step was counted twice"
    assert seen == [False, True, False, True, False, False, False, True]
    assert engine.skipped_steps == 1


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.world_size(2)
def test_an_average_begins_from_the_initial_weights_before_any_step(stage: int) -> None:
    """The engine has not stepped yet, so the call was turned down, and the first step's weights were copied later."""
    engine = make_engine(stage, "bf16")
    zero = ZeroEngine(engine)
    zero.specs()
    ema = ShardedEMA(engine, decay=0.5)
    initial = assembled(zero)
    assert ema.update(batches=0, due=True)
    assert not ema.update(due=True), "a step that never was is counted"
    train(engine, range(1))
    assert ema.update()
    assert (ema.num_updates, ema.progress.batches) == (2, 1)
    stepped = assembled(zero)
    found = ema.full_state_dict()
    if dist.get_rank() == 0:
        for name, value in initial.items():
            if name in dict(Net().named_parameters()) and dict(Net().named_parameters())[name].requires_grad:
                expected = 0.5 * value + 0.5 * stepped[name]
                torch.testing.assert_close(found[name].double(), expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.world_size(2)
def test_loading_a_checkpoint_is_no_step(stage: int, tmp_path: Path) -> None:
    """load_checkpoint() moves the engine's counters, so the micro-step that follows looks like a step to them."""
    engine = make_engine(stage, "fp32", gas=2)
    zero = ZeroEngine(engine)
    zero.specs()
    for save, forward in ((2, False), (4, True)):
        train(engine, range(save))
        engine.save_checkpoint(str(tmp_path), tag=f"{save}", exclude_frozen_parameters=False)
        assert zero.stepped()
        if forward:
            engine.load_checkpoint(str(tmp_path), tag="2")
        else:
            train(engine, range(2))
            assert zero.stepped()
        engine.load_checkpoint(str(tmp_path), tag=f"{save}")
        train(engine, range(1))
        assert not zero.stepped()
        train(engine, range(1))
        assert zero.stepped()
        assembled(zero)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.world_size(2)
def test_attach_calls_back_after_the_whole_step(stage: int) -> None:
    """The inner optimizer's step hook fires once per group, before the live weights are made from the masters."""
    engine = make_engine(stage, "bf16", gas=2)
    zero = ZeroEngine(engine)
    seen: list[bool] = []
    zero.specs()

    def callback() -> None:
        same({"w": assembled(zero)["up.weight"].bfloat16()}, {"w": live(engine)["up.weight"]})
        seen.append(zero.stepped())

    for optimizer in (engine, engine.optimizer, engine.basic_optimizer, Wrapper(engine.optimizer)):
        seen.clear()
        handle = zero.attach(optimizer, callback)
        train(engine, range(2))
        handle.remove()
        handle.remove()
        assert "step" not in vars(engine)
        train(engine, range(2))
        assert seen == [False, True]
        assert zero.stepped()

    outer, inner = zero.attach(engine, callback), None
    inner = zero.attach(engine, callback)
    outer.remove()
    seen.clear()
    train(engine, range(1))
    assert seen == [False]
    inner.remove()
    for stranger in (torch.optim.SGD(nn.Linear(1, 1).parameters()), engine.module, None):
        with pytest.raises(EMAConfigError, match="DeepSpeed engine"):
            zero.attach(stranger, callback)


class Wrapper:
    """As Accelerate wraps an optimizer."""

    def __init__(self, optimizer: object) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.world_size(2)
def test_flags_do_not_say_what_has_a_master(stage: int) -> None:
    """A parameter that is frozen later keeps its master; one that is unfrozen too late has none at all."""
    engine = make_engine(stage, "bf16")
    train(engine, range(1))
    zero = ZeroEngine(engine)
    kinds = {spec.name: spec.kind for spec in zero.specs()}
    before = [source.data_ptr() for source in zero.sources()]
    for name in ("frozen.weight", "down.weight"):
        parameter = engine.module.get_parameter(name)
        parameter.requires_grad_(not parameter.requires_grad)
    assert [source.data_ptr() for source in zero.sources()] == before
    assert not zero.trained([number for number, kind in enumerate(kinds.values()) if kind == "frozen"])
    zero.publish()
    now = {spec.name: spec.kind for spec in zero.specs()}
    assert now["frozen.weight"] == "frozen"
    assert now["down.weight"] == ("frozen" if stage == 0 else "parameter")
    assert [source.data_ptr() for source in zero.sources()] == before


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.world_size(2)
def test_a_changed_model_is_noticed(stage: int) -> None:
    """A stale master would be averaged for ever."""
    engine = make_engine(stage, "bf16")
    train(engine, range(1))
    zero = ZeroEngine(engine)
    zero.specs()
    zero.sources()
    zero.publish()
    engine.module.one.bias = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    with pytest.raises(EMAStateError, match=r"one\.bias"):
        zero.sources()


@pytest.mark.world_size(2)
def test_what_cannot_be_averaged_says_so(tmp_path: Path) -> None:
    """An engine that is misread would average garbage."""
    model = Net().requires_grad_(True)
    with pytest.raises(EMAEngineError, match="no optimizer"):
        ZeroEngine(make_engine(3, "bf16", model=model, optimizer=None))
    engine = make_engine(1, "bf16")
    engine.optimizer.__class__ = type("ZenFlowZeroOptimizerSequential", (type(engine.optimizer),), {})
    with pytest.raises(EMAEngineError, match="ZenFlowZeroOptimizerSequential"):
        ZeroEngine(engine)
    alone, _ = dist.new_subgroups(1)
    for stage, attribute in ((2, "real_dp_process_group"), (3, "sub_group_process_groups")):
        engine = make_engine(stage, "bf16")
        setattr(engine.optimizer, attribute, [alone])
        with pytest.raises(EMAEngineError, match="1 of 2 ranks"):
            ZeroEngine(engine)
    for stage in (1, 2):
        engine = make_engine(stage, "bf16")
        zero = ZeroEngine(engine)
        zero.specs()
        engine.offload_states(pin_memory=False)
        with pytest.raises(EMAStateError, match="reload_states"):
            zero.sources()
        with pytest.raises(EMAStateError, match="reload_states"):
            zero.publish()
        engine.reload_states()
        train(engine, range(2))
        assert torch.equal(assembled(zero)["up.weight"].bfloat16(), live(engine)["up.weight"])


@pytest.mark.world_size(2)
def test_an_engine_without_optimizer_is_a_replicated_model() -> None:
    """At stage 0 DeepSpeed may wrap a model that the caller steps."""
    for dtype in ("fp32", "bf16"):
        engine = make_engine(0, dtype, optimizer=None)
        zero = ZeroEngine(engine)
        assert torch.equal(assembled(zero)["up.weight"].to(DTYPES[dtype]), live(engine)["up.weight"])
        zero.publish()
        assert zero.stepped()
        assert zero.stepped()
        calls: list[int] = []
        own = torch.optim.SGD(engine.module.parameters(), lr=0.1)
        zero.attach(own, partial(calls.append, 1))
        own.step()
        assert calls == [1]


@pytest.mark.parametrize("stage", [0, 3])
@pytest.mark.world_size(2)
def test_wrappers_inside_the_engine_do_not_change_names(stage: int) -> None:
    """In one project a torch.compile prefix made the average never update."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = Net()
    model.up = checkpoint_wrapper(model.up)
    if stage == 0:
        engine = make_engine(stage, "fp32", model=torch.compile(model, backend="eager"))
    else:  # DeepSpeed 0.19.8 loses the own parameters of a module that is compiled before ZeRO-3 takes it
        engine = make_engine(stage, "fp32", model=model)
        engine.compile(backend="eager")
    names = [name for spec in ZeroEngine(engine).specs() for name in (spec.name, *spec.aliases)]
    assert sorted(names) == sorted(Net().state_dict()), names


EMA_CASES = [(case, 2) for case in CASES if "persistent" not in case and "param-offload" not in case] + [
    (case, size) for size in (1, 3, 4) for case in ("zero0-bf16", "zero1-fp16", "zero2-bf16", "zero3-fp16")
]


@pytest.mark.parametrize(("case", "world_size"), EMA_CASES)
@pytest.mark.world_size()
def test_average_equals_the_dense_one_and_never_disturbs_training(
    case: str, world_size: int, rank: int, tmp_path: Path
) -> None:
    """The whole way: masters are averaged, evaluated, gathered and exported, and training does not notice."""
    from safetensors.torch import load_file

    stage, options = CASES[case]
    untouched = make_engine(stage, **options, gas=2)
    train(untouched, range(8))
    expected = live(untouched), assembled(ZeroEngine(untouched))

    engine = make_engine(stage, **options, gas=2)
    reader = ZeroEngine(engine)
    trained = {name for name, parameter in Net().named_parameters(remove_duplicate=False) if parameter.requires_grad}
    oracle = DenseAverage(trained, 0.7)
    ema = ShardedEMA(engine, decay=0.7)
    updates = 0
    for step in range(8):
        train(engine, range(step, step + 1))
        if ema.update():
            updates += 1
            oracle.update(named(reader))
        if step in (1, 4, 5):
            with ema.average_parameters():
                averaged = plain_model({k: v.float() for k, v in exported(oracle).items()}, options["dtype"])
                found, wanted = evaluate(engine).float(), averaged(batch(99, 0)).float()
                torch.testing.assert_close(found, wanted, **tolerance(options["dtype"]))
            evaluate(engine)
    assert updates == ema.num_updates == 4
    state = ema.full_state_dict()
    if rank == 0:
        oracle.check(dict(state))
        assert sorted(state) == sorted(Net().state_dict())
    same(live(engine), expected[0])
    same(assembled(reader), expected[1])

    ema.export(tmp_path / "export", dtype=torch.float32)
    model = Net()
    model.load_state_dict(load_file(tmp_path / "export" / "model.safetensors"), strict=True)
    if rank == 0:  # BatchNorm's statistics are each rank's own, and rank 0's are written
        oracle.check(model.state_dict())
    before = named(reader)
    ema.copy_to(fraction=0.25)
    for name, value in named(reader).items():
        toward = oracle.average[name].double() if name in trained else before[name].double()
        expected = before[name].double() + 0.25 * (toward - before[name].double())
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6, msg=name)
    ema.copy_to()
    oracle.average = exported(oracle)
    oracle.check(named(reader))
    train(engine, range(2))


def exported(oracle: DenseAverage) -> dict[str, Tensor]:
    """The average that all ranks compute with: BatchNorm's statistics, which each has for itself, are rank 0's."""
    first = [{name: oracle.average[name] for name, _ in Net().named_buffers()}]
    dist.broadcast_object_list(first)
    return {**oracle.average, **first[0]}


def named(engine: Engine) -> dict[str, Tensor]:
    """Full weights under every name, in the dtype of the sources."""
    full = {}
    values = assembled(engine)
    for spec, source in zip(engine.specs(), engine.sources(), strict=True):
        for name in (spec.name, *spec.aliases):
            full[name] = values[spec.name].to(source.dtype)
    return full


def tolerance(dtype: str) -> dict[str, float]:
    """Of a forward pass: an average that is right to fp32 rounding may be cast to the neighbouring bf16 number."""
    return {
        "fp32": {"rtol": 1e-5, "atol": 1e-6},
        "bf16": {"rtol": 0.02, "atol": 0.02},
        "fp16": {"rtol": 0.003, "atol": 0.003},
    }[dtype]


@pytest.mark.world_size(2)
def test_attached_average_skips_micro_steps() -> None:
    """attach() must count optimizer steps, not calls of engine.step()."""
    engine = make_engine(2, "fp16", gas=2)
    ema = ShardedEMA(engine, decay=0.9)
    handle = ema.attach(engine)
    for step in range(6):
        backward(engine, step, factor=1e30 if step == 2 else 1.0)
        engine.step()
    assert ema.num_updates == 2
    handle.remove()
    train(engine, range(2))
    assert ema.num_updates == 2
    assert copy.copy(ema.progress) == ema.progress
