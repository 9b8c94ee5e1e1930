"""Every README and page of the guide: its Python runs, its links lead somewhere, and files that it names are there."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support import ROOT

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import dist_ema
from dist_ema import ShardedEMA

FILES = sorted(
    [*ROOT.glob("*.md"), *(file for top in ("dist_ema", "launch", ".github") for file in ROOT.glob(f"{top}/**/*.md"))]
)
README, GUIDE = ROOT / "README.md", ROOT / "dist_ema" / "guide"
CHECKPOINTS, MERGING, SCHEDULES = GUIDE / "checkpoints.md", GUIDE / "merging.md", GUIDE / "schedules.md"
TEACHERS, SERVING, EVERY_RANK = GUIDE / "teachers.md", GUIDE / "serving.md", GUIDE / "on-every-rank.md"
WHICH, REINFORCEMENT = GUIDE / "which-weights.md", GUIDE / "reinforcement-learning.md"
#: Whose blocks other tests run: test_newcomer, and integrations/test_readme, test_torchtitan and test_grpo.
ELSEWHERE = {README: 2, GUIDE / "start.md": 1, GUIDE / "trainers.md": 6, REINFORCEMENT: 1}


def blocks(file: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", file.read_text(), re.MULTILINE | re.DOTALL)


def run(file: Path, number: int, names: dict[str, Any], folder: Path) -> dict[str, Any]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        exec(compile(blocks(file)[number], str(file), "exec"), names)
    finally:
        os.chdir(before)
    return names


def averaged(model: nn.Module) -> ShardedEMA:
    """An average of a model that has gone on since."""
    ema = ShardedEMA(model, decay=0.5)
    for _ in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.5)
        ema.update()
    return ema


def sharded(folder: Path) -> dict[str, Any]:
    """What blocks about checkpoints begin with."""
    model = fully_shard(nn.Linear(5, 3))
    return {"model": model, "ema": averaged(model), "dcp": dcp, "dist_ema": dist_ema}


def serve(folder: Path) -> None:
    class Server:
        loaded: dict[str, Tensor] = {}  # noqa: RUF012 - one server

        def load_weights(self, weights: Any) -> None:
            self.loaded |= dict(weights)

    names = sharded(folder) | {"torch": torch, "dist": dist, "server": Server(), "device": "cpu"}
    full = names["ema"].full_state_dict(dtype=torch.bfloat16)
    run(SERVING, 0, names, folder)
    if dist.get_rank() == 0:
        assert all(torch.equal(Server.loaded[name], value) for name, value in full.items())
        assert Server.loaded.keys() == full.keys()


def one_file(folder: Path) -> None:
    names = sharded(folder) | {"torch": torch, "dist": dist}
    ema = names["ema"]
    before = ema.fingerprint()
    run(EVERY_RANK, 0, names, folder)
    dist.barrier()
    for _ in range(2):
        ema.update()
    ema.load_state_dict(torch.load(folder / "ema.pt"))
    assert ema.fingerprint() == before


def evaluate_both(folder: Path) -> None:
    names = sharded(folder) | {"torch": torch, "evaluate": lambda model: model(torch.ones(1, 5))}
    found = run(WHICH, 0, names, folder)
    full = names["ema"].full_state_dict()
    if dist.get_rank() == 0:
        assert torch.allclose(found["averaged"], nn.functional.linear(torch.ones(1, 5), full["weight"], full["bias"]))
    assert not torch.equal(found["averaged"], found["live"])


def read_in_one_process(folder: Path) -> None:
    names = sharded(folder)
    found = run(CHECKPOINTS, 0, names, folder)["state"]
    assert found.keys() == {"weight", "bias"}


def with_dcp(folder: Path) -> None:
    names = sharded(folder)
    before = names["ema"].fingerprint()
    run(CHECKPOINTS, 1, names, folder)
    assert names["ema"].fingerprint() == before


def teach(folder: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 5))

    names = {"build": build, "fully_shard": fully_shard, "ShardedEMA": ShardedEMA, "Cosine": dist_ema.schedules.Cosine}
    found = run(TEACHERS, 0, names | {"torch": torch, "loader": torch.randn(3, 4, 5)}, folder)
    x = torch.ones(2, 5)
    with torch.no_grad():
        assert torch.equal(found["teacher"](x), found["gram_teacher"](x))
        assert not torch.equal(found["teacher"](x), found["student"](x))
    assert found["ema"].num_updates == 4


def anchor(folder: Path) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(5, 3)

    policy = fully_shard(build())
    optimizer = torch.optim.SGD(policy.parameters())
    names = {"build": build, "fully_shard": fully_shard, "ShardedEMA": ShardedEMA}
    ema = run(REINFORCEMENT, 1, names | {"policy": policy, "optimizer": optimizer}, folder)["ema"]
    policy(torch.ones(1, 5)).sum().backward()
    for _ in range(511):
        optimizer.step()
    assert (ema.num_updates, ema.progress.batches) == (1, 511)
    optimizer.step()
    assert ema.num_updates == 2


def export(folder: Path) -> None:
    from diffusers import UNet2DModel
    from diffusers.utils import logging as diffusers_logging
    from peft import LoraConfig, PeftModel, get_peft_model
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast

    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=16, vocab_size=10)
    model, base = AutoModelForCausalLM.from_config(config), AutoModelForCausalLM.from_config(config)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(4,),
        norm_num_groups=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    names = {"model": model, "tokenizer": tokenizer, "torch": torch, "ema": averaged(model)}
    names |= {"ema_of_unet": averaged(unet), "ema_of_adapter": averaged(adapter)}
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    diffusers_logging.set_verbosity_info()
    logging.getLogger("diffusers").addHandler(handler)
    run(CHECKPOINTS, 2, names, folder)
    logging.getLogger("diffusers").removeHandler(handler)
    diffusers_logging.set_verbosity_warning()
    assert not messages, "they name a temporary folder"
    loaded = AutoModelForCausalLM.from_pretrained(folder / "average")
    with names["ema"].average_parameters():
        pairs = zip(loaded.parameters(), model.parameters(), strict=True)
        assert all(torch.equal(here, there) for here, there in pairs)
    assert AutoModelForCausalLM.from_pretrained(folder / "average-bf16", dtype="auto").dtype == torch.bfloat16
    assert PreTrainedTokenizerFast.from_pretrained(folder / "average-bf16").vocab_size == 1
    assert UNet2DModel.from_pretrained(folder / "unet").config.sample_size == 8
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), folder / "adapter").peft_config


def merge(folder: Path) -> None:
    torch.manual_seed(0)
    ema = averaged(nn.Linear(5, 3))
    for step in (1000, 2000, 3000):
        ema.update()
        ema.save(folder / "run" / f"step-{step}")
    for name in ("base", "tuned"):
        ema.export(folder / name)
    run(MERGING, 0, {"torch": torch}, folder)
    assert load_file(folder / "between" / "model.safetensors")["weight"].dtype == torch.bfloat16
    ema.load(folder / "start")


def synthesize(folder: Path) -> None:
    model = nn.Linear(5, 3)
    names = {"ShardedEMA": ShardedEMA, "PowerFunction": dist_ema.PowerFunction, "model": model, "torch": torch}
    ema = run(MERGING, 1, names, folder)["ema"]
    before = Path.cwd()
    os.chdir(folder)  # where its snapshots go
    try:
        for _ in range(100):
            ema.update(batches=1000)
        ema.wait()
    finally:
        os.chdir(before)
    dist.barrier()
    names["snapshots"].folder = str(folder / "run" / "snapshots")
    assert [path.name for path in names["snapshots"].paths()][:2] == ["10000ba", "20000ba"]
    made = run(MERGING, 2, {"dist_ema": dist_ema}, folder)["made"]
    assert made[0].residual < 0.05
    assert torch.allclose(dist_ema.read_checkpoint(folder / "earlier")["bias"], model.bias.detach())


def register(folder: Path) -> None:
    cls = run(SCHEDULES, 0, {}, folder)["Annealing"]
    ShardedEMA(nn.Linear(2, 2), schedule=cls())
    del dist_ema.schedules.KINDS["Annealing"]  # the process goes on to other tests


RUNS: dict[tuple[Path, int], Callable[[Path], None]] = {
    (TEACHERS, 0): teach,
    (REINFORCEMENT, 1): anchor,
    (SERVING, 0): serve,
    (EVERY_RANK, 0): one_file,
    (WHICH, 0): evaluate_both,
    (CHECKPOINTS, 0): read_in_one_process,
    (CHECKPOINTS, 1): with_dcp,
    (CHECKPOINTS, 2): export,
    (MERGING, 0): merge,
    (MERGING, 2): synthesize,
    (SCHEDULES, 0): register,
}
NAMES = {f"{file.relative_to(ROOT)}:{number}": (file, number) for file, number in RUNS}


@pytest.mark.world_size(2)
@pytest.mark.parametrize("block", [name for name in NAMES if NAMES[name] != (CHECKPOINTS, 2)])
def test_lines_run_as_they_are_written(block: str, tmp_path: Path) -> None:
    """What is copied first must not fail at the first line."""
    RUNS[NAMES[block]](tmp_path)


@pytest.mark.world_size(1)
def test_lines_about_exports_run_as_they_are_written(tmp_path: Path) -> None:
    export(tmp_path)


def test_every_block_is_run() -> None:
    """A block that nobody runs is wrong after the next change."""
    found = {file: len(blocks(file)) for file in FILES if blocks(file)}
    known = {file: sum(file == one for one, _ in RUNS) for file, _ in RUNS}
    known[MERGING] += 1  # two are run one after the other
    known = {file: known.get(file, 0) + ELSEWHERE.get(file, 0) for file in known | ELSEWHERE}
    assert found == known, "give the block a test in RUNS"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_and_files_that_are_named_exist(file: Path) -> None:
    """Files move, and READMEs stay behind."""
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    missing = [link for link in links if link and not (file.parent / link).exists()]
    tops = ("dist_ema", "tests", "launch", "configs", ".ci", ".github")
    named = [name for name in re.findall(r"`([\w./-]+)`", text) if name.startswith(tuple(f"{top}/" for top in tops))]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_first_page_is_short() -> None:
    assert len(README.read_text().splitlines()) < 150


def links(file: Path) -> list[str]:
    """Relative links, without what follows ``#``."""
    found = re.findall(r"\]\(([^)]+)\)", file.read_text())
    return [link.partition("#")[0] for link in found if "://" not in link and not link.startswith("#")]


