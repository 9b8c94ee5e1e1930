"""What a merge takes where several things could be meant, what it says, and that the advice of each refusal works."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dist_ema import ShardedEMA, merge, read_checkpoint, synthesize, verify_checkpoint
from dist_ema.checkpoints.reader import RunReader
from dist_ema.cli import main
from dist_ema.errors import CheckpointCorruptError, CheckpointError, CheckpointMismatchError, EMAConfigError

SUFFIX = ".safetensors"


def folder(path: Path, files: Mapping[str, Mapping[str, Tensor]], index: Mapping[str, str] | None = None) -> Path:
    """A Hugging Face folder."""
    path.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        save_file(dict(tensors), path / name)
    if index is not None:
        (path / f"model{SUFFIX}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": dict(index)}))
    return path


def full(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape or (2,), value, dtype=dtype)


def merged(paths: list[Path], out: Path, **options: Any) -> dict[str, Tensor]:
    merge(paths, out, **options)
    return load_file(out / f"model{SUFFIX}")


def advised(error: BaseException, option: str) -> str:
    """The value of an option that an error advises."""
    found = [value for value in re.findall(rf"{option} '?([^ ',;)]+)", str(error)) if value != "REGEX"]
    assert found, error
    return str(found[0])


# Folders.

#: What lies in each folder beside the model, and what of it is meant.
BESIDE: dict[str, dict[str, float]] = {
    "another set of names": {"consolidated.safetensors": 100},
    "an optimizer": {"optimizer_state.safetensors": 100},
    "an average": {"ema.safetensors": 100},
    "variants": {"model.fp16.safetensors": 100, "model.non_ema.safetensors": 200},
    "shards of another variant": {"model.fp16-00001-of-00002.safetensors": 100},
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("with_index", [False, True])
def test_a_folder_s_model_is_taken_and_nothing_beside_it(
    beside: str, with_index: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All files of a folder were mixed into the model, or called damaged where two had one name."""
    paths = []
    for number in (1.0, 3.0):
        main_file = "part-a.safetensors" if with_index else f"model{SUFFIX}"
        files = {main_file: {"w": full(number)}}
        files |= {name: {"w": full(number + more), "v": full(0)} for name, more in BESIDE[beside].items()}
        paths.append(folder(tmp_path / f"{number}", files, {"w": main_file} if with_index else None))
    found = merged(paths, tmp_path / "out")
    assert found.keys() == {"w"}
    assert torch.equal(found["w"], full(2.0))
    for name in BESIDE[beside]:  # it is said, with the option that takes the other
        assert any(name.split("-0")[0] in text and "--key" in text for text in caplog.messages)
    other, more = next(iter(BESIDE[beside].items()))
    found = merged(paths, tmp_path / "other", key=other.removesuffix(SUFFIX))
    assert torch.equal(found["w"], full(2.0 + more))


def test_the_index_says_which_of_two_values_counts(tmp_path: Path) -> None:
    """A tensor that was corrected later lies in a file of its own, and the old shard still has the stale one."""
    paths = []
    for value in (1.0, 3.0):
        files = {"old.safetensors": {"x": full(value), "y": full(-9)}, "new.safetensors": {"y": full(value)}}
        paths.append(folder(tmp_path / f"{value}", files, {"x": "old.safetensors", "y": "new.safetensors"}))
    assert torch.equal(merged(paths, tmp_path / "out")["y"], full(2.0))


