"""Averages that other libraries wrote (tests/data/imports): imported, loaded, bit for bit; and files that do harm."""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.util
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from support import DATA

import numpy
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA, read_checkpoint, schedules, verify_checkpoint
from dist_ema.cli import main
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, EMAConfigError
from dist_ema.formats import dcp_directory as dcp_import
from dist_ema.importers import FORMATS
from dist_ema.importers.convert import import_checkpoint

IMPORTS = DATA / "imports"
_spec = importlib.util.spec_from_file_location("make_imports", IMPORTS / "make.py")
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

FROZEN = ("--frozen", "^frozen")
MODEL = ("--model", IMPORTS / "model.pt")
WARMUP = schedules.Warmup(0.7, inv_gamma=2.0, power=0.75)
#: The file, what it is recognised as, options, its schedule, batches trained, batches seen, updates.
FILES = [
    ("composer-0_32_1.pt", "composer", (), schedules.HalfLife("1000ba"), 6, 6, 6),
    ("composer-0_12_1.pt", "composer", FROZEN, schedules.HalfLife("1000ba"), 6, 6, 6),
    ("diffusers", "diffusers", (*MODEL, *FROZEN), WARMUP, 6, 4, 5),
    ("diffusers.pt", "diffusers", (*MODEL, *FROZEN), WARMUP, 6, 4, 5),
    ("timm.pth.tar", "timm", FROZEN, schedules.ConstantDecay(0.9999), 0, 0, 1),
    ("ema_pytorch.pt", "ema-pytorch", FROZEN, schedules.Warmup(0.9999), 6, 5, 6),
    ("lightning.ckpt", "lightning", FROZEN, schedules.ConstantDecay(0.999), 6, 4, 5),
    ("nemo-EMA.ckpt", "nemo", FROZEN, schedules.ConstantDecay(0.8**0.5), 6, 6, 4),
]


def expected(file: str) -> dict[str, Tensor]:
    """What the library said the average is."""
    return load_file(IMPORTS / f"{file.removesuffix('-EMA.ckpt').split('.')[0]}.expected.safetensors")


def other_net(tied: bool = True) -> nn.Module:
    """The model with weights that are nobody's."""
    net = nn.Module()
    make.build(net, tied)
    torch.manual_seed(9)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.randn(tensor.shape) * 9)
    return net


def trained_buffers() -> dict[str, Tensor]:
    """Those of the model that diffusers averaged."""
    return {name: value for name, value in torch.load(IMPORTS / "model.pt").items() if name.startswith("norm.run")}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


def equal(found: dict[str, Tensor], wanted: dict[str, Tensor], but: str = "-") -> None:
    """Bit for bit, for every name that is wanted."""
    names = [name for name in wanted if not name.startswith(but)]
    assert names and set(names) <= found.keys()
    for name in names:
        assert found[name].dtype == wanted[name].dtype, name
        assert torch.equal(found[name], wanted[name]), name


# Files that the real libraries wrote.


@pytest.mark.parametrize(("file", "format", "options", "schedule", "trained", "seen", "updates"), FILES)
def test_a_real_file_is_recognised_and_its_average_loads_bit_for_bit(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    file: str,
    format: str,
    options: tuple[object, ...],
    schedule: schedules.Schedule,
    trained: int,
    seen: int,
    updates: int,
) -> None:
    """Live weights in the average's place, names given to the wrong tensors of one shape, a buffer forgotten."""
    status, out, err = run(capsys, "import", IMPORTS / file, tmp_path / "out", *options, "--json")
    assert (status, err) == (0, "")
    assert json.loads(out)["format"] == format
    wanted = expected(file)
    equal(read_checkpoint(tmp_path / "out"), wanted)
    manifest = verify_checkpoint(tmp_path / "out")
    assert (manifest.schedules["ema"], manifest.clock.batches) == (schedule, trained)
    assert (manifest.seen.batches, manifest.seen.updates) == (seen, updates)
    assert {"frozen.weight", "frozen.bias"} == manifest.live.keys()
    ema = ShardedEMA(other_net(tied=format != "diffusers"), schedule=schedule)
    ema.load(tmp_path / "out")
    equal(ema.full_state_dict(), wanted, but="frozen")
    assert ema.num_updates == updates
    assert ema.full_state_dict().keys() == other_net().state_dict().keys()