def test_the_guide_links_to_itself_alone() -> None:
    """It is a part of the wheel, where there is nothing else."""
    outside = [
        f"{file.name}: {link}"
        for file in GUIDE.glob("*.md")
        for link in links(file)
        if GUIDE not in (file.parent / link).resolve().parents
    ]
    assert not outside


def test_every_page_is_in_the_table_of_contents() -> None:
    pages = {file.name for file in GUIDE.glob("*.md")} - {"README.md"}
    assert pages == set(links(GUIDE / "README.md"))


def test_the_first_page_links_to_files_of_the_wheel() -> None:
    """The README is the wheel's description, too: a page is found there by the same path."""
    assert not [link for link in links(README) if not link.startswith("dist_ema/")]


def test_the_picture_of_the_speed_is_of_the_recorded_figures() -> None:
    """Figures are measured again, and pictures stay behind."""
    sys.path.insert(0, str(ROOT / "launch"))
    from benchmarks.chart import picture

    assert (GUIDE / "speed.svg").read_text() == picture(ROOT / "launch" / "benchmarks" / "README.md")


def headings(text: str) -> list[str]:
    """Names, calls and options of the reference, without its sentences."""
    return re.findall(r"^#+ .*$|^```text\n.*?^```$", text, re.MULTILINE | re.DOTALL)


