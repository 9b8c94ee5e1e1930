"""DeepSpeed's further ways of training, one real run each, against the dense average of its own master weights."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from support.oracle import DenseAverage
from support.zero_models import Net, make_engine, reset_deepspeed, train

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dist_ema import ShardedEMA
from dist_ema.errors import EMAEngineError


def masters(engine: Any) -> dict[str, Tensor]:
    """Full fp32 masters as DeepSpeed finds them."""
    from deepspeed.utils import safe_get_full_fp32_param

    return {  # tied weights under their first name
        name: safe_get_full_fp32_param(parameter).clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def average(engine: Any) -> tuple[ShardedEMA, DenseAverage]:
    """Both averages of the engine."""
    return ShardedEMA(engine, decay=0.6), DenseAverage(set(masters(engine)), 0.6)


def follow(engine: Any, ema: ShardedEMA, oracle: DenseAverage, steps: range) -> None:
    for step in steps:
        train(engine, range(step, step + 1))
        assert ema.update()
        oracle.update(masters(engine))


def check(ema: ShardedEMA, oracle: DenseAverage) -> None:
    state = ema.full_state_dict()
    if dist.get_rank() == 0:
        oracle.check({name: state[name] for name in oracle.average})


@pytest.mark.world_size(2)
def test_weights_made_by_zero_init() -> None:
    """They are partitioned before there is an engine."""
    import deepspeed

    reset_deepspeed()
    config = {"train_batch_size": 8, "zero_optimization": {"stage": 3}, "bf16": {"enabled": True}}
    torch.manual_seed(7)
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = Net()
    engine = make_engine(3, "bf16", model=model)
    ema, oracle = average(engine)
    follow(engine, ema, oracle, range(4))
    check(ema, oracle)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.world_size(2)
def test_muon(stage: int) -> None:
    """DeepSpeed splits the parameters into other groups for it, and exchanges parts of matrices at every step."""
    import deepspeed

    reset_deepspeed()
    torch.manual_seed(7)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_scatter": False},
        "optimizer": {"type": "Muon", "params": {"lr": 0.02, "torch_adam": True}},
        "zero_allow_untested_optimizer": True,
    }
    engine = deepspeed.initialize(model=Net(), config=config, dist_init_required=False)[0]
    assert {group["use_muon"] for group in engine.basic_optimizer.param_groups} == {True, False}
    ema, oracle = average(engine)
    with torch.compiler.set_stance("force_eager"):  # compiling takes longer than all else
        follow(engine, ema, oracle, range(4))
    check(ema, oracle)


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.world_size(2)
def test_a_universal_checkpoint(stage: int, rank: int, tmp_path: Path) -> None:
    """Loading one writes new masters below an average that goes on, and is no step."""
    engine = make_engine(stage, "bf16")
    ema, oracle = average(engine)
    follow(engine, ema, oracle, range(3))
    engine.save_checkpoint(str(tmp_path / "native"), tag="step3")
    ema.save(tmp_path / "ema")
    saved = masters(engine)
    if rank == 0:
        to_universal(tmp_path / "native" / "step3", tmp_path / "native" / "step3_universal")
        (tmp_path / "native" / "latest_universal").write_text("step3_universal")
    dist.barrier()

    engine = make_engine(stage, "bf16", checkpoint={"load_universal": True})
    ema = ShardedEMA(engine, decay=0.6)
    train(engine, range(90, 91))
    ema.update()
    engine.load_checkpoint(str(tmp_path / "native"), tag="step3_universal")
    ema.load(tmp_path / "ema")
    assert not ema.update(), "loading counted as a step"
    check(ema, oracle)
    loaded = masters(engine)
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    follow(engine, ema, oracle, range(3, 5))
    check(ema, oracle)


def to_universal(source: Path, target: Path) -> None:
    """What ``ds_to_universal.py`` does, in this process."""
    from deepspeed.checkpoint.ds_to_universal import main

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    target.mkdir()
    main(Namespace(input_folder=str(source), output_folder=str(target), inject_missing_state=True, **options))


@pytest.mark.parametrize("flag", ["swap_optimizer", "params_in_nvme_and_cpu"])
@pytest.mark.world_size(2)
def test_nvme_offload_is_refused_before_training(flag: str) -> None:
    """The masters would be in files when the average reads them. (DeepSpeed's NVMe offload itself needs libaio.)"""
    engine = make_engine(3, "bf16")
    setattr(engine.optimizer, flag, True)
    with pytest.raises(EMAEngineError, match=r"offload.*\"nvme\".*use device \"cpu\" or \"none\""):
        ShardedEMA(engine)