def test_buffers_that_a_file_lacks_come_from_the_model_or_are_left_to_it(tmp_path: Path) -> None:
    average = {name: value for name, value in expected("diffusers").items() if not name.startswith("frozen")}
    flat = {f"state.{name}.ema_params": value for name, value in average.items()}
    dcp.save({"ema": flat}, checkpoint_id=tmp_path / "titan", no_dist=True)
    import_checkpoint(tmp_path / "titan", tmp_path / "without")
    ema = ShardedEMA(other_net(tied=False))
    with pytest.raises(CheckpointMismatchError, match=r"missing 'norm\.running_mean'"):
        ema.load(tmp_path / "without")
    ema.load(tmp_path / "without", strict=False)
    equal(ema.full_state_dict(), average)
    import_checkpoint(tmp_path / "titan", tmp_path / "with", model=IMPORTS / "model.pt", frozen="^frozen")
    ema.load(tmp_path / "with")
    equal(ema.full_state_dict(), average | trained_buffers())


def test_buffers_of_a_new_model_are_not_taken_for_trained_ones(tmp_path: Path) -> None:
    """diffusers' save_pretrained writes the average into a new model, with its buffers."""
    assert not import_checkpoint(IMPORTS / "diffusers", tmp_path / "with", model=IMPORTS / "model.pt").notes
    equal(read_checkpoint(tmp_path / "with"), trained_buffers())
    notes = import_checkpoint(IMPORTS / "diffusers", tmp_path / "without").notes
    assert any("those of a new model" in note for note in notes)
    assert not read_checkpoint(tmp_path / "without")["norm.running_mean"].any()


