"""A module whose weights DeepSpeed keeps elsewhere, given without its engine, as ``unwrap_model`` gives it."""

from __future__ import annotations

import copy
import logging
from typing import Any

from support.zero_models import Net, make_engine, plain_fused_adam, train

import pytest
import torch
from torch import nn

from dist_ema import ShardedEMA
from dist_ema.engines.deepspeed.zero import ZeroEngine
from dist_ema.errors import EMAEngineError, EMAStateError

#: Where the weights that the module shows are empty, or bf16 copies, or would be overwritten by masters.
MANAGED: dict[str, tuple[int, dict[str, Any]]] = {
    "zero0-bf16": (0, {"dtype": "bf16"}),
    "zero0-bf16-fused": (0, {"dtype": "bf16", "optimizer": plain_fused_adam}),
    "zero1-fp32": (1, {"dtype": "fp32"}),
    "zero1-bf16": (1, {"dtype": "bf16"}),
    "zero1-bf16-optimizer": (1, {"dtype": "bf16", "data_types": {"grad_accum_dtype": "fp32"}}),
    "zero2-bf16": (2, {"dtype": "bf16"}),
    "zero3-fp32": (3, {"dtype": "fp32"}),
    "zero3-bf16": (3, {"dtype": "bf16"}),
}


@pytest.mark.parametrize("case", MANAGED)
@pytest.mark.world_size(2)
def test_the_module_without_its_engine_is_refused(case: str) -> None:
    """ZeRO-3 would average empty tensors, the others the bf16 copies, and copy_to() would be lost at the next step."""
    stage, options = MANAGED[case]
    engine = make_engine(stage, **options)
    train(engine, range(1))
    targets: list[Any] = [engine.module, [engine.module], nn.Sequential(engine.module), engine.module.up]
    for target in targets:
        with pytest.raises(EMAEngineError, match="pass the engine"):
            ShardedEMA(target)
    ShardedEMA(engine)
    if stage < 3:  # a copy has weights of its own
        ShardedEMA(copy.deepcopy(engine.module))


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("case", MANAGED)
@pytest.mark.world_size(2)
def test_a_module_that_deepspeed_takes_later_is_noticed(case: str, started: bool) -> None:
    """The order of two lines in a script decided whether the masters were averaged."""
    stage, options = MANAGED[case]
    torch.manual_seed(7)
    model = Net()
    if options["dtype"] == "bf16":  # else the dtype tells
        model.bfloat16()
    ema = ShardedEMA(model)
    inner = ShardedEMA(nn.ModuleDict({"part": model}))
    if started:
        ema.update()
        inner.update()
    engine = make_engine(stage, model=model, **options)
    train(engine, range(1))
    for average in (ema, inner):
        with pytest.raises(EMAStateError, match="pass the engine"):
            average.update()
        assert average.num_updates == int(started)
        with pytest.raises(EMAEngineError, match="pass the engine"):
            average.reset()
        if started:
            with pytest.raises(EMAStateError, match="pass the engine"), average.average_parameters():
                pass


@pytest.mark.world_size(2)
def test_zero_init_makes_a_module_that_only_its_engine_shows() -> None:
    """transformers builds models so under ZeRO-3: every parameter is empty before there is an engine."""
    from support.zero_models import reset_deepspeed

    import deepspeed

    reset_deepspeed()
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 8, "zero_optimization": {"stage": 3}}):
        model = Net()
    with pytest.raises(EMAEngineError, match="pass the engine"):
        ShardedEMA(model)


@pytest.mark.world_size(2)
def test_plain_weights_inside_an_engine_are_averaged_with_a_warning() -> None:
    """ZeRO-0 in fp32 trains the module's own weights: the average is right, but whole on every rank."""
    engine = make_engine(0, "fp32")
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("dist_ema").addHandler(handler)
    try:
        unwrapped = ShardedEMA(engine.module, decay=0.5)
        assert sum("pass the engine" in record for record in records) == 1
        ema = ShardedEMA(engine, decay=0.5)
        ShardedEMA(Net())
        assert sum("pass the engine" in record for record in records) == 1
    finally:
        logging.getLogger("dist_ema").removeHandler(handler)
    for step in range(4):
        train(engine, range(step, step + 1))
        unwrapped.update()
        ema.update()
    assert unwrapped.fingerprint() == ema.fingerprint()
    assert ZeroEngine(engine).specs()
