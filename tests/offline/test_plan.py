"""Plans against what is really allocated and written: a formula beside the library would drift from it."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from support import ROOT
from support.models import CASES
from support.zero_models import Net, make_engine

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ema import ShardedEMA
from dist_ema.cli import main
from dist_ema.engines import detect
from dist_ema.errors import EMAConfigError
from dist_ema.formats.manifest import NAME
from dist_ema.geometry.spec import TensorSpec
from dist_ema.planning.architecture import Architecture, of_config, of_module, parse_count
from dist_ema.planning.families import FAMILIES
from dist_ema.planning.layouts import Layout, simulate
from dist_ema.planning.plan import make_options, predict, rank_cost

pytestmark = pytest.mark.core

MODELS = ROOT / "configs" / "models"
#: The way to wrap (tests/support/models.py), the engine, what it is given besides, ranks.
RUNS = [
    ("plain", "plain", {}, 2),
    ("ddp", "ddp", {}, 1),
    ("ddp", "ddp", {}, 3),
    ("fsdp1-full-orig", "fsdp1", {}, 1),
    ("fsdp1-full-orig", "fsdp1", {}, 3),
    ("fsdp1-full-orig", "fsdp1", {}, 4),
    ("fsdp1-hybrid-orig", "fsdp1", {"replicate": 2}, 4),
    *[("fsdp2", "fsdp2", {}, size) for size in (1, 2, 3, 4)],
    ("hsdp", "hsdp", {"replicate": 3}, 3),
    ("hsdp", "hsdp", {"replicate": 2}, 4),
    ("tp", "tp", {"tensor_parallel": 3}, 3),
    ("fsdp2-tp", "fsdp2+tp", {"tensor_parallel": 2}, 4),
]
ZERO_RUNS = [(0, "fp32", 3), (0, "bf16", 2), (1, "fp32", 1), (1, "bf16", 4), (2, "bf16", 3), (3, "fp32", 2)]
ZERO_RUNS += [(3, "bf16", 3), (3, "bf16", 4)]


def styled(model: nn.Module) -> Architecture:
    """With what models.CASES makes of the blocks under tensor parallelism."""
    dims = {"up.weight": 0, "up.bias": 0, "down.weight": 1, "down.bias": None}
    styles = {f"module.{block}.{name}": dim for block in (0, 1) for name, dim in dims.items()}
    return replace(of_module(model), styles=styles)


def described(spec: TensorSpec) -> dict[str, Any]:
    """All that there is of a spec but the process group."""
    replicas = spec.replicas
    return {**vars(spec), "runs": tuple(spec.runs), "replicas": replicas and (replicas.index, replicas.size)}


def check(ema: ShardedEMA, model: Architecture, layout: Layout, rank: int, path: Path) -> None:
    """The plan of this rank is what ``ema`` holds, and that of the checkpoint what it writes. Collective."""
    ema.update()
    for found, planned in zip(
        ema._average.engine.specs(), simulate(model.tensors, layout, rank, model.styles), strict=True
    ):
        assert described(found) == described(planned)
    options = make_options(averages=2)
    cost = rank_cost(model, layout, options, rank)
    assert sum(ema._average.shadow.nbytes().values()) == cost.shadow + cost.buffers
    assert ema._average.shadow.scratch.nbytes() <= cost.scratch
    ema.save(path)
    dist.barrier()
    files = predict(model, layout, options).files
    data = next(path.glob("data-*"))
    written = {file.relative_to(data).as_posix(): file.stat().st_size for file in data.rglob("*") if file.is_file()}
    assert {name.partition("/")[2]: size for name, size in files.items() if name != NAME} == written
    assert abs((path / NAME).stat().st_size - files[NAME]) < 16, "the clocks in it may differ, and nothing else"


@pytest.mark.world_size()
@pytest.mark.parametrize(("case", "engine", "sizes", "world_size"), RUNS)
def test_the_plan_is_what_is_allocated_and_written(
    case: str, engine: str, sizes: dict[str, int], rank: int, world_size: int, tmp_path: Path
) -> None:
    ema = ShardedEMA(CASES[case].model(), averages={"ema1": 0.5, "ema2": 0.25})
    layout = Layout(engine, world_size, **sizes)
    check(ema, styled(CASES[case].plain()), layout, rank, tmp_path / "saved")


@pytest.mark.world_size()
@pytest.mark.parametrize(("stage", "dtype", "world_size"), ZERO_RUNS)
def test_the_plan_of_deepspeed_is_what_is_allocated_and_written(
    stage: int, dtype: str, rank: int, world_size: int, tmp_path: Path
) -> None:
    """fp32 masters; pieces that cut parameters, with padding in the last."""
    ema = ShardedEMA(make_engine(stage, dtype), averages={"ema1": 0.5, "ema2": 0.25})
    ema._average.engine.stepped = lambda: True  # type: ignore[method-assign]
    plain = Net()
    for parameter in plain.parameters():  # not the buffers, which DeepSpeed leaves in fp32
        parameter.data = parameter.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    check(ema, of_module(plain), Layout(f"zero{stage}", world_size), rank, tmp_path / "saved")


def test_what_is_kept_while_an_average_is_in_use() -> None:
    """The live values of buffers, and the live weights where the dtype of the shadow is another."""
    for dtype in (torch.float32, torch.bfloat16):
        model = CASES["plain"].plain().to(dtype)
        ema = ShardedEMA(model, decay=0.5)
        ema.update()
        cost = rank_cost(of_module(model), Layout("plain", 1), make_options(), 0)
        with ema.average_parameters():
            swap = ema._average.condition.swap
            assert swap is not None
            assert sum(tensor.nbytes for tensor in swap._kept.values()) == cost.in_use
        assert (cost.in_use > cost.buffers) == (dtype == torch.bfloat16)


# Large runs: the real wrappers, on the meta device, in a group whose other ranks do not exist.


@contextmanager
def fake_group(rank: int, world_size: int) -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


# Meshes of different shapes: torch keeps what it computed for a mesh, and takes an equal one of another rank for it.
@pytest.mark.parametrize(
    ("engine", "mesh", "rank"), [("fsdp2", (8192,), 300), ("fsdp2", (8193,), 8192), ("hsdp", (32, 256), 8191)]
)
def test_a_rank_of_thousands_is_planned_as_the_engine_has_it(engine: str, mesh: tuple[int, ...], rank: int) -> None:
    world_size = math.prod(mesh)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(48, 8193, bias=False), nn.Linear(16, 300), nn.BatchNorm1d(257))
    layout = Layout(engine, world_size, replicate=mesh[0] if len(mesh) == 2 else 1)
    planned = simulate(of_module(model).tensors, layout, rank, {})
    with fake_group(rank, world_size):
        fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")[-len(mesh) :]))
        found = detect(model).specs()
    assert [described(spec) for spec in found] == [described(spec) for spec in planned]


# Models.


@pytest.mark.parametrize("by", ["transformers", "config.json"])
def test_published_models_have_their_published_sizes(by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "transformers":
        pytest.importorskip("transformers")
    else:
        monkeypatch.setitem(sys.modules, "transformers", None)
    for name, count in (("llama-3-70b", 70_553_706_496), ("deepseek-v3", 671_026_404_352)):
        model = of_config(MODELS / f"{name}.json", None)
        assert model.parameters == count
        dtypes = {spec.name: spec.dtype for spec in model.tensors if spec.kind == "parameter"}
        for key in [key for key in dtypes if key.endswith("mlp.gate.weight")]:
            assert dtypes.pop(key) in (torch.bfloat16, torch.float32)  # routers: transformers 5.24 keeps them in fp32
        assert set(dtypes.values()) == {torch.bfloat16}
        styles = {key.rpartition("layers.5.")[2]: dim for key, dim in model.styles.items() if ".5." in key}
        assert styles["self_attn.o_proj.weight" if "llama" in name else "mlp.shared_experts.down_proj.weight"] == 1
        assert 0 in styles.values()


def test_tied_weights_of_a_config_are_one_tensor(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=24, n_head=2, vocab_size=50, n_positions=16)
    config.architectures = ["GPT2LMHeadModel"]
    config.save_pretrained(tmp_path)
    model = of_config(tmp_path, torch.float32)
    real = transformers.GPT2LMHeadModel(config)
    assert {spec.name: spec.shape for spec in model.tensors} == {
        name: value.shape for name, value in real.named_parameters()
    }
    assert [spec.aliases for spec in model.tensors if spec.aliases] == [("lm_head.weight",)]


SIZES = {
    "vocab_size": 70,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT = {
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_routed_experts": 3,
    "n_shared_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
}
#: Each with what changes its tensors.
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("llama", SIZES),
    ("llama", SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 16, "tie_word_embeddings": True}),
    ("llama", SIZES | {"num_key_value_heads": None, "head_dim": None}),
    ("llama", {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}),
    ("mistral", SIZES),
    ("qwen2", SIZES | {"num_key_value_heads": None}),
    ("mixtral", SIZES | {"num_local_experts": 3}),
    ("qwen2", SIZES | {"tie_word_embeddings": True}),
    ("qwen3", SIZES),
    ("qwen3", SIZES | {"head_dim": 12, "attention_bias": True}),
    ("gemma", SIZES),
    ("gemma", SIZES | {"head_dim": 12, "tie_word_embeddings": False}),
    ("deepseek_v3", SIZES | LATENT),
    ("deepseek_v3", SIZES | LATENT | {"q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 0}),
    ("gpt2", {"vocab_size": 70, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}),
    ("gpt2", {"vocab_size": 70, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_inner": 40, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(("family", "values"), CONFIGS, ids=lambda one: one if isinstance(one, str) else "")
@pytest.mark.parametrize("named", [True, False])
def test_a_family_is_the_same_without_transformers(
    family: str, values: dict[str, Any], named: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A size that is a guess makes a plan that is wrong, and looks right."""
    pytest.importorskip("transformers")
    about = {"model_type": family, "torch_dtype": "bfloat16"}
    if named:
        about["architectures"] = [FAMILIES[family][0]]
    (tmp_path / "config.json").write_text(json.dumps(about | values))
    real = of_config(tmp_path, None)
    monkeypatch.setitem(sys.modules, "transformers", None)
    found = of_config(tmp_path, None)
    expected = [described(spec) for spec in real.tensors]
    for spec in expected:
        if spec["name"].endswith("mlp.gate.weight"):
            spec["dtype"] = torch.bfloat16  # transformers 5.24 keeps DeepSeek's router in fp32, and 5.23 does not
    assert [described(spec) for spec in found.tensors] == expected
    assert found.styles == real.styles


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "it has no hidden_size"),
        ({"hidden_size": "32"}, "hidden_size='32'"),
        ({"num_hidden_layers": 10**9}, "more than 500000 modules"),
        ({"vocab_size": -1}, "vocab_size=-1"),
        ({"attention_bias": 1}, "attention_bias=1"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "pip install transformers"),
        ({"model_type": "bert"}, "pip install transformers"),
    ],
)
def test_without_transformers_nothing_is_guessed(
    changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | changes))
    with pytest.raises(EMAConfigError, match=said):
        of_config(tmp_path, None)