def test_a_directory_of_safetensors_gives_buffers_but_no_order(tmp_path: Path) -> None:
    """safetensors files are sorted: up.weight and down.weight, of one shape, would change places."""
    (tmp_path / "hub").mkdir()
    state = {name: value.clone() for name, value in torch.load(IMPORTS / "model.pt").items()}
    save_file(state, tmp_path / "hub" / "model.safetensors")
    import_checkpoint(IMPORTS / "diffusers", tmp_path / "out", model=tmp_path / "hub")
    equal(read_checkpoint(tmp_path / "out"), expected("diffusers"))
    with pytest.raises(CheckpointError, match="do not keep the model's order"):
        import_checkpoint(IMPORTS / "diffusers.pt", tmp_path / "no", model=tmp_path / "hub")
    with pytest.raises(CheckpointError, match=r"10 tensors without names: give --model"):
        import_checkpoint(IMPORTS / "diffusers.pt", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_another_model_is_refused_with_a_list(tmp_path: Path) -> None:
    state = torch.load(IMPORTS / "model.pt")
    state["up.weight"], state["down.bias"] = torch.zeros(4, 5), torch.zeros(1)
    torch.save(state, tmp_path / "other.pt")
    for source in ("diffusers.pt", "diffusers"):
        with pytest.raises(CheckpointMismatchError) as caught:
            import_checkpoint(IMPORTS / source, tmp_path / "out", model=tmp_path / "other.pt")
        assert "'up.weight' is (4, 4) and in the model (4, 5)" in str(caught.value)
        assert "'down.bias' is (4,) and in the model (1,)" in str(caught.value)
    torch.save({"up.weight": torch.zeros(4, 4)}, tmp_path / "small.pt")
    with pytest.raises(CheckpointMismatchError, match=r"10 tensors, and the model has 1 parameters: up\.weight"):
        import_checkpoint(IMPORTS / "diffusers.pt", tmp_path / "out", model=tmp_path / "small.pt")
    with pytest.raises(CheckpointMismatchError, match=r"the model has no 'down\.bias'"):
        import_checkpoint(IMPORTS / "diffusers", tmp_path / "out", model=tmp_path / "small.pt")


def test_composers_average_is_where_ema_weights_active_says(tmp_path: Path) -> None:
    """The trainer saves with the average in the model; a state that was not swapped has it in the algorithm."""
    with torch.serialization.safe_globals([]):
        checkpoint = torch.load(IMPORTS / "composer-0_32_1.pt", weights_only=False)
    algorithm = dict(checkpoint["state"]["algorithms"])["EMA"]
    torch.save(algorithm, tmp_path / "alone.pt")
    with pytest.raises(CheckpointError, match=r"the average is in state\['model'\]"):
        import_checkpoint(tmp_path / "alone.pt", tmp_path / "out")
    algorithm["ema_weights_active"] = False
    stored = {**algorithm["ema_model"]["named_parameters_dict"], **algorithm["ema_model"]["named_buffers_dict"]}
    torch.save(algorithm, tmp_path / "alone.pt")
    torch.save({"state": checkpoint["state"]}, tmp_path / "whole.pt")
    for source in ("alone.pt", "whole.pt"):
        import_checkpoint(tmp_path / source, tmp_path / source.removesuffix(".pt"))
        equal(read_checkpoint(tmp_path / source.removesuffix(".pt")), stored)
    # In the whole file the model tells what is tied to what.
    assert "head.weight" in read_checkpoint(tmp_path / "whole")
    assert not torch.equal(stored["up.weight"], expected("composer-0_32_1.pt")["up.weight"])


def test_composer_before_0_9_has_lists(tmp_path: Path) -> None:
    """As its source writes it: ShadowModel's two lists, and the names in the model beside them."""
    net, average = make.Net(), other_net()
    lists = {
        "parameters": [parameter.data.clone() for parameter in average.parameters()],
        "buffers": [buffer.data.clone() for buffer in average.buffers()],
    }
    state = {"model": net.state_dict(), "algorithms": {"EMA": {"ema_model": lists, "training_model": lists}}}
    torch.save({"state": state, "rng": []}, tmp_path / "old.pt")
    import_checkpoint(tmp_path / "old.pt", tmp_path / "out", decay=0.5, frozen="^frozen")
    equal(read_checkpoint(tmp_path / "out"), average.state_dict())
    ema = ShardedEMA(make.Net(), decay=0.5)
    ema.load(tmp_path / "out")
    equal(ema.full_state_dict(), average.state_dict(), but="frozen")
    lists["buffers"].pop()
    torch.save({"state": state}, tmp_path / "old.pt")
    with pytest.raises(CheckpointError, match="the buffers of the average have no names"):
        import_checkpoint(tmp_path / "old.pt", tmp_path / "out")


def test_nemos_unnamed_average_is_not_taken_from_the_live_weights(tmp_path: Path) -> None:
    """Lightning's own callback beside NeMo's EMA saves live weights, and the average as a list."""
    checkpoint = torch.load(IMPORTS / "nemo-EMA.ckpt")
    checkpoint["optimizer_states"][0]["ema"] = [value.clone() for value in checkpoint["optimizer_states"][0]["ema"]]
    torch.save(checkpoint, tmp_path / "live.ckpt")
    with pytest.raises(CheckpointError, match=r"import the -EMA\.ckpt"):
        import_checkpoint(tmp_path / "live.ckpt", tmp_path / "out")
    with pytest.raises(CheckpointError, match="none of the known formats"):
        import_checkpoint(IMPORTS / "nemo.ckpt", tmp_path / "out")


def test_timms_module_alone_is_taken_if_it_is_named(tmp_path: Path) -> None:
    state = torch.load(IMPORTS / "timm.pth.tar", weights_only=False)["state_dict_ema"]
    torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, tmp_path / "ema.pt")
    with pytest.raises(CheckpointError, match="none of the known formats"):
        import_checkpoint(tmp_path / "ema.pt", tmp_path / "out")
    import_checkpoint(tmp_path / "ema.pt", tmp_path / "out", format="timm")
    equal(read_checkpoint(tmp_path / "out"), expected("timm"))


