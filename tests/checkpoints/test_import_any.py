"""Training files of no library in particular: which dict of tensors is the average, and what its tensors are called.

Files of training scripts agree on nothing: the average lies beside the live weights, inside their state dict, under
names without dots, or as a list. To take the wrong dict gives a checkpoint that loads, and is not the average.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dist_ema import ShardedEMA, read_checkpoint, verify_checkpoint
from dist_ema.cli import main
from dist_ema.errors import CheckpointError
from dist_ema.formats.torch_stand_ins import StandIn
from dist_ema.importers import state_dicts
from dist_ema.importers.convert import import_checkpoint
from dist_ema.importers.files import open_foreign
from dist_ema.importers.foreign import BATCH_NORM


def build(seed: int) -> nn.Module:
    """Two layers of one shape, so that a wrong order is seen; BatchNorm's buffers; names with and without digits."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 2)))


LIVE, EMA = dict(build(0).state_dict()), dict(build(1).state_dict())
PARAMETERS = {name: value for name, value in EMA.items() if not BATCH_NORM.search(name)}
AVERAGED = AveragedModel(build(1), use_buffers=True).state_dict()
#: What torch_ema, score_sde and fairchem save: no names.
LISTED = {"decay": 0.999, "num_updates": 9, "shadow_params": list(PARAMETERS.values()), "collected_params": None}


def under(prefix: str, tensors: dict[str, Tensor], change: Callable[[str], str] = str) -> dict[str, Tensor]:
    return {prefix + change(name): value for name, value in tensors.items()}


def lit_ema(owner: str = "model_ema.") -> dict[str, Tensor]:
    """Latent diffusion's LitEma, inside the module's own state dict."""
    counts = {f"{owner}decay": torch.tensor(0.9999), f"{owner}num_updates": torch.tensor(57, dtype=torch.int32)}
    return counts | under(owner, PARAMETERS, lambda name: name.replace(".", ""))


LARGER = under("net.", EMA) | {"loss.scale": torch.ones(2)}
OPTIMIZER = {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(4, 4)}}, "param_groups": [{"lr": 0.1}]}
TRAINER = {"optimizer": OPTIMIZER, "epoch": 4, "args": argparse.Namespace(lr=0.1), "loss": torch.tensor(0.5)}
#: Layouts with a dict that says that it is the average: taken without an option.
KNOWN: dict[str, Any] = {
    "DiT": {"model": LIVE, "ema": EMA, "opt": OPTIMIZER, "args": argparse.Namespace(lr=0.1)},
    "torchvision": {"model": LIVE, "model_ema": AVERAGED, **TRAINER},
    "ConvNeXt": {"model": LIVE, "model_ema": EMA, "scaler": {"scale": torch.ones(1), "growth": torch.ones(1)}},
    "AveragedModel": AVERAGED,
    "AveragedModel of a DDP module": under("module.", dict(EMA), lambda name: f"module.{name}")
    | {"n_averaged": torch.tensor(3)},
    "RT-DETR": {"model": LIVE, "ema": {"module": EMA, "updates": 12, "warmups": 0}},
    "fairseq": {"model": LIVE, "extra_state": {"ema": EMA, "epoch": 3}, "last_optimizer_state": OPTIMIZER},
    "Lightning's StochasticWeightAveraging": {
        "state_dict": LIVE,
        "callbacks": {"StochasticWeightAveraging": {"n_averaged": 3, "average_model_state": EMA}},
    },
    "a callback": {"state_dict": LIVE, "callbacks": {"EMA": {"ema_state_dict": EMA, "decay": 0.9}}, "global_step": 7},
    "a callback whose key has dots": {"state_dict": LIVE, "callbacks": {"EMA{'decay': 0.9}": {"ema_state_dict": EMA}}},
    "mmengine": {"state_dict": EMA, "ema_state_dict": {"steps": torch.tensor(4)} | under("module.", LIVE), "meta": {}},
    "LitEma": {"state_dict": under("model.", LIVE) | lit_ema(), "global_step": 57},
    "LitEma beside other modules": {
        "state_dict": {"first.0.weight": torch.zeros(4, 4)} | under("model.", LIVE) | lit_ema()
    },
    "LitEma of the whole module": {"state_dict": LIVE | lit_ema()},
    "LitEma beside a copy": {"state_dict": under("model.", LIVE) | under("copy.", LIVE) | lit_ema()},
    "StyleGAN": {"G": LIVE, "D": LIVE, "G_ema": EMA},
    "wrapped": {"net": LIVE, "net_ema": under("module._orig_mod.", EMA)},
    "score_sde": {"model": LIVE, "ema": LISTED, "step": 9, "optimizer": OPTIMIZER},
    "live weights of the average's object": {"ema": {"shadow": EMA, "backup": LIVE}},
}
#: Layouts with weights of which nothing says that they are an average; the options that take them.
NAMED: dict[str, tuple[Any, str]] = {
    "a state dict": (EMA, "--format state-dict"),
    "a state dict in a dict": ({"state_dict": EMA, **TRAINER}, "--format state-dict"),
    "OpenCLIP": ({"state_dict": under("module.", EMA), "epoch": 3, "name": "x"}, "--key state_dict"),
    "DeepSpeed": ({"module": EMA, "buffer_names": ["1.running_mean"], **TRAINER}, "--key module"),
    "DINO": ({"student": LIVE, "teacher": EMA, **TRAINER}, "--key teacher"),
    "ema_state_dict beside state_dict": ({"state_dict": LIVE, "ema_state_dict": EMA}, "--key ema_state_dict"),
    "two averages": ({"model": LIVE, "ema_fast": LIVE, "ema_slow": EMA}, "--key ema_slow"),
    "a larger module": (
        {"state_dict": under("net.", EMA) | {"loss.scale": torch.ones(2)}},
        "--key state_dict --prefix net",
    ),
    "a module of the average": ({"ema": under("net.", EMA) | {"loss.scale": torch.ones(2)}}, "--prefix net"),
    "LitEma with a prefix": ({"state_dict": under("model.", LIVE) | lit_ema()}, "--prefix model."),
}