def test_several_models_are_listed_with_the_option_that_takes_one(tmp_path: Path) -> None:
    files = {f"{name}{SUFFIX}": {"w": full(value)} for name, value in (("first", 1.0), ("second", 5.0))}
    paths = [folder(tmp_path / name, files) for name in "ab"]
    with pytest.raises(CheckpointError, match=r"first.safetensors \(--key first.safetensors\), second") as caught:
        merge(paths, tmp_path / "out")
    assert not isinstance(caught.value, CheckpointCorruptError)
    found = merged(paths, tmp_path / "out", key=advised(caught.value, "--key"))
    assert torch.equal(found["w"], full(1.0))
    with pytest.raises(CheckpointError, match=r"no file for --key third; it has first"):
        merge(paths, tmp_path / "no", key="third")
    # A file can be named itself.
    assert torch.equal(merged([path / "second.safetensors" for path in paths], tmp_path / "named")["w"], full(5.0))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """An interrupted download merged to half a model, with exit status 0."""
    names = [f"model-0000{number}-of-00002{SUFFIX}" for number in (1, 2)]
    paths = [folder(tmp_path / one, {names[0]: {"x": full(1)}}, dict(zip("xy", names, strict=True))) for one in "ab"]
    with pytest.raises(CheckpointError, match=f"has no {names[1]}.*1 tensors \\(y\\)"):
        merge(paths, tmp_path / "out")
    for path in paths:  # the numbers say it too
        (path / f"model{SUFFIX}.index.json").unlink()
    with pytest.raises(CheckpointError, match=f"has no {names[1]}, and has 1 of the 2 files"):
        merge(paths, tmp_path / "out")
    for path in paths:
        folder(path, {names[1]: {"y": full(2)}})
    assert merged(paths, tmp_path / "out").keys() == {"x", "y"}


@pytest.mark.parametrize("bad", ["../w.safetensors", "/etc/w.safetensors", "w.bin", 3])
def test_an_index_leads_to_no_file_outside_of_its_folder(bad: object, tmp_path: Path) -> None:
    save_file({"w": full(1)}, tmp_path / "w.safetensors")
    path = folder(tmp_path / "a", {})
    (path / f"model{SUFFIX}.index.json").write_text(json.dumps({"weight_map": {"w": bad}}))
    with pytest.raises(CheckpointCorruptError, match="not an index"):
        merge([path, path], tmp_path / "out")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_configuration_states_the_dtype_that_was_written(key: str, tmp_path: Path) -> None:
    """Readers with dtype="auto" take it from there: a merge in bf16 was loaded as fp32, at twice the memory."""
    config = {
        "architectures": ["X"],
        key: "float32",
        "rms_norm_eps": 1e-06,
        "text_config": {key: "float32", "name": "größer"},
        "quantization_config": {key: "float32"},
        "dtypes": ["float32"],
    }
    for number in (1, 2):
        folder(tmp_path / str(number), {f"model{SUFFIX}": {"w": full(number)}})
        (tmp_path / str(number) / "config.json").write_text(json.dumps(config))
    sources = [str(tmp_path / "1"), str(tmp_path / "2")]
    assert main(["merge", *sources, "-o", str(tmp_path / "out"), "--dtype", "bf16"]) == 0
    wanted = config | {key: "bfloat16", "text_config": {key: "bfloat16", "name": "größer"}}
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == wanted
    assert main(["merge", *sources, "-o", str(tmp_path / "own")]) == 0
    assert (tmp_path / "own" / "config.json").read_bytes() == (tmp_path / "2" / "config.json").read_bytes()
    ema = ShardedEMA(torch.nn.Linear(2, 2))
    ema.export(tmp_path / "export", dtype=torch.float16, config_from=tmp_path / "1")
    assert json.loads((tmp_path / "export" / "config.json").read_text())[key] == "float16"


def test_the_configuration_comes_along(tmp_path: Path) -> None:
    """A merged folder without config.json is none that from_pretrained reads. What belongs to the run stays."""
    for number in (1, 2):
        path = folder(tmp_path / f"{number}", {f"model{SUFFIX}": {"w": full(number)}})
        (path / "config.json").write_text(json.dumps({"step": number}))
        (path / "tokenizer.json").write_text("{}")
        (path / "trainer_state.json").write_text(json.dumps({"global_step": number}))
    merge([tmp_path / "2", tmp_path / "1"], tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"step": 2}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", f"model{SUFFIX}", "merge.json", "README.md"}
    merge([tmp_path / "out", tmp_path / "out"], tmp_path / "again")  # of what a merge has made, too


# Names.


def test_a_prefix_is_taken_off_where_the_names_are_then_those_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A trainer's directory of torch.distributed.checkpoint has every name under "model.", and an optimizer."""
    state = {"a.weight": full(1, 2, 2), "a.bias": full(1)}
    moments = {"exp_avg": full(9), "step": torch.ones(1)}
    dcp.save({"model": state, "optimizer": {"state": {"a.bias": moments}}}, checkpoint_id=tmp_path / "dcp")
    plain = folder(tmp_path / "plain", {f"model{SUFFIX}": {name: value + 2 for name, value in state.items()}})
    for order in ([tmp_path / "dcp", plain], [plain, tmp_path / "dcp"]):
        found = merged(order, tmp_path / order[0].name / "out")
        assert found.keys() == state.keys()
        assert torch.equal(found["a.bias"], full(2.0))
        assert any("under 'model.'" in text for text in caplog.messages)
        caplog.clear()