def test_an_average_that_had_not_started_is_imported_as_that(tmp_path: Path) -> None:
    state = torch.load(IMPORTS / "ema_pytorch.pt")
    state["initted"].fill_(False)
    torch.save({"step": 0, "ema": state}, tmp_path / "ema.pt")
    notes = import_checkpoint(tmp_path / "ema.pt", tmp_path / "out", frozen="^frozen").notes
    assert any("had not started" in note for note in notes)
    ema = ShardedEMA(make.Net())
    ema.load(tmp_path / "out")
    assert ema.num_updates == 0
    equal(ema.full_state_dict(), make.Net().state_dict())


# Options.


def test_options_replace_what_the_file_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ("import", IMPORTS / "nemo-EMA.ckpt", tmp_path / "out", "--half-life", "2ep", "--dtype", "bf16")
    status, out, err = run(capsys, *arguments)
    assert status == 0 and out.endswith("12 tensors, 216 bytes, 1 file; from nemo\n")
    assert "the file's schedule is ConstantDecay" in err and "HalfLife" in err
    wanted = {
        name: value.bfloat16() if value.is_floating_point() else value for name, value in expected("nemo").items()
    }
    equal(read_checkpoint(tmp_path / "out"), wanted)
    assert verify_checkpoint(tmp_path / "out").schedules["ema"] == schedules.HalfLife("2ep")
    # Over itself, which has to be said: the checkpoint is replaced by the next.
    arguments = ("import", IMPORTS / "timm.pth.tar", tmp_path / "out", "--decay", ".5")
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "") and "is a checkpoint already" in err and "--overwrite" in err
    equal(read_checkpoint(tmp_path / "out"), wanted)
    assert run(capsys, *arguments, "--overwrite")[0] == 0
    equal(read_checkpoint(tmp_path / "out"), expected("timm"))
    assert verify_checkpoint(tmp_path / "out").schedules["ema"] == schedules.ConstantDecay(0.5)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["timm.pth.tar", "--format", "lightning"], "is not a file of lightning, but of timm"),
        (["model.pt", "--format", "composer"], "is not a file of composer: it has 'embed.weight'"),
        (["timm.pth.tar", "--format", "orbax"], "--format 'orbax': allowed are auto, composer, diffusers"),
        (["timm.pth.tar", "--frozen", "("], "is not a regular expression"),
        (["timm.pth.tar", "--frozen", "nothing"], "matches no name; names are embed.weight"),
        (["timm.pth.tar", "--decay", "2"], "--decay 2.0"),
        (["timm.pth.tar", "--decay", ".5", "--half-life", "1ba"], "give one of the two"),
        (["timm.pth.tar", "--model", "missing"], "missing does not exist"),
        (["missing"], "does not exist"),
        (["..", "--format", "state-dict"], "has no safetensors files"),
        (["model.pt"], "has none of the known formats"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_done_is_said_in_one_line_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], why: str
) -> None:
    status, out, err = run(capsys, "import", IMPORTS / arguments[0], tmp_path / "out", *arguments[1:])
    assert (status, out) == (2, "") and err.startswith("dist-ema: ") and err.count("\n") == 1
    assert why in err
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_ours_is_not_imported(tmp_path: Path) -> None:
    import_checkpoint(IMPORTS / "timm.pth.tar", tmp_path / "out")
    with pytest.raises(CheckpointError, match="a checkpoint of this library already"):
        import_checkpoint(tmp_path / "out", tmp_path / "again")
    with pytest.raises(EMAConfigError, match="dtype"):
        import_checkpoint(IMPORTS / "timm.pth.tar", tmp_path / "again", dtype=torch.int8)


def test_help_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    text = " ".join(run(capsys, "import", "--help")[1].split())
    assert all(name in text for name in FORMATS)


# torchtitan: as its source writes it, in directories of the real torch.distributed.checkpoint.


