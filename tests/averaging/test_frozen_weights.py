"""Frozen weights that are left out, since nobody needs them twice, or since they cannot be read by ranges."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from support.exports import DECAY, average, everywhere, perturb
from support.models import CASES
from support.oracle import DenseAverage

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ema import ShardedEMA, read_checkpoint, verify_checkpoint
from dist_ema.cli import main
from dist_ema.errors import CheckpointCorruptError, CheckpointMismatchError, EMAStateError
from dist_ema.formats.manifest import Manifest


class Int8(Tensor):
    """A weight as eight-bit numbers and scales, which computes as the float tensor of its shape (torchao's design)."""

    @staticmethod
    def __new__(cls: type[Int8], numbers: Tensor, scales: Tensor) -> Int8:
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scales.dtype)

    def __init__(self, numbers: Tensor, scales: Tensor) -> None:
        self.numbers, self.scales = numbers, scales

    @classmethod
    def quantise(cls, weight: Tensor) -> Int8:
        scales = weight.detach().abs().amax(1, keepdim=True) / 127
        return cls((weight.detach() / scales).round().to(torch.int8), scales)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping | None = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scales)
        if func in (torch.ops.aten.mm.default, torch.ops.aten.t.default, torch.ops.aten.addmm.default):
            return func(*[one.numbers * one.scales if isinstance(one, Int8) else one for one in args])
        raise NotImplementedError(f"{func} of an Int8")


class Adapted(nn.Module):
    """A frozen quantised layer and a low-rank update of it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(6, 5, bias=False)
        self.base.weight = nn.Parameter(Int8.quantise(self.base.weight), requires_grad=False)
        self.lora_a = nn.Linear(6, 2, bias=False)
        self.lora_b = nn.Linear(2, 5, bias=False)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_b(self.lora_a(x))


def _trained() -> tuple[ShardedEMA, DenseAverage, Adapted]:
    torch.manual_seed(0)
    model = Adapted()
    names = {"lora_a.weight", "lora_b.weight"}
    ema, oracle = ShardedEMA(model, decay=DECAY), DenseAverage(names, DECAY)
    optimizer = torch.optim.SGD([model.lora_a.weight, model.lora_b.weight], lr=0.1)
    for _ in range(3):
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.seen += 1
        ema.update()
        oracle.update({name: value for name, value in model.state_dict().items() if name in {*names, "seen"}})
    return ema, oracle, model


def test_a_quantised_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """It failed in the middle of the writing, with an error of the tensor's own that named no way out."""
    ema, oracle, _ = _trained()
    for call in (
        lambda: ema.save(tmp_path / "out"),
        lambda: ema.save(tmp_path / "out", block=False),
        lambda: ema.export(tmp_path / "out"),
        lambda: ema.export(tmp_path / "out", gather=True),
        ema.full_state_dict,
        ema.fingerprint,
    ):
        with pytest.raises(EMAStateError, match=r"'base.weight' is not averaged and is a Int8.*untracked=False"):
            call()
    assert not list(tmp_path.iterdir())
    state = ema.full_state_dict(include_untracked=False)
    oracle.check(state)
    assert ema.fingerprint(include_untracked=False).keys() == state.keys()


def test_a_quantised_base_is_left_out_and_its_adapter_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    ema, oracle, model = _trained()
    ema.save(tmp_path / "checkpoint", include_untracked=False)
    ema.export(tmp_path / "export", include_untracked=False)
    oracle.check(load_file(tmp_path / "export" / "model.safetensors"))
    oracle.check(read_checkpoint(tmp_path / "checkpoint"))
    torch.manual_seed(1)
    other = ShardedEMA(Adapted(), decay=DECAY)
    other.load(tmp_path / "checkpoint")
    oracle.check(other.full_state_dict(include_untracked=False))
    assert other.num_updates == 3
    with ema.average_parameters():
        assert torch.equal(model.lora_a.weight, other.full_state_dict(include_untracked=False)["lora_a.weight"])
    assert main(["export", str(tmp_path / "checkpoint"), str(tmp_path / "offline")]) == 0
    assert (tmp_path / "offline" / "model.safetensors").read_bytes() == (
        tmp_path / "export" / "model.safetensors"
    ).read_bytes()


