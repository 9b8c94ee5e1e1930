"""bf16 averages, rounded stochastically: unbiased, and of the same bits however they are computed, sharded, resumed."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

from support.models import CASES

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ema import ShardedEMA, kernels
from dist_ema.errors import CheckpointCorruptError
from dist_ema.formats import manifest as format_
from dist_ema.formats.manifest import NAME, Manifest
from dist_ema.geometry.runs import Rows, Runs
from dist_ema.kernels import native
from dist_ema.kernels.rounding import ElementPositions, Rounding, average_key, draws, element_key, rounded

pytestmark = pytest.mark.core

BF16 = torch.bfloat16
NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# The formula.


def test_every_value_goes_up_as_often_as_its_cut_bits_say() -> None:
    """Both signs, subnormal numbers, and what bf16 has, which must stay; over all 65,536 random numbers."""
    every = torch.arange(1 << 16, dtype=torch.int32)
    for value in (1.001, -1.001, 3e-39, -3e-39, 1.0, -2.0, 0.0, 65280.0, 1e-45):
        exact = torch.tensor(value, dtype=torch.float32)
        found = rounded(exact.expand(1 << 16).clone(), every).double()
        assert abs(found.mean() - exact.double()) < 1e-9 * abs(exact.double()) + 1e-300, value
        assert found.unique().numel() == (1 if exact.to(BF16).float() == exact else 2)


def test_nan_stays_nan_and_nothing_finite_becomes_infinite() -> None:
    """The random bits are added to the pattern: they would carry a NaN to -0, and the largest number to Inf."""
    patterns = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    large = torch.tensor([3.4028e38, -3.4028e38])
    for draw in (0, 1, 0xFFFF):
        some = torch.tensor(draw, dtype=torch.int32)
        assert rounded(patterns, some.expand(4)).isnan().all()
        assert rounded(large, some.expand(2)).isfinite().all()
        assert rounded(torch.tensor([INF, -INF]), some.expand(2)).tolist() == [INF, -INF]


def test_random_bits_are_uniform_and_independent_of_position_update_and_name() -> None:
    positions = torch.arange(1 << 16) + (1 << 33) - 1000
    keys = [
        element_key(ElementPositions([name], [()]).names[0], average_key(0, n, "ema")) for name in "ab" for n in (1, 2)
    ]
    columns = torch.stack([draws(positions, key).double() / 65536 for key in keys])
    assert abs(columns.mean() - 0.5) < 0.003
    correlations = torch.corrcoef(torch.cat([columns, columns.roll(1, dims=1)])) - torch.eye(8)
    assert correlations.abs().max() < 0.02  # 5 standard deviations


# The kernels.


def _blend(
    chosen: native.Library | None,
    averages: list[list[Tensor]],
    sources: list[Tensor],
    ranges: list[tuple[int, int]],
    places: ElementPositions,
    guarded: bool,
    weights: list[float],
) -> tuple[list[list[Tensor]], int]:
    averages = [[shadow.clone() for shadow in average] for average in averages]
    guard = kernels.Guard() if guarded else None
    rounding = Rounding(places, [average_key(7, 3, str(number)) for number in range(len(averages))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_decided", [chosen])
        kernels.lerp(averages, sources, ranges, weights, kernels.Scratch(), guard, rounding)
    return averages, guard.total() if guard is not None else 0


def _bits(averages: list[list[Tensor]]) -> Tensor:
    """All NaN are one, and zeros whatever their sign."""
    values = torch.cat([shadow for average in averages for shadow in average])
    values[values.isnan()] = NAN
    return torch.where(values == 0, 0.0, values).to(BF16).view(torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guarded", [True, False])
def test_compiled_gives_the_eager_bits(dtype: torch.dtype, guarded: bool) -> None:
    """Short and long runs, positions past 2**32, ranges of sources, NaN and Inf on both sides."""
    kernel = native.build()
    torch.manual_seed(0)
    runs: list[Runs] = [
        ((5, 70_001),),
        (),
        tuple((2**32 - 300 + 7 * row, 3) for row in range(700)),
        Rows(11, 64, 100, 50),
        ((2**40, 1),),
    ]
    sizes = [sum(length for _, length in found) for found in runs]
    places = ElementPositions([f"layer.{number}" for number in range(5)], runs)
    sources = [torch.randn(size + 9).to(dtype) for size in sizes]
    ranges = [(4, 4 + size) for size in sizes]
    averages = [[torch.randn(size).to(BF16) for size in sizes] for _ in range(2)]
    for tensor in (*sources, *averages[0]):
        tensor[torch.rand(tensor.shape) < 0.01] = NAN
        tensor[torch.rand(tensor.shape) < 0.01] = INF
    for weights in ([0.0, 1e-4], [0.5, 0.3], [0.7, 1.0]):
        compiled, skipped = _blend(kernel, averages, sources, ranges, places, guarded, weights)
        eager, expected = _blend(None, averages, sources, ranges, places, guarded, weights)
        assert torch.equal(_bits(compiled), _bits(eager)), weights
        assert skipped == expected
        assert (skipped > 100) == guarded
        for average, before in zip(compiled, averages, strict=True):
            for shadow, old, source, (start, stop) in zip(average, before, sources, ranges, strict=True):
                finite = source[start:stop].isfinite()
                if guarded:
                    assert torch.equal(shadow[~finite].view(torch.int16), old[~finite].view(torch.int16))
                    assert shadow[finite].isfinite().all()


@pytest.mark.parametrize("route", ["compiled", "eager"])
def test_pieces_of_a_tensor_are_rounded_as_the_whole(route: str) -> None:
    """Ranks hold pieces; so do the chunks of an update."""
    kernel = native.build() if route == "compiled" else None
    source, shadow = torch.randn(100_000), torch.randn(100_000).to(BF16)
    whole = ElementPositions(["w"], [((0, 100_000),)])
    ((expected,),), _ = _blend(kernel, [[shadow]], [source], [(0, 100_000)], whole, True, [0.01])
    cuts = [0, 1, 33_333, 70_001, 100_000]
    for start, stop in itertools.pairwise(cuts):
        part = ElementPositions(["w"], [((start, stop - start),)])
        ((found,),), _ = _blend(kernel, [[shadow[start:stop]]], [source], [(start, stop)], part, True, [0.01])
        assert torch.equal(found, expected[start:stop])
    assert not torch.equal(expected, shadow.float().lerp(source, 0.01).to(BF16))


# Averages.


def test_drift_below_the_last_bit_is_followed_without_bias() -> None:
    """Rounded to nearest, the average would not move at all: each step is a hundredth of half its last bit at most."""
    model = nn.Linear(64, 64, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = ShardedEMA(model, decay=0.99, dtype=BF16)
    nearest = torch.ones(64, 64, dtype=BF16)
    exact = 1.0
    ema.update()
    for step in range(300):
        live = 1.0 + 2**-8 * min(step / 100, 1)
        nn.init.constant_(model.weight, live)
        ema.update()
        exact = 0.99 * exact + 0.01 * live
        nearest = nearest.float().lerp(model.weight, 0.01).to(BF16).detach()
    found = ema.full_state_dict()["weight"]
    assert found.dtype == BF16
    assert torch.equal(nearest, torch.ones_like(nearest))
    error = found.double().mean() - exact
    deviation = found.double().std() / 64  # of the mean of 4096 independent elements
    assert found.unique().numel() >= 2
    assert abs(error) < 4 * deviation < 2**-8 / 10


def _train(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.0 + 0.01 * (step + 1))


@pytest.mark.world_size()
@pytest.mark.parametrize(
    ("case", "world_size"),
    [("fsdp2", 1), ("fsdp2", 2), ("fsdp2", 3), ("fsdp1-full", 2), ("ddp", 3), ("tp", 2)],
)
def test_bits_do_not_depend_on_sharding(case: str, rank: int, world_size: int, tmp_path: Path) -> None:
    """One process, FSDP, DDP and tensor parallelism; the evaluation in between; a checkpoint of one in the other."""
    spec = CASES[case]
    model, plain = spec.model(), spec.plain()
    averages = {"fast": 0.9, "slow": 0.999}
    ema, single = ShardedEMA(model, averages=averages, dtype=BF16), ShardedEMA(plain, averages=averages, dtype=BF16)
    for step in range(3):
        for one, average in ((model, ema), (plain, single)):
            _train(one, step)
            average.update()
        with ema.average_parameters("fast"):
            pass
    for name in averages:
        assert ema.fingerprint(name) == single.fingerprint(name)
    ema.save(tmp_path / "c")
    other = ShardedEMA(plain, averages=averages, dtype=BF16, seed=5)
    other.load(tmp_path / "c")
    for one, average in ((model, ema), (plain, other)):
        _train(one, 4)
        average.update()
    assert ema.fingerprint("slow") == other.fingerprint("slow")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 30))


def _run(ema: ShardedEMA, model: nn.Module, steps: range) -> dict[str, int]:
    for step in steps:
        _train(model, step)
        ema.update()
        ema.wait()  # an offloaded average reads the weights that are written by hand next
    return ema.fingerprint()


@pytest.mark.parametrize("offload", [None, "cpu"])
def test_resumed_run_has_the_bits_of_the_uninterrupted_one(
    offload: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The seed is the checkpoint's; the number of the update goes on."""
    caplog.set_level(logging.INFO, "dist_ema.core.average")
    options = {"decay": 0.99, "dtype": BF16, "offload": offload}
    model = _model()
    ema = ShardedEMA(model, seed=11, **options)
    _run(ema, model, range(3))
    ema.save(tmp_path / "c")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _run(ema, model, range(3, 6))
    for seed in (11, 12):
        model.load_state_dict(weights)
        resumed = ShardedEMA(model, seed=seed, **options)
        resumed.load(tmp_path / "c")
        assert _run(resumed, model, range(3, 6)) == expected
    assert "saved with seed=11. It continues with that seed, not with seed=12" in caplog.text
    model.load_state_dict(weights)
    restored = ShardedEMA(model, seed=13, **options)
    twin = ShardedEMA(model, seed=13, **options)
    twin.load(tmp_path / "c")
    restored.load_state_dict(twin.state_dict())
    assert _run(restored, model, range(3, 6)) == expected


