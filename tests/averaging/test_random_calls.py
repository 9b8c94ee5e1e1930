"""Random sequences of calls on every engine, against a dense float64 average.

Each sequence trains, flips ``requires_grad``, grows a buffer, keeps state dicts, writes weights inside of
``average_parameters()``, and mixes background saves with exports, loads and resets. After each call the averages and
the live weights have to be those of :class:`Oracle`, which holds everything dense, in one place and in float64.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

from support.exports import read
from support.models import CASES, build
from support.zero_models import make_engine

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_ema import ShardedEMA
from dist_ema.errors import EMAStateError

DECAYS = {"fast": 0.5, "slow": 0.9}
#: Calls of one sequence.
CALLS = 24
#: Modules of the model whose flags are flipped together.
PARTS = ("embed", "module.0", "module.1.up", "one", "frozen", "norm")


class Oracle:
    """Everything dense, on one rank: what the live weights and the averages have to be.

    Attributes:
        live: the weights and buffers that train, in their own dtype.
        averages: of each average, the float64 values of what has joined it; empty before the first update.
        trained: parameters that require a gradient (under DeepSpeed: that are in the optimizer).
    """

    def __init__(self, model: nn.Module, buffers: str, flags_count: bool) -> None:
        self.live = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.parameters = {name for name, _ in model.named_parameters()}
        self.trained = {name for name, value in model.named_parameters() if value.requires_grad}
        self.tied = {"head.weight": "embed.weight"}
        self.buffers = buffers
        self.flags_count = flags_count
        self.averages: dict[str, dict[str, Tensor]] = {}
        self.updates = 0

    def update(self) -> None:
        for average, decay in DECAYS.items():
            before = self.averages.get(average, {})
            after = {}
            for name, value in self.live.items():
                if name in self.tied:
                    continue
                if name in self.parameters:
                    if name in before:
                        after[name] = decay * before[name] + (1 - decay) * value.double()
                    elif name in self.trained:
                        after[name] = value.double()
                elif self.buffers != "ignore":
                    averaged = self.buffers == "average" and value.is_floating_point()
                    fits = name in before and before[name].shape == value.shape
                    if averaged and fits:
                        after[name] = decay * before[name] + (1 - decay) * value.double()
                    else:
                        after[name] = value.double() if averaged else value.clone()
            self.averages[average] = after
        self.updates += 1

    def expected(self, average: str) -> dict[str, Tensor]:
        """What ``full_state_dict()`` has to return."""
        found = self.live | self.averages.get(average, {})
        return found | {name: found[source] for name, source in self.tied.items()}

    def copy(self) -> Oracle:
        return deepcopy(self)


class Run:
    """One average on one engine, and the oracle that follows it."""

    def __init__(self, case: str, buffers: str, options: dict[str, Any], folder: Path, seed: int) -> None:
        self.random = random.Random(seed)
        self.folder = folder
        self.zero = case.startswith("zero")
        model = build(scalar=False, hidden=12)
        model.register_buffer("bank", torch.arange(6.0).view(2, 3))
        self.inner = model
        self.oracle = Oracle(model, buffers, flags_count=not self.zero)
        target = make_engine(int(case[-1]), model=model) if self.zero else CASES[case].wrap(model)
        self.target = target
        self.ema = ShardedEMA(target, averages=DECAYS, buffers=buffers, **options)
        if self.zero:  # nothing is stepped here: this is not about DeepSpeed's steps
            self.ema._average.engine.stepped = lambda: True  # type: ignore[method-assign]
        self.can_flip = not self.zero and case not in ("fsdp1-full",)  # a flat parameter has one flag
        self.held: list[tuple[list[Tensor], list[Tensor]]] = []
        self.saved: list[tuple[Path, Oracle]] = []
        self.rank = dist.get_rank()
        self.log: list[str] = []

    # What happens to the model.

    @torch.no_grad()
    def train(self) -> None:
        """Moves each trained weight by a factor of its own, the same bits on any shard; then updates."""
        factors = {name: 1 + self.random.randint(-8, 8) / 64 for name in sorted(self.oracle.trained)}
        engine = self.ema._average.engine
        engine.reshard()
        for share, source in zip(self.ema._average.shares, engine.sources(), strict=True):
            if share.spec.name in factors:
                source.mul_(factors[share.spec.name])
        engine.publish()
        for name, factor in factors.items():
            self.oracle.live[name].mul_(factor)
        for name, source in self.oracle.tied.items():
            self.oracle.live[name] = self.oracle.live[source]
        self.inner.norm.running_mean.add_(0.25)
        self.oracle.live["norm.running_mean"] += 0.25
        self.inner.norm.num_batches_tracked.add_(1)
        self.oracle.live["norm.num_batches_tracked"] += 1
        assert self.ema.update()
        self.oracle.update()

    def flip(self) -> None:
        """Freezes or unfreezes a part of the model, as GAN loops, PEFT and gradual unfreezing do."""
        part = self.random.choice(PARTS)
        flag = self.random.random() < 0.5
        if not self.can_flip:
            return
        self.ema._average.engine.reshard()  # after a forward FSDP2's flags would not reach the sharded parameters
        for parameter in _submodule(self.inner, part).parameters():
            parameter.requires_grad_(flag)
        for name in self.oracle.parameters:
            if name.startswith(f"{part}."):
                (self.oracle.trained.add if flag else self.oracle.trained.discard)(name)
        if not self.oracle.trained:
            self.flip()

    def grow(self) -> None:
        """A memory bank gets longer."""
        owner = self.inner
        rows = owner.bank.shape[0] + self.random.randint(-1, 2)
        owner.bank = torch.arange(3.0 * max(rows, 1)).view(-1, 3) + self.random.randint(0, 9)
        self.oracle.live["bank"] = owner.bank.clone()

    # Calls.

    def hold(self) -> None:
        """Keeps a state dict, as an asynchronous checkpoint writer does."""
        tensors = _boxed(self.ema.state_dict())
        self.held.append((tensors, [tensor.clone() for tensor in tensors]))
        if len(self.held) > 2:
            del self.held[0]

    def look(self) -> None:
        """Computes with the average: live weights are back afterwards."""
        average = self.random.choice(list(DECAYS))
        with self.ema.average_parameters(average):
            self.check_average(average)
        self.check_live()

    def write_inside(self) -> None:
        """Something writes into the model inside of the block: it is an error, and no live weight changes."""
        if not self.oracle.updates or self.zero:  # under ZeRO the model's own weights are no sources
            return
        joined = self.oracle.averages["fast"].keys() & self.oracle.parameters
        with (
            pytest.raises(EMAStateError, match="written inside average_parameters"),
            torch.no_grad(),
            self.ema.average_parameters("fast"),
        ):
            for share, source in zip(self.ema._average.shares, self.ema._average.engine.sources(), strict=True):
                if share.spec.name in joined:
                    source.mul_(2)
        with pytest.raises(EMAStateError):
            self.ema.save(self.folder / "refused")
        fitting = [one for one in self.saved if self._fits(one[1])]  # else load() does nothing
        if fitting and self.random.random() < 0.5:
            self.load()
        else:
            self.reset()
        self.check_live()

    def save(self) -> None:
        """Saves in the background, and exports at once."""
        path = self.folder / f"save-{self.random.randint(0, 2)}"
        self.saved = [(known, oracle) for known, oracle in self.saved if known != path]
        block = self.random.random() < 0.5
        self.ema.save(path, block=block)
        if not block:
            self.export()
        self.saved.append((path, self.oracle.copy()))

    def export(self) -> None:
        average = self.random.choice(list(DECAYS))
        path = self.folder / "export"
        self.ema.export(path, name=average, dtype=torch.float32)
        if self.rank == 0:
            _compare(read(path), self.oracle.expected(average))
            shutil.rmtree(path)
        dist.barrier()

    def load(self) -> None:
        """Goes back to an earlier average. What has joined since starts from the value that was saved."""
        fitting = [one for one in self.saved if self._fits(one[1])]
        if not fitting:
            return
        path, saved = self.random.choice(fitting)
        self.ema.load(path)
        oracle = self.oracle
        joined = set(oracle.averages.get("fast", {})) if oracle.updates else None
        oracle.updates = saved.updates
        if not saved.updates:
            oracle.averages = {}
            return
        oracle.averages = {}
        for average in DECAYS:
            values = saved.expected(average)
            names = set(saved.averages[average]) | (joined or set()) | (oracle.trained & oracle.parameters)
            oracle.averages[average] = {
                name: values[name].double()
                if values[name].is_floating_point() and name in self._averaged()
                else values[name]
                for name in names
            }

    def _averaged(self) -> set[str]:
        floats = {name for name, value in self.oracle.live.items() if value.is_floating_point()}
        return floats if self.oracle.buffers == "average" else floats & self.oracle.parameters

    def _fits(self, saved: Oracle) -> bool:
        """Whether a save has the shapes of now, and no average that this object does not keep."""
        here = self.oracle
        if saved.live["bank"].shape != here.live["bank"].shape:
            return False
        kept = set(here.averages.get("fast", {})) | here.trained
        return set(saved.averages.get("fast", {})) & here.parameters <= kept

    def reset(self) -> None:
        self.ema.reset()
        self.oracle.averages, self.oracle.updates = {}, 0

    def rebind(self) -> None:
        """Goes on with the same model. What was unfrozen joins, and a resized buffer starts anew, without an update."""
        self.ema.rebind(self.target)
        for values in self.oracle.averages.values():
            for name, value in self.oracle.live.items():
                joins = name in self.oracle.trained and name not in values and name not in self.oracle.tied
                if joins or (name in values and values[name].shape != value.shape):
                    values[name] = value.double() if name in self._averaged() else value.clone()
        if self.zero:
            self.ema._average.engine.stepped = lambda: True  # type: ignore[method-assign]

    def copy_to(self) -> None:
        average, fraction = self.random.choice(list(DECAYS)), self.random.choice([0.25, 1.0])
        self.ema.copy_to(average, fraction=fraction)
        live = self.oracle.live
        for name, value in self.oracle.averages.get(average, {}).items():
            if fraction == 1:
                live[name] = value.to(live[name].dtype)
            elif name in self._averaged() and value.shape == live[name].shape:
                live[name] = (live[name].double() + fraction * (value - live[name].double())).to(live[name].dtype)
        for name, source in self.oracle.tied.items():
            self.oracle.live[name] = self.oracle.live[source]

    def stream(self) -> None:
        average = self.random.choice(list(DECAYS))
        _compare(dict(self.ema.iter_full_tensors(average)), self.oracle.expected(average))

    # Checks.

    def check(self) -> None:
        assert self.ema.num_updates == self.oracle.updates
        self.check_average(self.random.choice(list(DECAYS)))
        self.check_live()
        for tensors, copies in self.held:
            for tensor, copy in zip(tensors, copies, strict=True):
                assert torch.equal(tensor, copy), "a state dict that is still held has changed"

    def check_average(self, average: str) -> None:
        state = self.ema.full_state_dict(average)
        if self.rank == 0:
            _compare(state, self.oracle.expected(average))

    def check_live(self) -> None:
        # A buffer that was resized since the last update has no live values in a state dict.
        live = self.ema.state_dict(full=True, live=True).get("live", {})
        for name, value in live.items():
            torch.testing.assert_close(
                value, self.oracle.live[name], atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )
        # Rounding adds up differently: from here on both go on from the same bits.
        values: list[Any] = [live]
        dist.broadcast_object_list(values, src=0)
        self.oracle.live |= values[0]
        for name, source in self.oracle.tied.items():
            self.oracle.live[name] = self.oracle.live[source]


def _submodule(model: nn.Module, name: str) -> nn.Module:
    found = model
    for key in name.split("."):
        found = getattr(found, key)
        found = getattr(found, "_fsdp_wrapped_module", found)
    return found


def _boxed(state: object) -> list[Tensor]:
    """The tensors of this rank's parts in a state dict."""
    if isinstance(state, dict):
        return [tensor for value in state.values() for tensor in _boxed(value)]
    held = getattr(state, "held", None)
    return [held] if isinstance(held, Tensor) else []