def titan_net() -> nn.Module:
    """Rows of 7, 4 and 1: uneven and empty shards; no buffers, as in torchtitan's models."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 1, bias=False))


def titan_average() -> dict[str, Tensor]:
    """The average of each parameter."""
    return {name: (value.detach() * 3).clone() for name, value in titan_net().named_parameters()}


def save_as_torchtitan(shelf: Path) -> None:
    """The state dict that its EMA container gives to dcp.save, beside the trainer's, on three ranks."""
    mesh = init_device_mesh("cpu", (3,))
    net = fully_shard(titan_net(), mesh=mesh)
    flat = {f"state.{name}.ema_params": value.detach() * 3 for name, value in net.named_parameters()}
    train_state = {"step": torch.tensor(40, dtype=torch.int32), "ntokens_seen": torch.tensor(9)}
    state = {**net.state_dict(), "ema": flat, "train_state": train_state, "dataloader": {"dp_rank_0": b"anything"}}
    dcp.save(state, checkpoint_id=shelf / "titan")
    several = {f"{name}.{key}": value * scale for name, value in flat.items() for key, scale in (("a", 1), ("b.5", 2))}
    dcp.save({"ema_optimizer": several, "train_state": {"step": 40}}, checkpoint_id=shelf / "several")
    dist.barrier()
    if dist.get_rank() == 0:
        import_checkpoint(shelf / "titan", shelf / "imported")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For what is written once for all tests."""
    return tmp_path_factory.mktemp("imports")


@pytest.fixture
def shelf(written: Path, on_ranks: Callable[..., None]) -> Path:
    """Where three ranks left what torchtitan writes, and its import."""
    if not (written / "imported").exists():
        on_ranks(save_as_torchtitan, 3, shelf=written)
    return written


@pytest.mark.world_size(2)
def test_torchtitans_average_loads_at_another_world_size(rank: int, shelf: Path) -> None:
    ema = ShardedEMA(fully_shard(titan_net(), mesh=init_device_mesh("cpu", (2,))), dtype=None)
    ema.load(shelf / "imported")
    if state := ema.full_state_dict():
        equal(state, titan_average())
    assert (ema.num_updates, ema.progress.batches) == (41, 40)


def test_torchtitans_average_is_read_in_one_process(shelf: Path, tmp_path: Path) -> None:
    assert import_checkpoint(shelf / "titan", tmp_path / "one").format == "torchtitan"
    state = read_checkpoint(tmp_path / "one")
    equal(state, titan_average())
    assert state.keys() == titan_average().keys()
    manifest = verify_checkpoint(tmp_path / "one")
    assert manifest.schedules["ema"] == schedules.HalfLifeFraction(0.05)
    import_checkpoint(shelf / "several", tmp_path / "two")
    equal(read_checkpoint(tmp_path / "two", "a"), titan_average())
    equal(read_checkpoint(tmp_path / "two", "b.5"), {name: value * 2 for name, value in titan_average().items()})
    assert verify_checkpoint(tmp_path / "two").clock.batches == 40  # out of an entry that is no tensor


# Files that do harm, or are damaged.


class Harm:
    """Runs when it is unpickled."""

    def __init__(self, call: Callable[..., object], *arguments: object) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.mkdir, exec, Path.touch, subprocess.call], ids=lambda call: call.__name__)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_does_not_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, call: Callable[..., object], zipped: bool
) -> None:
    target = str(tmp_path / "ran")
    arguments = {exec: f"open({target!r}, 'w')", subprocess.call: ["touch", target], Path.touch: Path(target)}
    harm = Harm(call, arguments.get(call, target))
    state = {"shadow_params": [torch.ones(2)], "decay": harm, "optimization_step": 1, "update_after_step": 0}
    torch.save(state | {"use_ema_warmup": False}, tmp_path / "ema.pt", _use_new_zipfile_serialization=zipped)
    torch.save({"x": torch.ones(2)}, tmp_path / "model.pt")
    status, out, err = run(capsys, "import", tmp_path / "ema.pt", tmp_path / "out", "--model", tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "no code of a file is run" in err and (call.__name__ in err or "getattr" in err)
    assert not (tmp_path / "out").exists()
    torch.load(tmp_path / "ema.pt", weights_only=False)
    assert (tmp_path / "ran").exists(), "the file does no harm, so this test shows nothing"


class Bystander(dict):
    """A class that a file names and that is not there when it is read; it says so if it is used."""

    def __init__(self, *arguments: object) -> None:
        raise RuntimeError("made")

    def __setstate__(self, state: object) -> None:
        raise RuntimeError("made")

    def __setitem__(self, key: object, value: object) -> None:
        raise RuntimeError("made")


def test_any_object_beside_the_tensors_becomes_an_inert_stand_in(tmp_path: Path) -> None:
    """Trainers save arguments, meters and configurations of classes that nobody has listed; none of their code runs."""
    beside: dict[str, Any] = {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=[1])),
        "history": collections.defaultdict(list, a=[1.0]),
        "window": collections.deque([1, 2], maxlen=3),
        "counts": collections.Counter("aab"),
        "own": dict.__new__(Bystander),
        "set": {1, "a", (2, 3)},
        "path": Path("x"),
        "when": datetime.datetime(2026, 1, 1),
        "rng": numpy.random.RandomState(0).get_state(),
        "scalar": numpy.float64(0.5),
        "dtype": torch.float8_e4m3fn,
        "bytes": b"abc",
        "device": torch.device("cuda:0"),
    }
    dict.__setitem__(beside["own"], "a", 1)
    vars(beside["own"])["b"] = 2
    for legacy in (False, True):
        path, out = tmp_path / "a.pt", tmp_path / f"out{legacy}"
        torch.save({**beside, "ema": {"w": torch.arange(4.0)}}, path, _use_new_zipfile_serialization=not legacy)
        import_checkpoint(path, out, decay=0.5)
        equal(read_checkpoint(out), {"w": torch.arange(4.0)})


def test_a_class_of_a_missing_package_is_no_obstacle(tmp_path: Path) -> None:
    """Composer's RNG states are numpy's, timm's arguments argparse's; NeMo's configuration is omegaconf's."""
    checkpoint = torch.load(IMPORTS / "lightning.ckpt")
    package, module = ModuleType("omegaconf"), ModuleType("omegaconf.dictconfig")
    module.DictConfig = type("DictConfig", (), {"__module__": module.__name__})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "omegaconf", package)
        patch.setitem(sys.modules, "omegaconf.dictconfig", module)
        checkpoint["hyper_parameters"] = module.DictConfig()
        checkpoint["hyper_parameters"].content = {"rate": 1}
        torch.save(checkpoint, tmp_path / "lightning.ckpt")
    import_checkpoint(tmp_path / "lightning.ckpt", tmp_path / "out")
    assert "omegaconf" not in sys.modules
    equal(read_checkpoint(tmp_path / "out"), expected("lightning"))


def test_the_part_of_a_larger_module_is_imported_under_its_own_names(tmp_path: Path) -> None:
    """A LightningModule holds the model as an attribute; ``load`` would find none of its names."""
    checkpoint = torch.load(IMPORTS / "timm.pth.tar", weights_only=False)  # a file of ours
    inner = checkpoint["state_dict_ema"]
    checkpoint["state_dict_ema"] = {"loss.weight": torch.ones(3)} | {f"net.{name}": inner[name] for name in inner}
    torch.save(checkpoint, tmp_path / "timm.pth.tar")
    import_checkpoint(tmp_path / "timm.pth.tar", tmp_path / "out", prefix="net")
    import_checkpoint(IMPORTS / "timm.pth.tar", tmp_path / "plain")
    found, wanted = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "plain")
    assert found.keys() == wanted.keys()
    equal(found, wanted)
    with pytest.raises(EMAConfigError, match=r"prefix='encoder.' begins no name; names are loss.weight, net"):
        import_checkpoint(tmp_path / "timm.pth.tar", tmp_path / "out", prefix="encoder.")


def edited(shelf: Path, target: Path, edit: Callable[[Any], None]) -> Path:
    """A copy of torchtitan's directory whose metadata were changed."""
    shutil.copytree(shelf / "titan", target)
    metadata = pickle.loads((target / ".metadata").read_bytes())
    edit(metadata)
    (target / ".metadata").write_bytes(pickle.dumps(metadata))
    return target


