"""The model card of an export: a file without one does not say which average it is, or whether it is one."""

from __future__ import annotations

import json
from pathlib import Path

from support.models import CASES, batch, build

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dist_ema
from dist_ema import ShardedEMA
from dist_ema.errors import CheckpointError
from dist_ema.offline.export import export_checkpoint
from dist_ema.schedules import HalfLife, PowerFunction, Smoothing, Uniform, Window


def facts(directory: Path) -> dict[str, object]:
    """What the header of each file says, which is the same in all of them."""
    found = set()
    for file in directory.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            found.add(opened.metadata()["dist_ema"])
    (text,) = found
    facts: dict[str, object] = json.loads(text)
    return facts


def row(directory: Path, name: str) -> str | None:
    """The cell beside a name in the card's table."""
    for line in (directory / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == name:
            return cells[1]
    return None


def averaged(updates: int, **options: object) -> ShardedEMA:
    ema = ShardedEMA(nn.Linear(3, 2), **options)
    for _ in range(updates):
        ema.update(samples=8)
    return ema


@pytest.mark.parametrize(
    ("options", "updates", "expected"),
    [
        ({"half_life": "20ba"}, 101, "20ba"),
        ({"half_life": "80sp"}, 101, "80sp"),
        ({"schedule": Smoothing(0.5)}, 101, "1 updates"),
        ({"half_life": "2000ba"}, 101, "longer than the 100ba since the first copy"),
        ({"schedule": Window("5ba", "10ba")}, 101, None),
        ({}, 0, None),
    ],
)
def test_the_card_states_the_half_life(
    options: dict[str, object], updates: int, expected: str | None, tmp_path: Path
) -> None:
    averaged(updates, **options).export(tmp_path / "out")
    assert row(tmp_path / "out", "half life") == expected
    assert str(row(tmp_path / "out", "updates")).startswith(str(updates))
    assert row(tmp_path / "out", "training") == f"{updates}ba" + (f" {8 * updates}sp" if updates else "")


def test_the_half_life_is_that_of_the_profile(tmp_path: Path) -> None:
    """A wrong number on a card is copied into papers."""
    schedule = PowerFunction(sigma_rel=0.1)
    averaged(1001, schedule=schedule).export(tmp_path / "out")
    assert float(str(row(tmp_path / "out", "half life"))[:-2]) == pytest.approx(
        schedule.profile(1000).half_life, rel=0.01
    )


@pytest.mark.world_size(2)
def test_all_ranks_write_one_header(tmp_path: Path) -> None:
    """A header of another length on another rank would shift that rank's elements."""
    model = CASES["fsdp2"].wrap(build(scalar=False))
    ema = ShardedEMA(model, averages={"fast": 0.5, "slow": HalfLife("3ba")})
    for step in range(4):
        model(batch(step)).sum().backward()
        ema.update()
    ema.export(tmp_path / "out", name="slow", max_shard_size="1KB")
    dist.barrier()
    found = facts(tmp_path / "out")
    assert (found["average"], found["updates"], found["training"]) == ("slow", 4, "4ba")
    assert found["schedule"] == {"kind": "HalfLife", "half_life": "3ba"}
    assert found["library"] == f"dist_ema {dist_ema.__version__}"


def test_an_export_of_a_checkpoint_names_it_and_has_the_same_facts(tmp_path: Path) -> None:
    ema = averaged(5, decay=0.5)
    ema.save(tmp_path / "saved|run")
    ema.export(tmp_path / "live")
    export_checkpoint(tmp_path / "saved|run", tmp_path / "offline")
    assert facts(tmp_path / "live") == facts(tmp_path / "offline")
    text = (tmp_path / "offline" / "README.md").read_text()
    assert f"| exported from | `{tmp_path}/saved\\|run` |" in text
    assert row(tmp_path / "live", "exported from") is None


def test_a_card_of_the_users_own_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My model\n")
    averaged(2).export(tmp_path / "out", config_from=tmp_path / "README.md")
    assert (tmp_path / "out" / "README.md").read_text() == "# My model\n"


def test_a_merge_lists_its_sources(tmp_path: Path) -> None:
    for name in ("a", "b"):
        averaged(3).save(tmp_path / name)
    dist_ema.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "out", weights=[0.25, 0.75])
    assert row(tmp_path / "out", f"`{tmp_path}/a`") == "weight 0.25"
    assert row(tmp_path / "out", f"`{tmp_path}/b`") == "weight 0.75"
    dist_ema.merge([tmp_path / "a"], tmp_path / "out", force=True)
    assert row(tmp_path / "out", f"`{tmp_path}/b`") is None