def test_weights_whose_scales_lie_elsewhere_are_refused(tmp_path: Path) -> None:
    """bitsandbytes: the numbers could be read, and would be worth nothing without their scales."""

    class Params4bit(nn.Parameter):
        quant_state: object = None

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    packed = Params4bit(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    model[0].weight = packed
    ema = ShardedEMA(model, decay=DECAY)
    ema.save(tmp_path / "not yet quantised")
    packed.quant_state = {"absmax": torch.ones(1)}
    with pytest.raises(EMAStateError, match=r"'0.weight' is not averaged and is a Params4bit"):
        ema.save(tmp_path / "quantised")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("case", ["ddp", "fsdp1-full-orig", "fsdp2"])
def test_what_is_frozen_is_left_out_under_every_wrapper(case: str, rank: int, tmp_path: Path) -> None:
    """And is no mismatch where the checkpoint says so."""
    model, plain = CASES[case].model(), CASES[case].plain()
    ema, oracle = average(model, plain)
    ema.save(tmp_path / "whole")
    ema.save(tmp_path / "part", include_untracked=False)
    ema.export(tmp_path / "export", include_untracked=False)
    everywhere(None)
    part, whole = verify_checkpoint(tmp_path / "part"), verify_checkpoint(tmp_path / "whole")
    assert {*part.lacking} == whole.live.keys() and not part.live and not whole.lacking
    assert part.averages.keys() == whole.averages.keys()
    kept = ema.full_state_dict(include_untracked=False)
    for value in (*model.parameters(), *model.buffers()):
        with torch.no_grad():
            getattr(value, "_local_tensor", value).zero_()
    ema.load(tmp_path / "part")
    found = ema.full_state_dict(include_untracked=False)
    if rank == 0:
        oracle.check({**plain.state_dict(), **found})
        assert all(torch.equal(found[name], value) for name, value in kept.items())
        exported = load_file(tmp_path / "export" / "model.safetensors")
        assert exported.keys() == kept.keys() and "frozen.weight" not in exported
    perturb(model, 1)
    ema.update()


def test_what_is_averaged_must_not_be_missing(tmp_path: Path) -> None:
    """A layer that was frozen when the checkpoint was saved, and is trained now, has no average in it."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    ShardedEMA(model, decay=DECAY).save(tmp_path / "part", include_untracked=False)
    model[0].requires_grad_(True)
    with pytest.raises(CheckpointMismatchError, match=r"missing '0.weight'"):
        ShardedEMA(model, decay=DECAY).load(tmp_path / "part")


def test_commands_say_what_a_checkpoint_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].requires_grad_(False)
    ema = ShardedEMA(model, decay=DECAY)
    ema.update()
    part, whole = str(tmp_path / "part"), str(tmp_path / "whole")
    ema.save(part, include_untracked=False)
    ema.save(whole)
    lacks = "2 tensors of what is not averaged (0.weight, 0.bias)"

    def run(*arguments: str) -> tuple[int, str, str]:
        status = main(arguments)
        return status, *capsys.readouterr()

    assert f"It lacks {lacks}." in run("inspect", part)[1]
    assert json.loads(run("inspect", part, "--json")[1])["lacking"] == ["0.weight", "0.bias"]
    assert json.loads(run("inspect", whole, "--json")[1])["lacking"] == []
    assert f"whole: 2 tensors, 48 bytes, 1 file; it was saved without {lacks}" in run("verify", part)[1]
    assert json.loads(run("verify", part, "--json")[1])["lacking"] == ["0.weight", "0.bias"]
    assert "lack" not in run("inspect", whole)[1] and "without" not in run("verify", whole)[1]
    status, _, complaint = run("export", part, str(tmp_path / "export"))
    assert status == 0 and f"{part} was saved without {lacks}" in complaint
    for pair in ((part, whole), (whole, part), (part, part)):
        status, shown, complaint = run("diff", *pair, "--json")
        assert status == 0 and f"{part} was saved without {lacks}" in complaint
        assert {row["name"] for row in json.loads(shown)["tensors"]} == {"1.weight", "1.bias"}
    status, shown, complaint = run("diff", whole, whole, "--json")
    assert len(json.loads(shown)["tensors"]) == 4 and "without" not in complaint


def test_a_manifest_that_lacks_nothing_is_as_before(tmp_path: Path) -> None:
    """Older versions read it; they refuse one that lacks something, rather than take it for a whole model."""
    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    ema = ShardedEMA(model, decay=DECAY)
    ema.save(tmp_path / "whole")
    assert "lacking" not in json.loads((tmp_path / "whole" / "ema.json").read_text())
    ema.save(tmp_path / "part", include_untracked=False)
    text = (tmp_path / "part" / "ema.json").read_bytes()
    assert Manifest.from_bytes(text).lacking == ("bias",)
    assert Manifest.from_bytes(text).to_bytes() == text


@pytest.mark.parametrize("lacking", ["bias", [3], [""], {"bias": 1}, ["a\nb"], ["weight"], ["bias", "bias"]])
def test_a_wrong_list_of_what_is_lacking_is_refused(lacking: object, tmp_path: Path) -> None:
    from dist_ema.formats import manifest

    model = nn.Linear(3, 3)
    model.bias.requires_grad_(False)
    ShardedEMA(model, decay=DECAY).save(tmp_path / "part", include_untracked=False)
    body = json.loads((tmp_path / "part" / "ema.json").read_text())
    del body["checksum"]
    with pytest.raises(CheckpointCorruptError, match="lack"):
        Manifest.from_bytes(manifest._seal({**body, "lacking": lacking}))