def test_the_reference_has_every_public_call_and_option() -> None:
    """It fails, too, for a public name without a docstring. The sentences are compared by the site's own test."""
    sys.path.insert(0, str(ROOT / ".github" / "site"))
    import reference

    assert headings(reference.PAGE.read_text()) == headings(reference.page()), "run python .github/site/reference.py"


@pytest.mark.long
def test_the_site_has_no_dead_link(tmp_path: Path) -> None:
    """Needs ``.[docs]``. It also asks that the reference says what the docstrings say."""
    pytest.importorskip("zensical")
    sys.path.insert(0, str(ROOT / ".github" / "site"))
    import make_site
    import reference

    make_site.build(tmp_path / "site")
    assert {path.stem for path in (tmp_path / "site").glob("*.html")} >= {file.stem for file in GUIDE.glob("[a-z]*.md")}
    assert reference.PAGE.read_text() == reference.page(), "run python .github/site/reference.py"


def test_ci_runs_the_command_that_the_readme_gives() -> None:
    """A developer who follows the README has to see what the check of a change sees."""
    (command,) = re.findall(r"^(python3 -m venv .*pytest.*)$", README.read_text(), re.MULTILINE)
    steps = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    missing = [step for step in command.split(" && ") if step not in steps]
    assert not missing
