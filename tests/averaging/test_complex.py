"""Complex parameters are averaged as pairs of real numbers, on every engine that can hold them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from support.models import CASES, build
from support.zero_models import make_engine

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from dist_ema import ShardedEMA, compute_ema, merge, read_checkpoint, verify_checkpoint
from dist_ema.errors import CheckpointMismatchError, EMAEngineError

DECAYS = {"fast": 0.5, "slow": 0.9}


class Waves(nn.Module):
    """A complex weight of rows that no world size divides, beside a real one."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.turns = nn.Parameter(torch.randn(5, 3, dtype=dtype, generator=generator))
        self.real = nn.Parameter(torch.randn(7, 2, generator=generator))
        self.register_buffer("phase", torch.randn(4, dtype=torch.complex64, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.turns * x).abs().sum() + self.real.sum()


@torch.no_grad()
def _train(model: nn.Module, dense: dict[str, torch.Tensor], step: int) -> None:
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "_local_tensor", parameter)
        factor = complex(1 + 0.25 * step, 0.5) if parameter.is_complex() else 1 + 0.25 * step
        local.mul_(factor)
        dense[name.removeprefix("module.")].mul_(factor)


def _averaged(case: str, options: dict[str, Any], dtype: torch.dtype = torch.complex64) -> tuple[Any, ...]:
    plain = Waves(dtype)
    dense = {name: value.detach().clone() for name, value in plain.named_parameters()}
    model = CASES[case].wrap(plain) if case == "ddp" else _wrapped(case, plain)
    ema = ShardedEMA(model, averages=DECAYS, **options)
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for step in range(4):
        ema.wait()  # an offloaded average has read the weights, which no optimizer writes here
        _train(model, dense, step)
        ema.update()
        for average, decay in DECAYS.items():
            wide = {name: value.to(torch.complex128) for name, value in dense.items()}
            before = expected.get(average, wide)
            expected[average] = {name: decay * before[name] + (1 - decay) * wide[name] for name in wide}
    return model, ema, dense, expected


def _wrapped(case: str, model: nn.Module) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if case == "plain":
        return model
    if case == "fsdp2":
        return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def _check(state: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        found = state[name]
        assert (found.dtype == torch.complex64) == (name == "turns"), (name, found.dtype)
        torch.testing.assert_close(found.to(torch.complex128), value, atol=1e-5, rtol=1e-5)


@pytest.mark.world_size()
@pytest.mark.parametrize("options", [{}, {"offload": "cpu"}], ids=["device", "host"])
@pytest.mark.parametrize(("case", "world_size"), [("plain", 1), ("ddp", 2), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)])
def test_the_average_is_the_dense_one(
    case: str, world_size: int, options: dict[str, Any], rank: int, tmp_path: Path
) -> None:
    _, ema, dense, expected = _averaged(case, options)
    for average in DECAYS:
        if state := ema.full_state_dict(average):
            _check(state, expected[average])
    before_visit = ema.state_dict(full=True, live=True).get("live", {})
    with ema.average_parameters("fast"):
        inside = ema.full_state_dict("fast")
    if rank == 0:
        _check(inside, expected["fast"])
    after_visit = ema.state_dict(full=True, live=True).get("live", {})
    assert all(torch.equal(after_visit[name], value) for name, value in before_visit.items()), "not bit for bit"
    distance = sum(float((expected["fast"][name] - value).abs().square().sum()) for name, value in dense.items())
    assert ema.metrics()["ema/fast/distance"] == pytest.approx(distance**0.5, rel=1e-4)

    ema.save(tmp_path / "c")
    before = ema.fingerprint("slow")
    ema.export(tmp_path / "e", name="slow")
    if rank == 0:
        verify_checkpoint(tmp_path / "c")
        _check(read_checkpoint(tmp_path / "c", "slow"), expected["slow"])
        exported = load_file(tmp_path / "e" / "model.safetensors")
        Waves().load_state_dict(exported)
        _check(exported, expected["slow"])
    ema.reset()
    ema.load(tmp_path / "c")
    assert ema.fingerprint("slow") == before
    # Any other world size and engine: this process alone.
    alone = ShardedEMA(Waves(), averages=DECAYS) if world_size == 1 else None
    if alone is not None:
        alone.load(tmp_path / "c")
        assert alone.fingerprint("slow") == before
    ema.copy_to("slow")
    assert ema.metrics()["ema/slow/distance"] == pytest.approx(0, abs=1e-6)