@pytest.mark.parametrize("call", [os.mkdir, exec, Path.touch], ids=lambda call: call.__name__)
def test_code_in_dcps_metadata_does_not_run(
    capsys: pytest.CaptureFixture[str], shelf: Path, tmp_path: Path, call: Callable[..., object]
) -> None:
    target = str(tmp_path / "ran")
    arguments = {exec: f"open({target!r}, 'w')", Path.touch: Path(target)}
    harm = Harm(call, arguments.get(call, target))
    path = edited(shelf, tmp_path / "titan", lambda metadata: setattr(metadata, "planner_data", harm))
    status, out, err = run(capsys, "import", path, tmp_path / "out")
    assert (status, out) == (2, "") and "none of it was run" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["titan"]
    pickle.loads((path / ".metadata").read_bytes())
    assert (tmp_path / "ran").exists(), "the file does no harm, so this test shows nothing"


@pytest.mark.parametrize("entry", ["train_state.step", "ema.state.1.weight.ema_params"])
def test_code_in_dcps_entries_does_not_run(
    capsys: pytest.CaptureFixture[str], shelf: Path, tmp_path: Path, entry: str
) -> None:
    """Of an entry that is no tensor, the clock is not known then; a tensor is refused."""
    torch.save(Harm(os.mkdir, str(tmp_path / "ran")), tmp_path / "harm")

    def edit(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == entry:
                info.relative_path, info.offset, info.length = "harm", 0, (tmp_path / "harm").stat().st_size
        if entry == "train_state.step":
            metadata.state_dict_metadata[entry] = dcp.metadata.BytesStorageMetadata()

    path = edited(shelf, tmp_path / "titan", edit)
    shutil.copy(tmp_path / "harm", path / "harm")
    status, _, err = run(capsys, "import", path, tmp_path / "out")
    assert not (tmp_path / "ran").exists()
    if entry == "train_state.step":
        assert status == 0 and "the clock starts at 0" in err
    else:
        assert status == 2 and "holds more than data" in err
        assert not (tmp_path / "out").exists()


def _set(index: int, **values: object) -> Callable[[Any], None]:
    """Changes where a part of the uneven embedding is said to lie."""

    def edit(metadata: Any) -> None:
        stored = [item for item in metadata.storage_data.items() if item[0].fqn == "ema.state.0.weight.ema_params"]
        vars(stored[index][1]).update(values)

    return edit


def _chunk(index: int, field: str, value: tuple[int, ...]) -> Callable[[Any], None]:
    def edit(metadata: Any) -> None:
        chunks = metadata.state_dict_metadata["ema.state.0.weight.ema_params"].chunks
        setattr(chunks[index], field, torch.Size(value))

    return edit


@pytest.mark.parametrize(
    ("edit", "why"),
    [
        (_set(0, relative_path="../escaped"), "is not a file of this directory"),
        (_set(0, relative_path="missing"), "cannot be read"),
        (_set(0, offset=1), "is damaged"),
        (_set(0, length=40), "has too few bytes"),
        (_set(0, length=-1), "invalid description"),
        (_set(0, transform_descriptors=["zstd"]), "zstd"),
        (_chunk(0, "sizes", (2, 4)), "do not make up the tensor"),
        (_chunk(0, "sizes", (4, 4)), "overlap"),
        (_chunk(2, "sizes", (2, 4)), "lies outside of it"),
        (_chunk(0, "sizes", (1 << 40, 1 << 40)), "lies outside of it"),
        (lambda metadata: metadata.state_dict_metadata.update(b=7), None),
        (lambda metadata: setattr(metadata, "storage_data", {1: 2}), "invalid index"),
        (lambda metadata: setattr(metadata, "storage_data", None), "mapping"),
        (lambda metadata: setattr(metadata, "state_dict_metadata", {}), "none of the known formats"),
    ],
)
def test_metadata_that_cannot_be_are_refused(
    shelf: Path, tmp_path: Path, edit: Callable[[Any], None], why: str | None
) -> None:
    """A part read from elsewhere, twice or not at all would be in the average, or outside of it in memory."""
    path = edited(shelf, tmp_path / "titan", edit)
    if why is None:
        import_checkpoint(path, tmp_path / "out")
        return
    with pytest.raises(CheckpointError, match=why):
        import_checkpoint(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_metadata_of_a_few_bytes_take_no_gigabytes(tmp_path: Path) -> None:
    """Python's unpickler in C makes room for as many memos as a number in the file says, here eight gigabytes."""
    (tmp_path / ".metadata").write_bytes(b"\x80\x02]r\xff\xff\xff\x1f.")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointCorruptError, match="holds no metadata"):
        import_checkpoint(tmp_path, tmp_path / "out")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < before + (1 << 20)  # kibibytes


@pytest.mark.parametrize("grid", [(4096, 1), (1, 512), (128, 16)], ids=str)
def test_parts_of_thousands_of_ranks_are_compared_in_no_time(tmp_path: Path, grid: tuple[int, int]) -> None:
    """Each with each took a minute a tensor. One that overlaps its neighbour is found among them."""
    rows, columns = grid
    parts = [dcp_import._Part((2 * i, 2 * j), (2, 2), tmp_path, 0, 16) for j in range(columns) for i in range(rows)]
    begin = time.process_time()
    dcp_import._check_parts(tmp_path, "a", (2 * rows, 2 * columns), torch.float32, parts)
    assert time.process_time() - begin < 5
    moved = replace(parts[-1], offsets=tuple(max(offset - 1, 0) for offset in parts[-1].offsets))
    with pytest.raises(CheckpointCorruptError, match="overlap"):
        dcp_import._check_parts(tmp_path, "a", (2 * rows, 2 * columns), torch.float32, [*parts[:-1], moved])


def test_a_tensor_that_claims_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    """A stride of 0 makes exabytes of four bytes: on disk, if they were written out."""
    huge = torch.zeros(1).expand(1 << 40, 1 << 16)
    torch.save({"state_dict_ema": {"a": huge}}, tmp_path / "huge.pt")
    with pytest.raises(CheckpointCorruptError, match="more than the file holds"):
        import_checkpoint(tmp_path / "huge.pt", tmp_path / "out")
    for name in ("__metadata__", "a\nb", ""):
        torch.save({"state_dict_ema": {name: torch.zeros(1)}}, tmp_path / "name.pt")
        with pytest.raises(CheckpointCorruptError, match="invalid tensor name"):
            import_checkpoint(tmp_path / "name.pt", tmp_path / "out")


@pytest.mark.parametrize("file", ["composer-0_32_1.pt", "ema_pytorch.pt", "diffusers", "nemo-EMA.ckpt"])
def test_damage_is_an_error_of_this_library_and_leaves_nothing(tmp_path: Path, file: str) -> None:
    """Cut off or with other bytes anywhere: never another exception, never half a checkpoint."""
    source = IMPORTS / file
    target = tmp_path / source.name
    if source.is_dir():
        shutil.copytree(source, target)
        source, target = (path / "diffusion_pytorch_model.safetensors" for path in (source, target))
    whole, chance = source.read_bytes(), random.Random(0)
    refused = 0
    for turn in range(40):
        damaged = bytearray(whole)
        place = chance.randrange(len(whole))
        damaged[place : place + (len(whole) if turn % 4 == 0 else 8)] = b"" if turn % 4 == 0 else chance.randbytes(8)
        target.write_bytes(damaged)
        try:
            import_checkpoint(tmp_path / file, tmp_path / "out")
            shutil.rmtree(tmp_path / "out")
        except (CheckpointError, EMAConfigError):
            refused += 1
            assert not (tmp_path / "out").exists()
    assert refused >= 10


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """The file is mapped: what the process has of its own stays small."""
    size = 1 << 27
    torch.save({"state_dict_ema": {"a": torch.ones(size // 8), "b": torch.ones(size // 8)}}, tmp_path / "large.pt")
    code = """
import sys, threading
import dist_ema.cli, dist_ema.importers.convert
def own():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) << 10
before, peak, stop = own(), 0, threading.Event()
def watch():
    global peak
    while not stop.wait(.002):
        peak = max(peak, own())
thread = threading.Thread(target=watch); thread.start()
result = dist_ema.cli.main(["import", "large.pt", "out", "--decay", ".9"])
stop.set(); thread.join()
print(result, peak - before)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    status, grown = map(int, result.stdout.splitlines()[-1].split())
    assert status == 0, result.stderr
    assert grown < size // 4, f"{grown / 2**20:.0f} MiB"