@pytest.mark.parametrize(
    ("text", "count"), [("70B", 70 * 10**9), ("1.5b", 15 * 10**8), ("350M", 350 * 10**6), ("7", 7)]
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "-7B", "7 billion", "0", "nan", "1e9", "100001T"])
def test_a_count_that_is_none(text: str) -> None:
    with pytest.raises(EMAConfigError, match="parameters="):
        parse_count(text)


# The command.


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("engine", ["ddp", "fsdp1", "fsdp2", "zero1", "zero3"])
def test_a_number_of_parameters_is_spread_evenly_up_to_rounding(
    capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    status, out, err = run(
        capsys, "--parameters", "7.1B", "--engine", engine, "--world-size", "48", "--averages", "2", "--json"
    )
    found = json.loads(out)
    assert (status, err) == (0, "")
    shadow = found["bytes"]["shadow"]
    assert abs(shadow["mean"] * 48 - 2 * 4 * 7_100_000_000) < 48 * 16
    assert shadow["rank_0"] <= shadow["max"] <= shadow["mean"] + 48 * 16
    assert 0 < found["checkpoint"]["bytes"] - 2 * 4 * 7_100_000_000 < 10_000


def test_times_are_bytes_over_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    rates = ("--memory-bandwidth", "2", "--link-bandwidth", "4", "--disk-bandwidth", "0.5")
    _, out, _ = run(capsys, "--parameters", "8M", "--offload", "cpu", *rates, "--json")
    found = json.loads(out)
    read, kept = 2 * 10**6, 4 * 10**6  # on each of 8 ranks
    assert found["bytes"]["update"]["max"] == read + 2 * kept
    assert found["bytes"]["link"]["max"] == found["bytes"]["staging"]["max"] == read
    assert found["update_seconds"]["max"] == pytest.approx((read + 2 * kept) / 2e9 + read / 4e9)
    assert found["checkpoint"]["seconds"] == found["checkpoint"]["bytes"] / 0.5e9
    assert found["shadow_on"] == "host"


def test_the_table_names_the_rank_that_pays_most(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "--parameters", "1001", "--engine", "zero1", "--world-size", "100")
    assert status == 0
    assert "averages" in out
    assert "64 ranks" in out
    assert "1,001 parameters, zero1, 100 ranks" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give either MODEL"),
        (["config.json", "--parameters", "7B"], "give either MODEL"),
        (["missing.json"], "missing.json does not exist"),
        ([str(ROOT / "README.md")], "cannot be read as a config.json"),
        (["--parameters", "many"], "--parameters 'many'"),
        (["--parameters", "7B", "--engine", "zero4"], "--engine 'zero4': allowed are plain, ddp"),
        (["--parameters", "7B", "--engine", "hsdp", "--replicate", "3"], "multiple of --replicate 3"),
        (["--parameters", "7B", "--replicate", "2"], "--replicate 2: only with --engine hsdp or fsdp1"),
        (["--parameters", "7B", "--tensor-parallel", "2"], "only with --engine tp or fsdp2+tp"),
        (["--parameters", "7B", "--world-size", "0"], "--world-size 0"),
        (["--parameters", "7B", "--averages", "-1"], "averages=-1"),
        (["--parameters", "7B", "--disk-bandwidth", "0"], "must be above 0"),
        (["--parameters", "7B", "--memory-bandwidth", "nan"], "must be above 0"),
        (["--parameters", "7B", "--dtype", "fp16"], "--dtype"),
        (["--parameters", "7B", "--offload", "disk"], "--offload 'disk'"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert said in err


@pytest.mark.parametrize(("text", "said"), [("{}", "no model_type"), ('{"model_type": "new"}', "cannot be built")])
def test_a_config_that_describes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, said: str
) -> None:
    (tmp_path / "config.json").write_text(text)
    status, _, err = run(capsys, str(tmp_path))
    assert status == 2
    assert said in err


def test_help_and_error_say_what_needs_transformers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The demo does not install it."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    status, _, err = run(capsys, str(tmp_path))
    assert status == 2
    assert "pip install transformers" in err and "LlamaForCausalLM" in err
    _, out, _ = run(capsys, "--help")
    assert "pip install transformers" in " ".join(out.replace("│", " ").split())


def test_help_does_not_import_torch() -> None:
    code = "import sys; from dist_ema.cli import main; main(['plan', '--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