def test_a_readme_does_not_make_a_folder_a_model(tmp_path: Path) -> None:
    """``force=True`` replaces a model's folder. A folder of other files would be lost, because it has a README.md."""
    averaged(3).save(tmp_path / "a")
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "README.md").write_text("# My thesis\n")
    (folder / "thesis.tex").write_text("text")
    with pytest.raises(CheckpointError, match="and nothing else"):
        dist_ema.merge([tmp_path / "a"], folder, force=True)
    assert sorted(file.name for file in folder.iterdir()) == ["README.md", "thesis.tex"]
    assert (folder / "README.md").read_text() == "# My thesis\n"


@pytest.mark.parametrize(
    "name",
    ["optimizer.pt", "thesis.tex", "run.log", "notes", "train.py", "notes.md", "results.json", "cat.safetensors"],
)
def test_force_does_not_remove_what_lies_beside_a_model(name: str, tmp_path: Path) -> None:
    """A training run keeps its optimizer in the folder of its model."""
    averaged(3).save(tmp_path / "a")
    out = tmp_path / "out"
    dist_ema.merge([tmp_path / "a"], out)
    (out / name).write_text("precious")
    with pytest.raises(CheckpointError, match=rf"holds '{name}', and force=True replaces .* nothing else"):
        dist_ema.merge([tmp_path / "a"], out, force=True)
    assert (out / name).read_text() == "precious"
    (out / name).unlink()
    (out / "tokenizer.model").write_text("of the model")
    dist_ema.merge([tmp_path / "a"], out, force=True)


def test_force_does_not_take_a_folder_of_adapters_for_a_model(tmp_path: Path) -> None:
    """Each file is a model of its own, and none of them would be written again."""
    averaged(3).save(tmp_path / "a")
    folder = tmp_path / "loras"
    folder.mkdir()
    for name in ("cat", "dog"):
        save_file({"w": torch.ones(2)}, folder / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"holds 'cat[.]safetensors', and force=True replaces"):
        dist_ema.merge([tmp_path / "a"], folder, force=True)
    assert sorted(file.name for file in folder.iterdir()) == ["cat.safetensors", "dog.safetensors"]


def test_force_replaces_a_model_of_the_hub(tmp_path: Path) -> None:
    """Shards, index, tokenizer, code and licence all belong to the model."""
    averaged(3).save(tmp_path / "a")
    model = tmp_path / "model"
    model.mkdir()
    for shard in (1, 2):
        save_file({f"w{shard}": torch.ones(2)}, model / f"model-0000{shard}-of-00002.safetensors")
    beside = ["model.safetensors.index.json", "config.json", "tokenizer.model", "modeling_x.py", "README.md", "LICENSE"]
    for name in beside:
        (model / name).write_text("{}")
    dist_ema.merge([tmp_path / "a"], model, force=True)
    assert (model / "merge.json").exists() and not (model / "modeling_x.py").exists()


@pytest.mark.parametrize(("updates", "expected"), [(0, "live weights"), (3, "an average of the weights")])
def test_the_card_claims_no_kind_of_average_that_it_is_not(updates: int, expected: str, tmp_path: Path) -> None:
    """A plain mean is not exponential, and weights before the first update are not an average."""
    averaged(updates, schedule=Uniform()).export(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert expected in text
    assert "exponential" not in text