def test_seeds_and_averages_are_rounded_differently_and_a_seed_always_alike() -> None:
    """Averages with one error in common would not tell of each other."""
    states = []
    for seed in (0, 0, 1):
        model = _model()
        ema = ShardedEMA(model, averages={"a": 0.9, "b": 0.9}, dtype=BF16, seed=seed)
        for step in range(3):
            _train(model, step)
            ema.update()
        states += [ema.full_state_dict(name)["0.weight"] for name in "ab"]
    a, b, again, _, other, _ = states
    assert torch.equal(a, again)
    assert (a != b).float().mean() > 0.2
    assert (a != other).float().mean() > 0.2


def test_first_copy_is_exact_where_it_can_be() -> None:
    model = nn.Linear(200, 100)
    ema = ShardedEMA(model.to(BF16), dtype=BF16)
    ema.update()
    assert torch.equal(ema.full_state_dict()["weight"], model.weight)
    model.float()
    nn.init.constant_(model.weight, 1.001)
    ema.reset()
    ema.update()
    found = ema.full_state_dict()["weight"].double()
    assert abs(found.mean() - 1.001) < 1e-4  # to nearest it would be 1 everywhere


@torch.no_grad()
def test_everything_else_takes_a_bf16_average(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Swaps, copies, exports, checkpoints, reports, NaN: from fp32 weights, and half as large."""
    model = _model()
    ema, wide = ShardedEMA(model, decay=0.5, dtype=BF16), ShardedEMA(model, decay=0.5)
    assert "stops moving" not in caplog.text
    for one in (ema, wide):
        one.update()
    before = ema.full_state_dict()["0.weight"]
    model[0].weight[0, 0] = NAN
    model[0].weight[1:] *= 2
    for one in (ema, wide):
        one.update()
    state = ema.full_state_dict()
    assert state["0.weight"][0, 0] == before[0, 0]
    assert state["0.weight"].isfinite().all()
    assert ema.metrics()["ema/skipped_elements"] == 1
    torch.testing.assert_close(state["0.weight"].float(), wide.full_state_dict()["0.weight"], rtol=2**-6, atol=0)
    live = {name: value.clone() for name, value in model.state_dict().items()}
    with ema.average_parameters():
        assert torch.equal(model[0].weight, state["0.weight"].float())
    assert all(torch.equal(value.nan_to_num(), live[name].nan_to_num()) for name, value in model.state_dict().items())
    ema.save(tmp_path / "c")
    assert Manifest.from_bytes((tmp_path / "c" / NAME).read_bytes()).seed == 0
    ema.export(tmp_path / "e", dtype=BF16)
    assert torch.equal(load_file(tmp_path / "e" / "model.safetensors")["0.weight"], state["0.weight"])
    sizes = [sum(one._average.shadow.nbytes().values()) for one in (ema, wide)]
    assert 2 * sizes[0] == sizes[1]
    ema.copy_to()
    assert torch.equal(model[0].weight, state["0.weight"].float())


def test_manifest_with_a_seed_that_is_none_or_with_more_is_refused(tmp_path: Path) -> None:
    """Whoever adds to the format has to give it another version."""
    model = _model()
    ema = ShardedEMA(model, dtype=BF16, seed=(1 << 63) - 1)
    ema.update()
    ema.save(tmp_path / "c")
    manifest = Manifest.from_bytes((tmp_path / "c" / NAME).read_bytes())
    assert manifest.seed == (1 << 63) - 1
    body = format_._unseal(manifest.to_bytes())
    for changed in ({"seed": -1}, {"seed": True}, {"seed": "1"}, {"seed": None}, {"seed": 1 << 63}, {"sede": 1}):
        with pytest.raises(CheckpointCorruptError):
            Manifest.from_bytes(format_._seal({**body, **changed}))