def imported(tmp_path: Path, content: Any, *options: str) -> dict[str, Tensor]:
    torch.save(content, tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out"), *options, "--decay", "0.9"]) == 0
    return read_checkpoint(tmp_path / "out")


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """The average bit for bit; what the file has of parameters alone has the live buffers beside it, or none."""
    assert found.keys() <= EMA.keys() and PARAMETERS.keys() <= found.keys(), sorted(found)
    for name, value in found.items():
        expected = wanted[name] if name in wanted else LIVE[name]
        assert value.dtype == expected.dtype and torch.equal(value, expected), name


def expected(layout: str) -> dict[str, Tensor]:
    """LitEma and lists have parameters alone."""
    return PARAMETERS if layout.startswith(("LitEma", "score_sde")) else EMA


@pytest.mark.parametrize("layout", KNOWN)
def test_the_average_of_a_training_file_is_found(tmp_path: Path, layout: str) -> None:
    check(imported(tmp_path, KNOWN[layout]), expected(layout))


@pytest.mark.parametrize("layout", NAMED)
def test_weights_that_nothing_calls_an_average_are_listed_and_taken_when_they_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """The refusal names what is there and an option; the option then works."""
    content, options = NAMED[layout]
    torch.save(content, tmp_path / "a.pt")
    if "--prefix" not in options:
        assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "tensors" in said and "damaged" not in said
        assert options in said or options.replace("--format state-dict", "--key state_dict") in said, said
        for option in re.findall(r"\((--key [^\s)]+|--format state-dict)", said):
            assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out"), *option.split(), "--overwrite"]) == 0
    check(imported(tmp_path, content, *options.split(), "--overwrite"), expected(layout))


def _flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return under("ema_", tensors, lambda name: name.replace(".", "_"))


@pytest.mark.parametrize("command", ["import", "merge"])
def test_mmcv_does_not_say_which_weights_are_the_average(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """mmdetection runs the hook with priority=49: the average then has the model's own names, and 'ema_' is live."""
    for priority, own, flat in ((49, EMA, PARAMETERS | LIVE), (50, LIVE, EMA)):
        file = tmp_path / f"{priority}.pth"
        torch.save({"meta": {}, "state_dict": own | _flat(flat), "optimizer": OPTIMIZER}, file)
        out = ["-o"] if command == "merge" else []
        capsys.readouterr()
        assert main([command, str(file), *out, str(tmp_path / "no")]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "'0.weight' and 'ema_0_weight'" in said
        advised = re.findall(r"--prefix (\S+) ", said)
        assert advised == [".", "ema_"], said
        target = tmp_path / f"{priority}"
        arguments = [command, str(file), *out, str(target), "--prefix", advised[priority == 50]]
        assert main([*arguments, *(["--checkpoint"] if command == "merge" else [])]) == 0
        check(read_checkpoint(target), EMA)


def test_a_list_without_names_needs_the_order_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two layers of one shape would change places."""
    torch.save(LIVE, tmp_path / "model.pt")
    for content in (LISTED, {"ema": LISTED, "step": 9}):
        torch.save(content, tmp_path / "a.pt")
        assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 2
        assert "8 tensors without names: give --model" in capsys.readouterr().err
        check(imported(tmp_path, content, "--model", str(tmp_path / "model.pt"), "--overwrite"), PARAMETERS)
    manifest = verify_checkpoint(tmp_path / "out")
    assert manifest.seen.updates == 9


@pytest.mark.parametrize("suffix", ["safetensors", "folder", "shards"])
def test_safetensors_files_and_folders_are_taken_as_they_are(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / ("a.safetensors" if suffix == "safetensors" else "a")
    if suffix == "safetensors":
        save_file(EMA, path)
    else:
        path.mkdir()
        first = dict(list(EMA.items())[:4]) if suffix == "shards" else EMA
        save_file(first, path / ("model-00001-of-00002.safetensors" if suffix == "shards" else "model.safetensors"))
        if suffix == "shards":
            save_file({name: EMA[name] for name in EMA if name not in first}, path / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"11 tensors \(--format state-dict takes them\)"):
        import_checkpoint(path, tmp_path / "out")
    notes = import_checkpoint(path, tmp_path / "out", format="state-dict").notes
    assert any("nothing in" in note for note in notes)
    check(read_checkpoint(tmp_path / "out"), EMA)


def test_an_export_of_ours_begins_another_run(tmp_path: Path) -> None:
    """There was no way back from export() to load()."""
    ema = ShardedEMA(build(1), decay=0.9)
    ema.update()
    ema.export(tmp_path / "export")
    import_checkpoint(tmp_path / "export", tmp_path / "out", format="state-dict")
    other = ShardedEMA(build(0), decay=0.9)
    other.load(tmp_path / "out")
    check(other.full_state_dict(), EMA)


def test_a_real_averaged_model_goes_on_counting(tmp_path: Path) -> None:
    net = build(0)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        with torch.no_grad():
            net[0].weight.add_(1)
        average.update_parameters(net)
    found = imported(tmp_path, average.state_dict())
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], value) for name, value in average.module.state_dict().items())
    assert verify_checkpoint(tmp_path / "out").seen.updates == 3


@pytest.mark.parametrize(
    ("content", "options", "why"),
    [
        (
            {"model": LIVE, "ema": EMA},
            "--key emma",
            "no tensors at --key emma; it has 'model': 11 tensors (--key model)",
        ),
        ({"a": {"model": LIVE, "ema": EMA}}, "--key a", "below it are 'a.model': 11 tensors (--key a.model)"),
        ({"ema": EMA}, "--prefix net", "--prefix net. begins no name; names begin with '0.' (2), '1.' (5)"),
        ({"ema": EMA, "swa": EMA}, "", "has several averages: 'ema': 11 tensors (--key ema)"),
        ({"x": EMA, "y": EMA}, "--format state-dict", "several dicts of tensors, and nothing says which one"),
        ({"state_dict": lit_ema()}, "", "have no dots, and no live weights in the same dict give them back"),
        (
            {"state_dict": {"a.b": torch.ones(2), "ab": torch.ones(2), "model_ema.ab": torch.ones(2)} | lit_ema()},
            "",
            "dots",
        ),
        ({"state_dict": under("a.", LIVE) | under("b.", LIVE) | lit_ema()}, "", "may be that of any of 'a.', 'b.'"),
        ({"losses": {"a": torch.tensor(1.0)}}, "--format state-dict", "has no dict of tensors"),
        ({"epoch": 3}, "", "none of the known formats"),
        ({"ema": EMA}, "--key ema --format timm", "goes with --format state-dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_could_mean_two_things_is_refused_and_is_no_damage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: Any, options: str, why: str
) -> None:
    torch.save(content, tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out"), *options.split()]) == 2
    said = capsys.readouterr().err
    assert why in said and said.count("\n") == 1 and len(said) < 1500
    assert not (tmp_path / "out").exists()


def test_it_is_said_what_was_taken_and_what_was_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, KNOWN["DiT"])
    said = capsys.readouterr().err
    assert "taken is 'ema': 11 tensors, the average; not taken: 'model': 11 tensors (--key takes another)" in said


class Entries(dict):  # type: ignore[type-arg]
    """As configurations are: a dict of a class of its own."""


@pytest.mark.parametrize("protocol", [1, 2, 3, 4, 5])
def test_a_file_of_any_pickle_protocol_gives_the_same(
    tmp_path: Path, protocol: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.load(weights_only=True) reads protocol 2 alone, and files of the others occur."""
    storage = torch.arange(12.0)
    tensors: dict[str, Any] = {
        "column": storage.view(3, 4)[:, 1],
        "part": storage[5:9],
        "tied": EMA["0.weight"],
        "weight": EMA["0.weight"],
        "half": torch.arange(3.0).bfloat16(),
        "parameter": nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(2, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "complex": torch.tensor([1 + 2j]),
        "flags": torch.tensor([True, False]),
    }
    others = {
        "args": argparse.Namespace(lr=0.1),
        "of its own class": Entries({"a": Entries(b=1)}),
        "plain": [
            "ä",
            b"bytes",
            bytearray(b"more"),
            {1, 2},
            frozenset({3}),
            2**70,
            1.5,
            None,
            (1, (2,)),
            torch.float16,
        ],
    }
    others["itself"] = [others]
    torch.save({"ema": tensors, "global_step": 7, **others}, tmp_path / "a.pt", pickle_protocol=protocol)
    import_checkpoint(tmp_path / "a.pt", tmp_path / "out", decay=0.9)
    found = read_checkpoint(tmp_path / "out")
    assert found.keys() == tensors.keys() and verify_checkpoint(tmp_path / "out").clock.batches == 7
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    tensors = verify_checkpoint(tmp_path / "out").averages["ema"]
    assert any({"tied", "weight"} <= {name, *stored.aliases} for name, stored in tensors.items()), "they stay tied"
    values = open_foreign(tmp_path / "a.pt").values
    if protocol > 1:  # which names a function of Python in place of the class
        assert isinstance(values["args"], StandIn) and values["args"].name == "argparse.Namespace"
        assert values["of its own class"]["a"]["b"] == 1
    if protocol != 2:
        monkeypatch.setattr(torch, "load", None)
        assert open_foreign(tmp_path / "a.pt").values["plain"][0] == "ä"


def test_an_old_file_of_another_protocol_is_read_after_the_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"ema": EMA}, tmp_path / "a.pt", pickle_protocol=4, _use_new_zipfile_serialization=False)
    assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pickle_protocol=4" in said and "torch.load(FILE, weights_only=False)" in said
    torch.save(torch.load(tmp_path / "a.pt", weights_only=False), tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 0
    check(read_checkpoint(tmp_path / "out"), EMA)


@pytest.mark.parametrize("inside", [True, False])
def test_merging_takes_the_average_of_an_ema_pytorch_file_alone(tmp_path: Path, inside: bool) -> None:
    """Its module holds the live weights and counters as well, and all of them were merged as one model."""
    counters = {"initted": torch.tensor([True]), "step": torch.tensor([5])}
    module = counters | under("online_model.", LIVE) | under("ema_model.", EMA)
    torch.save({"model": LIVE, "ema": module} if inside else module, tmp_path / "a.pt")
    assert main(["merge", str(tmp_path / "a.pt"), "-o", str(tmp_path / "out"), "--checkpoint"]) == 0
    check(read_checkpoint(tmp_path / "out"), EMA)


def test_merging_takes_the_only_weights_without_being_told(tmp_path: Path) -> None:
    """The same chooser, for checkpoints of which none has to be an average."""
    torch.save({"state_dict": EMA, **TRAINER}, tmp_path / "a.pt")
    choice = state_dicts.choose(open_foreign(tmp_path / "a.pt"), "a.pt")
    assert (choice.key, choice.is_average, choice.notes) == ("state_dict", False, ())
    assert choice.tensors.keys() == EMA.keys()


def test_a_folder_of_more_than_one_thing_is_read_by_its_index(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All safetensors files were imported together: a variant's or an optimizer's tensors became part of the model."""
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(EMA, folder / "model-00001-of-00001.safetensors")
    save_file({"exp_avg": torch.ones(2)}, folder / "optimizer_state.safetensors")
    save_file(LIVE, folder / "live.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(EMA, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    import_checkpoint(folder, tmp_path / "out", format="state-dict")
    assert read_checkpoint(tmp_path / "out").keys() == EMA.keys()
    check(read_checkpoint(tmp_path / "out"), EMA)
    import_checkpoint(folder, tmp_path / "other", key="live")
    check(read_checkpoint(tmp_path / "other"), LIVE)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00001.safetensors").rename(folder / "ema.safetensors")
    assert main(["import", str(folder), str(tmp_path / "no"), "--format", "state-dict"]) == 2
    said = capsys.readouterr().err
    assert "several models" in said and "(--key ema.safetensors)" in said
    assert main(["import", str(folder), str(tmp_path / "yes"), "--key", "ema.safetensors"]) == 0
    check(read_checkpoint(tmp_path / "yes"), EMA)


def test_a_pickled_module_is_refused_with_a_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """ultralytics saves whole modules; to read them would run code of the file. The advice then works."""
    torch.save({"epoch": 3, "ema": build(1)}, tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "'ema', a torch.nn.modules.container.Sequential" in said and "module.state_dict()" in said, said
    torch.save(torch.load(tmp_path / "a.pt", weights_only=False)["ema"].state_dict(), tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), str(tmp_path / "out"), "--format", "state-dict"]) == 0
    check(read_checkpoint(tmp_path / "out"), EMA)


def test_a_file_of_two_averages_is_refused_without_a_key(tmp_path: Path) -> None:
    """The first one of a GAN's two averages was taken, and nothing said so."""

    def state(value: float) -> dict[str, Tensor]:
        weights = {f"{start}_model.weight": torch.full((2, 2), value) for start in ("online", "ema")}
        return {"initted": torch.tensor(True), "step": torch.tensor(5), **weights}

    torch.save({"generator": state(1.0), "critic": state(2.0)}, tmp_path / "gan.pt")
    with pytest.raises(CheckpointError, match="several averages, under 'generator', 'critic': --key generator takes"):
        import_checkpoint(tmp_path / "gan.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    import_checkpoint(tmp_path / "gan.pt", tmp_path / "out", key="critic")
    assert torch.equal(read_checkpoint(tmp_path / "out")["weight"], torch.full((2, 2), 2.0))


def test_a_key_that_two_dicts_of_the_file_have_is_refused(tmp_path: Path) -> None:
    """``--key a.b`` took the first of the two, and said nothing of the other."""
    nested = {"weight": torch.zeros(2, 2)}
    dotted = {"weight": torch.ones(2, 2)}
    torch.save({"a": {"b": nested}, "a.b": dotted}, tmp_path / "both.pt")
    with pytest.raises(CheckpointError, match=r"--key a[.]b is ambiguous: 2 dicts of tensors"):
        import_checkpoint(tmp_path / "both.pt", tmp_path / "out", key="a.b")
    assert not (tmp_path / "out").exists()
    torch.save({"a": {"b": nested}, "a.b": nested}, tmp_path / "one.pt")  # one dict under two keys
    import_checkpoint(tmp_path / "one.pt", tmp_path / "out", key="a.b")