def test_of_two_prefixes_one_has_to_be_named(tmp_path: Path) -> None:
    two = {f"{module}.w": full(value) for module, value in (("student", 1.0), ("other", 5.0))}
    paths = [
        folder(tmp_path / "a", {f"model{SUFFIX}": two}),
        folder(tmp_path / "b", {f"model{SUFFIX}": {"w": full(3)}}),
    ]
    with pytest.raises(CheckpointError, match="--prefix other or --prefix student") as caught:
        merge(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = merged([paths[0]] * 2, tmp_path / "out", prefix=advised(caught.value, "--prefix"))
    assert torch.equal(found["w"], full(5.0))


@pytest.mark.parametrize("kind", ["average", "folder", "file", "safetensors", "dcp"])
def test_prefix_takes_a_module_out_of_every_kind_of_source(kind: str, tmp_path: Path) -> None:
    model = nn.ModuleDict({"net": nn.Linear(2, 2), "loss": nn.Linear(1, 1)})
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "source"
    if kind == "average":
        ShardedEMA(model, decay=0.9).save(path)
    elif kind == "folder":
        folder(path, {f"model{SUFFIX}": state})
    elif kind == "file":
        torch.save({"state_dict": state}, path)
    elif kind == "safetensors":
        path = tmp_path / f"source{SUFFIX}"
        save_file(state, path)
    else:
        dcp.save(state, checkpoint_id=path)
    for prefix in ("net", "net."):
        found = merged([path], tmp_path / f"out{prefix}", prefix=prefix)
        assert found.keys() == {"weight", "bias"}
        assert torch.equal(found["weight"], state["net.weight"])
    with pytest.raises(CheckpointError, match=r"--prefix nothing.* begins no name; names begin with"):
        merge([path], tmp_path / "no", prefix="nothing")


# Files with several dicts.


@pytest.mark.parametrize("keys", [("model", "ema"), ("model", "model_ema"), ("state_dict", "state_dict_ema")])
def test_a_training_file_s_average_is_taken_and_said(
    keys: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The live weights were merged, and nothing was said of the average beside them."""
    live, average = keys
    for number, value in (("a", 1.0), ("b", 3.0)):
        torch.save({live: {"w": full(value)}, average: {"w": full(value + 100)}, "step": 1}, tmp_path / number)
    paths = [tmp_path / "a", tmp_path / "b"]
    assert torch.equal(merged(paths, tmp_path / "out")["w"], full(102.0))
    assert any(f"'{average}'" in text and "--key" in text for text in caplog.messages)
    assert torch.equal(merged(paths, tmp_path / "live", key=live)["w"], full(2.0))
    said = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert any(average in note for note in said["notes"])


def test_ema_state_dict_is_the_average_nowhere_by_itself(tmp_path: Path) -> None:
    """mmengine swaps: its ``ema_state_dict`` has the live weights. Others' beside ``state_dict`` has to be named."""
    swapped = {"state_dict": {"w": full(1)}, "ema_state_dict": {"steps": torch.tensor(3), "module.w": full(9)}}
    torch.save(swapped, tmp_path / "mmengine")
    assert torch.equal(merged([tmp_path / "mmengine"], tmp_path / "a")["w"], full(1))
    torch.save({"state_dict": {"w": full(1)}, "ema_state_dict": {"w": full(9)}}, tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"'ema_state_dict': 1 tensor \(--key ema_state_dict\)"):
        merge([tmp_path / "other"], tmp_path / "b")
    assert torch.equal(merged([tmp_path / "other"], tmp_path / "b", key="ema_state_dict")["w"], full(9))


def test_a_dcp_directory_s_average_is_taken_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = {"model": {"w": full(1)}, "ema": {"w": full(9)}, "optim": {"state": {"w": {"exp_avg": full(5)}}}}
    dcp.save(content, checkpoint_id=tmp_path / "dcp")
    found = merged([tmp_path / "dcp"], tmp_path / "a")
    assert found.keys() == {"w"}
    assert torch.equal(found["w"], full(9))
    assert any("'ema', the average" in text for text in caplog.messages)
    assert torch.equal(merged([tmp_path / "dcp"], tmp_path / "b", key="model")["w"], full(1))


# Order.


def test_the_shell_s_order_becomes_the_order_of_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``checkpoint-*`` gives 1000, 200, 600: lawa:2 was the mean of 200 and 600."""
    for step in (200, 600, 1000):
        path = folder(tmp_path / f"checkpoint-{step}", {f"model{SUFFIX}": {"w": full(step)}})
        (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    paths = sorted(tmp_path.iterdir())
    assert torch.equal(merged(paths, tmp_path / "out", scheme="lawa:2")["w"], full(800.0))
    assert any("in the order of training" in text for text in caplog.messages)
    # A user's weights belong to the sources that they were given for.
    assert torch.equal(merged(paths, tmp_path / "given", weights=[1, 0, 0])["w"], full(1000.0))


NAMED: dict[str, tuple[list[str], bool]] = {
    "files of steps": (["step10.pt", "step9.pt"], True),
    "a folder below": (["step_10/model.pt", "step_9/model.pt"], True),
    "Lightning's": (["epoch=2-step=400.ckpt", "epoch=1-step=90.ckpt"], True),
    "numbers that contradict": (["epoch=1-step=400.ckpt", "epoch=2-step=90.ckpt"], False),
    "other names": (["tuned10.pt", "base9.pt"], False),
    "decimals": (["at-1.10.pt", "at-1.9.pt"], False),
    "no numbers": (["newer.pt", "older.pt"], False),
}


@pytest.mark.parametrize("names", NAMED)
def test_numbers_at_the_end_of_equal_names_are_an_order_and_nothing_else_is(names: str, tmp_path: Path) -> None:
    paths, ordered = [tmp_path / name for name in NAMED[names][0]], NAMED[names][1]
    for path, value in zip(paths, (10.0, 9.0), strict=True):  # the newer one first
        path.parent.mkdir(exist_ok=True)
        torch.save({"w": full(value)}, path)
    if ordered:
        assert torch.equal(merged(paths, tmp_path / "out", scheme="lawa:1")["w"], full(10.0))
        return
    with pytest.raises(EMAConfigError, match="nothing states the order") as caught:
        merge(paths, tmp_path / "out", scheme="lawa:1")
    weights = [float(text) for text in str(caught.value).rpartition("--weights ")[2].split(" ")[0].split(",")]
    assert torch.equal(merged(paths, tmp_path / "given", weights=weights)["w"], full(9.0))  # as the advice says
    merge(paths, tmp_path / "mean")  # a plain mean needs no order


def test_a_training_file_s_step_counts_before_its_name(tmp_path: Path) -> None:
    for name, step in (("run1.pt", 500), ("run2.pt", 100)):
        torch.save({"model": {"w": full(step)}, "global_step": step}, tmp_path / name)
    paths = [tmp_path / "run1.pt", tmp_path / "run2.pt"]
    assert torch.equal(merged(paths, tmp_path / "out", scheme="lawa:1")["w"], full(500.0))


def test_names_that_contradict_the_steps_of_some_sources_are_no_order(tmp_path: Path) -> None:
    """Two of three files state their step, and their names count the other way round."""
    for name, step in (("run1.pt", 500), ("run2.pt", None), ("run3.pt", 100)):
        state = {"model": {"w": full(1.0)}}
        torch.save(state if step is None else {**state, "global_step": step}, tmp_path / name)
    paths = [tmp_path / name for name in ("run1.pt", "run2.pt", "run3.pt")]
    with pytest.raises(EMAConfigError, match=r"nothing states the order.*step 500.*step 100"):
        merge(paths, tmp_path / "out", scheme="lawa:1")


# Sums that mean nothing, and values that are lost.


def test_packed_integers_that_differ_are_refused_and_counters_are_not(tmp_path: Path) -> None:
    """The newest source's packed weights fitted neither the summed scales nor the other weights."""
    for name, value in (("a", 1), ("b", 2)):
        packed = torch.full((4, 4), value, dtype=torch.int32)
        state = {"q.qweight": packed, "q.scales": full(value), "n": torch.tensor(value), "same": torch.arange(5)}
        folder(tmp_path / name, {f"model{SUFFIX}": state})
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(CheckpointMismatchError, match=r"are no counters: 'q.qweight'") as caught:
        merge(paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = merged(paths, tmp_path / "out", newest=advised(caught.value, "--newest"))
    assert torch.equal(found["q.qweight"], torch.full((4, 4), 2, dtype=torch.int32))
    assert torch.equal(found["q.scales"], full(1.5))
    assert int(found["n"]) == 2
    assert torch.equal(merged(paths, tmp_path / "first", weights=[1, 0])["q.qweight"], torch.ones(4, 4).int())


@pytest.mark.parametrize("scale", ["q.weight_scale_inv", "q.weight.scale", "q.scale_weight"])
def test_float8_values_beside_their_scales_are_refused(scale: str, tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        state = {"q.weight": full(value, dtype=torch.float8_e4m3fn), scale: full(value), "x": full(value)}
        folder(tmp_path / name, {f"model{SUFFIX}": state})
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(
        CheckpointMismatchError, match=r"'q\.weight' of .* is torch.float8_e4m3fn, and its scale is"
    ) as caught:
        merge(paths, tmp_path / "out")
    found = merged(paths, tmp_path / "out", newest=advised(caught.value, "--newest"))
    assert torch.equal(found["q.weight"].float(), full(2.0))
    assert torch.equal(found[scale], full(2.0))
    assert torch.equal(found["x"], full(1.5))


def test_float8_values_without_scales_are_summed(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        folder(tmp_path / name, {f"model{SUFFIX}": {"w": full(value, dtype=torch.float8_e4m3fn)}})
    assert torch.equal(merged([tmp_path / "a", tmp_path / "b"], tmp_path / "out")["w"].float(), full(1.5))


def test_what_is_not_finite_is_counted_and_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = torch.ones(100_000)
    bad[[7, 99_999]] = torch.tensor([torch.nan, torch.inf])
    folder(tmp_path / "a", {f"model{SUFFIX}": {"w": torch.ones(100_000), "v": full(7e4)}})
    folder(tmp_path / "b", {f"model{SUFFIX}": {"w": bad, "v": full(8e4)}})
    paths = [tmp_path / "a", tmp_path / "b"]
    made = merge(paths, tmp_path / "out", dtype=torch.float16)
    assert made.notes == (
        f"{paths[1]} has 2 elements that are NaN or infinite, in 'w'",
        f"2 elements of {tmp_path / 'out'} are beyond its dtype, so infinite or NaN there, in 'v': give a wider one "
        "(--dtype bf16 or fp32)",
    )
    assert set(made.notes) <= set(caplog.messages)
    assert merge(paths, tmp_path / "wide", dtype=torch.bfloat16).notes == made.notes[:1]  # the advice
    assert not merge([paths[0]] * 2, tmp_path / "good").notes
    assert main(["merge", *map(str, paths), "-o", str(tmp_path / "again")]) == 0
    assert "2 elements that are NaN" in capsys.readouterr().err


# One source, and an output that exists.


def test_one_source_is_copied_bit_for_bit(tmp_path: Path) -> None:
    """A sum would lose the sign of -0.0 and the bits of a NaN."""
    bits = torch.tensor([-(2**31), 0x7FC00001, 0x7F800000, 1], dtype=torch.int32)
    state = {"w": bits.view(torch.float32), "p": torch.arange(6, dtype=torch.int8)}
    torch.save({"model": {"w": full(0)}, "ema": state}, tmp_path / "x.pt")
    found = merged([tmp_path / "x.pt"], tmp_path / "out")
    assert torch.equal(found["w"].view(torch.int32), bits)
    assert torch.equal(found["p"], state["p"])
    for scheme in ("uniform", "lawa:1", "ema:.5", "wsm:sqrt"):
        assert merge([tmp_path / "x.pt"], tmp_path / scheme, scheme=scheme).weights == (1.0,)


def test_a_file_without_tensors_is_no_model(tmp_path: Path) -> None:
    """A folder without weights came out, and nothing was said."""
    save_file({}, tmp_path / f"empty{SUFFIX}")
    with pytest.raises(CheckpointError, match="has no tensors"):
        merge([tmp_path / f"empty{SUFFIX}"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_are_normalized_if_that_is_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [folder(tmp_path / name, {f"model{SUFFIX}": {"w": full(value)}}) for name, value in (("a", 1), ("b", 5))]
    with pytest.raises(EMAConfigError, match=r"normalize=True to divide them by their sum, or any_sum=True"):
        merge(paths, tmp_path / "out", weights=[1, 3])
    assert main(["merge", *map(str, paths), "-o", str(tmp_path / "out"), "--weights", "1,3"]) == 2
    said = capsys.readouterr().err
    assert said == (
        "dist-ema: --weights [1.0, 3.0] sum to 4, not to 1: give --normalize to divide them by "
        "their sum, or --any-sum if that sum is meant\n"
    )
    for option in ("--normalize", "--any-sum"):
        assert main(["merge", *map(str, paths), "-o", str(tmp_path / option), "--weights", "1,3", option]) == 0
    assert torch.equal(merged(paths, tmp_path / "out", weights=[1, 3], normalize=True)["w"], full(4.0))
    with pytest.raises(EMAConfigError, match="no factor makes them sum to 1"):
        merge(paths, tmp_path / "no", weights=[1, -1], normalize=True)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_force_replaces_a_model_and_nothing_else(checkpoint: bool, tmp_path: Path) -> None:
    ema = ShardedEMA(nn.Linear(3, 3), decay=0.9)
    for number in (0, 1):
        ema.update()
        ema.save(tmp_path / f"{number}")
    paths, out = [tmp_path / "0", tmp_path / "1"], tmp_path / "out"
    merge(paths, out, checkpoint=checkpoint, weights=[0, 1])
    with pytest.raises(CheckpointError, match="force=True, which replaces it"):
        merge(paths, out, checkpoint=checkpoint)
    merge(paths, out, checkpoint=checkpoint, force=True)
    assert [source["weight"] for source in json.loads((out / "merge.json").read_text())["sources"]] == [0.5, 0.5]
    if checkpoint:
        verify_checkpoint(out)
    run = folder(tmp_path / "run", {f"model{SUFFIX}": {"w": full(1)}})
    (run / "checkpoint-1").mkdir()
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "thesis.tex").write_text("")
    for place in (run, notes, tmp_path / "0"):
        before = sorted(place.rglob("*"))
        with pytest.raises(CheckpointError, match=r"give another path|give a path"):
            merge(paths, place, checkpoint=checkpoint, force=True)
        assert sorted(place.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1", "notes", "out", "run"]


def test_force_keeps_the_old_one_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also on file systems that cannot exchange two names."""
    from dist_ema.storage import staging

    paths = [folder(tmp_path / name, {f"model{SUFFIX}": {"w": full(value)}}) for name, value in (("a", 1), ("b", 5))]
    out = tmp_path / "out"
    merge(paths, out)
    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    monkeypatch.setattr(staging.Staging, "put_in_place", lambda self: (_ for _ in ()).throw(OSError(5, "broken")))
    with pytest.raises(CheckpointError, match="broken"):
        merge(paths, out, weights=[0, 1], force=True)
    assert torch.equal(load_file(out / f"model{SUFFIX}")["w"], full(3.0))
    monkeypatch.undo()
    monkeypatch.setattr(staging, "exchange", lambda first, second: False)
    assert torch.equal(merged(paths, out, weights=[0, 1], force=True)["w"], full(5.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]


# Ties.


def test_a_name_may_be_missing_where_it_is_tied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """``save_pretrained`` writes a tied tensor once, other libraries twice."""
    torch.manual_seed(0)
    embed = torch.randn(5, 3)
    folder(tmp_path / "once", {f"model{SUFFIX}": {"embed": embed, "bias": full(0)}})
    folder(tmp_path / "twice", {f"model{SUFFIX}": {"embed": embed + 1, "head": embed + 1, "bias": full(0)}})
    for order in (("once", "twice"), ("twice", "once")):
        found = merged([tmp_path / name for name in order], tmp_path / "-".join(order))
        assert found.keys() == {"embed", "bias"} | ({"head"} if order[1] == "twice" else set())
        for name in found.keys() & {"embed", "head"}:
            torch.testing.assert_close(found[name], embed + 0.5)
        assert any("'head' is 'embed'" in text for text in caplog.messages)
        caplog.clear()


def test_a_name_that_is_missing_without_a_tie_is_refused(tmp_path: Path) -> None:
    """Zeros are equal by chance; a head of its own is none; and a configuration may say that nothing is tied."""
    torch.manual_seed(0)
    embed = torch.randn(5, 3)
    once = folder(tmp_path / "once", {f"model{SUFFIX}": {"embed": embed}})
    for name, head in (("other", embed + 1), ("zeros", None)):
        values = (
            {"embed": torch.zeros(5, 3), "head": torch.zeros(5, 3)} if head is None else {"embed": embed, "head": head}
        )
        folder(tmp_path / name, {f"model{SUFFIX}": values})
        with pytest.raises(CheckpointMismatchError, match="once has no 'head'"):
            merge([once, tmp_path / name], tmp_path / "out")
    folder(tmp_path / "twice", {f"model{SUFFIX}": {"embed": embed, "head": embed.clone()}})
    (once / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    with pytest.raises(CheckpointMismatchError, match="once has no 'head'"):
        merge([once, tmp_path / "twice"], tmp_path / "out")


# A checkpoint that is replaced while it is read.


@pytest.mark.parametrize("call", ["merge", "synthesize"])
def test_a_checkpoint_that_a_save_replaces_meanwhile_is_read_again(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called damaged, since the files that its old manifest names were gone."""
    ema = ShardedEMA(nn.Linear(3, 3), decay=0.5)
    for _ in range(3):
        ema.update()
    ema.save(tmp_path / "a")
    for _ in range(3):
        ema.update()
    ema.save(tmp_path / "b")
    opened: list[Path] = []
    of = RunReader.of

    def replaced(path: Path, *given: Any) -> RunReader:
        opened.append(path)
        if len(opened) == 2:  # between the manifest and the files
            ema.save(tmp_path / "b")
        return of(path, *given)

    monkeypatch.setattr(RunReader, "of", replaced)
    paths = [tmp_path / "a", tmp_path / "b"]
    if call == "merge":
        merge(paths, tmp_path / "out", checkpoint=True)
        assert read_checkpoint(tmp_path / "out").keys() == {"weight", "bias"}
    else:
        synthesize(paths, tmp_path / "out", target="decay=.5")
    assert len(opened) >= 3


def test_a_checkpoint_that_is_replaced_again_and_again_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ema = ShardedEMA(nn.Linear(3, 3), decay=0.5)
    ema.update()
    ema.save(tmp_path / "a")
    of = RunReader.of

    def replaced(*given: Any) -> RunReader:
        ema.save(tmp_path / "a")
        return of(*given)

    monkeypatch.setattr(RunReader, "of", replaced)
    with pytest.raises(CheckpointError, match="a save replaced the checkpoint each of the 3 times") as caught:
        merge([tmp_path / "a"], tmp_path / "out")
    assert not isinstance(caught.value, CheckpointCorruptError)


# The command.


def test_the_command_s_refusals_have_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    torch.save({"a": {"w": full(1)}, "b": {"w": full(3)}}, tmp_path / "x.pt")
    command = ["merge", str(tmp_path / "x.pt"), "-o", str(tmp_path / "out")]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "--key a" in said and "--key b" in said
    assert main([*command, "--key", "b"]) == 0
    assert torch.equal(load_file(tmp_path / "out" / f"model{SUFFIX}")["w"], full(3.0))
    assert main([*command, "--key", "a"]) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*command, "--key", "a", "--force"]) == 0
    assert torch.equal(load_file(tmp_path / "out" / f"model{SUFFIX}")["w"], full(1.0))
    capsys.readouterr()
    assert main(["merge", str(tmp_path / "gone"), "-o", str(tmp_path / "no")]) == 2
    assert "gone does not exist" in capsys.readouterr().err


# A checkpoint and its export.


class Tied(nn.Module):
    """A tied pair, a frozen part, and more elements than are read at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(600, 501)
        self.head = nn.Linear(501, 600, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(3, 3).requires_grad_(False)


def test_diff_compares_a_checkpoint_with_its_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Whether a published export is that of this checkpoint could not be asked."""
    torch.manual_seed(0)
    model = Tied()
    ema = ShardedEMA(model, averages={"fast": 0.5, "slow": 0.9})
    ema.update()
    with torch.no_grad():
        model.embed.weight.add_(1)
    ema.update()
    ema.save(tmp_path / "ema")
    for name in ("fast", "slow"):
        ema.export(tmp_path / name, name=name, max_shard_size="500KB")
    ema.export(tmp_path / "half", name="fast", dtype=torch.float16)
    checkpoint = str(tmp_path / "ema")
    for name in ("fast", "slow"):
        for pair in ([checkpoint, str(tmp_path / name)], [str(tmp_path / name), checkpoint]):
            assert main(["diff", *pair, "--name", name]) == 0
            assert "all tensors are equal" in capsys.readouterr().out
    assert main(["diff", checkpoint, str(tmp_path / "slow"), "--name", "fast", "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)["tensors"]
    different = [row for row in rows if not row["equal"]]
    assert [(row["average"], row["name"]) for row in different] == [("fast", "embed.weight")]
    expected = (
        ema.full_state_dict("fast")["embed.weight"].double() - ema.full_state_dict("slow")["embed.weight"].double()
    )
    assert different[0]["distance"] == pytest.approx(float(expected.norm()))
    assert main(["diff", checkpoint, str(tmp_path / "half"), "--name", "fast"]) == 1  # rounded, so not the same bits
    capsys.readouterr()
    assert main(["diff", checkpoint, str(tmp_path / "fast")]) == 2
    said = capsys.readouterr().err
    assert "'fast', 'slow'" in said and "--name" in said
    folder(tmp_path / "other", {f"model{SUFFIX}": {"embed.weight": full(1)}})
    assert main(["diff", checkpoint, str(tmp_path / "other"), "--name", "fast"]) == 2
    assert "'frozen.weight' is missing in" in capsys.readouterr().err
    (data,) = (tmp_path / "ema").glob("data-*/averages/fast/model.safetensors")
    damaged = bytearray(data.read_bytes())
    damaged[-5] ^= 1
    data.write_bytes(bytes(damaged))
    assert main(["diff", checkpoint, str(tmp_path / "fast"), "--name", "fast"]) == 1
    assert "is damaged" in capsys.readouterr().err


def test_a_trainer_s_folder_points_at_the_average_inside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ShardedEMA(nn.Linear(2, 2), decay=0.9).save(tmp_path / "checkpoint-5" / "ema")
    inside = str(tmp_path / "checkpoint-5" / "ema")
    for command in (
        ["export", "X", str(tmp_path / "out")],
        ["merge", "X", "-o", str(tmp_path / "out")],
        ["inspect", "X"],
    ):
        assert main([word.replace("X", str(tmp_path / "checkpoint-5")) for word in command]) == 2
        assert inside in capsys.readouterr().err
    assert main(["export", inside, str(tmp_path / "out")]) == 0


def test_a_tied_tensor_of_a_transformers_model_is_exported_once(tmp_path: Path) -> None:
    """As save_pretrained does: the export was nearly twice as large. A plain model's has both names, for its load."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=90, n_positions=8)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "base")
    ema = ShardedEMA(model, decay=0.9)
    ema.update()
    ema.save(tmp_path / "ema")
    ema.export(tmp_path / "export")
    names = load_file(tmp_path / "base" / f"model{SUFFIX}").keys()
    assert "lm_head.weight" not in names
    assert load_file(tmp_path / "export" / f"model{SUFFIX}").keys() == names
    options = {"config": ["--config-from", str(tmp_path / "base")], "layout": ["--layout", "transformers"], "plain": []}
    for name, given in options.items():
        assert main(["export", str(tmp_path / "ema"), str(tmp_path / name), *given]) == 0
        found = load_file(tmp_path / name / f"model{SUFFIX}").keys()
        assert found == names | ({"lm_head.weight"} if name == "plain" else set())
        assert main(["diff", str(tmp_path / "ema"), str(tmp_path / name)]) == 0
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "config")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    ShardedEMA(Tied(), decay=0.9).export(tmp_path / "own")
    assert {"embed.weight", "head.weight"} <= load_file(tmp_path / "own" / f"model{SUFFIX}").keys()