def test_a_nan_in_one_part_leaves_the_other(caplog: pytest.LogCaptureFixture) -> None:
    """The guard looks at each real number by itself, and counts it."""
    model = Waves()
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    before = ema.full_state_dict()["turns"].clone()
    with torch.no_grad():
        model.turns[1, 1] = complex(float("nan"), 8.0)
    ema.update()
    after = ema.full_state_dict()["turns"]
    assert after[1, 1].real == before[1, 1].real
    assert after[1, 1].imag == pytest.approx(0.5 * before[1, 1].imag.item() + 4.0)
    assert ema.metrics()["ema/skipped_elements"] == 1
    ema.reset()
    with caplog.at_level(logging.WARNING):
        ema.update()
    assert "'turns'" in caplog.text


def test_complex_weights_merge_and_blend(tmp_path: Path) -> None:
    for number in (1.0, 3.0):
        model = Waves()
        with torch.no_grad():
            model.turns.fill_(complex(number, -number))
        ema = ShardedEMA(model, decay=0.5)
        ema.update()
        ema.save(tmp_path / f"{number:g}")
    merge([tmp_path / "1", tmp_path / "3"], tmp_path / "out", weights=[0.5, 0.5])
    merged = load_file(tmp_path / "out" / "model.safetensors")["turns"]
    assert torch.equal(merged, torch.full((5, 3), complex(2.0, -2.0), dtype=torch.complex64))
    average, live = Waves(), Waves()
    with torch.no_grad():
        live.turns.add_(complex(4.0, 8.0))
    expected = 0.75 * average.turns.detach() + 0.25 * live.turns.detach()
    compute_ema(live, average, smoothing=0.75)
    torch.testing.assert_close(average.turns.detach(), expected)


def test_a_teacher_holds_complex_weights() -> None:
    student, teacher = Waves(), Waves().requires_grad_(False)
    ema = ShardedEMA(student, into=teacher, decay=0.5)
    ema.update()
    with torch.no_grad():
        student.turns.add_(complex(2.0, 4.0))
    ema.update()
    torch.testing.assert_close(teacher.turns, student.turns.detach() - complex(1.0, 2.0))


def test_double_precision_is_averaged_in_single(tmp_path: Path) -> None:
    """As real weights are, whose shadow is fp32 unless told otherwise."""
    model = Waves(torch.complex128)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    assert ema.full_state_dict()["turns"].dtype == torch.complex64
    before = model.turns.detach().clone()
    with ema.average_parameters():
        torch.testing.assert_close(model.turns.detach(), before, atol=1e-6, rtol=1e-6)
    assert torch.equal(model.turns.detach(), before)


def test_a_complex_average_does_not_load_into_a_real_one(tmp_path: Path) -> None:
    """Half of it would be dropped."""
    ema = ShardedEMA(Waves(), decay=0.5)
    ema.update()
    ema.save(tmp_path / "c")
    real = Waves()
    real.turns = nn.Parameter(torch.ones(5, 3))
    with pytest.raises(CheckpointMismatchError, match=r"'turns'.*complex64"):
        ShardedEMA(real, decay=0.5).load(tmp_path / "c")


def test_real_models_take_no_notice() -> None:
    ema = ShardedEMA(build(), decay=0.5)
    ema.update()
    assert not ema._average.shadow._complex


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.world_size(2)
def test_zero_is_refused_since_it_drops_imaginary_parts(stage: int) -> None:
    """The update failed inside of torch. FSDP1 and ZeRO-3 refuse complex parameters themselves."""
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 5))
    model.phase = nn.Parameter(torch.ones(6, 5, dtype=torch.complex64))
    engine = make_engine(stage, model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    message = r"parameter 'phase' is torch[.]complex64: DeepSpeed keeps only the real parts"
    with pytest.raises(EMAEngineError, match=message):
        ShardedEMA(engine, decay=0.5)