def _compare(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys(), state.keys() ^ expected.keys()
    for name, value in expected.items():
        found = state[name]
        assert found.shape == value.shape, (name, found.shape, value.shape)
        different = (found.double() - value.double()).abs() > 1e-6 + 1e-5 * value.double().abs()
        assert not different.any(), f"{name} differs in {int(different.sum())} elements"


WEIGHTS: dict[str, int] = {
    "train": 8,
    "flip": 4,
    "grow": 2,
    "hold": 2,
    "look": 2,
    "write_inside": 1,
    "save": 3,
    "load": 2,
    "export": 1,
    "reset": 1,
    "rebind": 1,
    "copy_to": 1,
    "stream": 1,
}


def play(case: str, buffers: str, options: dict[str, Any], folder: Path, seed: int) -> None:
    """One sequence. A failure names the calls that led to it."""
    run = Run(case, buffers, options, folder, seed)
    chosen = random.Random(seed + 1).choices(list(WEIGHTS), list(WEIGHTS.values()), k=CALLS)
    done: list[str] = []
    for name in ["train", *chosen]:
        done.append(name)
        call: Callable[[], None] = getattr(run, name)
        try:
            call()
            run.check()
        except BaseException as error:
            raise AssertionError(f"seed {seed}, {case}, buffers={buffers}, {options}: {' '.join(done)}") from error
    run.ema.close()


#: Each engine, mode of buffers and place of the shadow once, in every run of the suite.
SHORT = [
    ("plain", 1, "average", {}),
    ("ddp", 2, "copy", {}),
    ("fsdp1-full", 2, "copy", {"offload": "cpu"}),
    ("fsdp1-full-orig", 3, "ignore", {}),
    ("fsdp2", 3, "average", {}),
    ("hsdp", 4, "copy", {}),
    ("tp", 2, "copy", {"offload": "cpu"}),
    ("fsdp2-tp", 4, "ignore", {}),
    ("zero1", 2, "copy", {}),
    ("zero2", 2, "ignore", {}),
    ("zero3", 2, "copy", {}),
]
#: Seeds of the long form, for each of them: 330 sequences.
LONG_SEEDS = range(2, 32)


def _ids(value: object) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "world_size", "buffers", "options"), SHORT, ids=_ids)
def test_random_calls_give_the_dense_average(
    case: str, world_size: int, buffers: str, options: dict[str, Any], tmp_path: Path
) -> None:
    play(case, buffers, options, tmp_path, seed=1)


@pytest.mark.long
@pytest.mark.world_size()
@pytest.mark.parametrize("seed", LONG_SEEDS)
@pytest.mark.parametrize(("case", "world_size", "buffers", "options"), SHORT, ids=_ids)
def test_many_random_calls_give_the_dense_average(
    case: str, world_size: int, buffers: str, options: dict[str, Any], seed: int, tmp_path: Path
) -> None:
    play(case, buffers, options, tmp_path, seed=seed)
