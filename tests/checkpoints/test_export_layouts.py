"""Exports in the names, shapes and files of ``save_pretrained``, as other programs look for them."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path

from support.exports import DECAY, FAMILIES, average, everywhere, read, shard_layers
from support.zero_models import make_engine

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

from dist_ema import ShardedEMA
from dist_ema.checkpoints.arrangement import UnknownOperationError
from dist_ema.checkpoints.trace import trace
from dist_ema.errors import CheckpointError, EMAConfigError
from dist_ema.formats.layout import TensorPlan
from dist_ema.geometry.runs import Rows, chunks, count

# What a function on state dicts does to elements.


def _experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a layer of experts is cut up: halves of every row of matrices, then matrix by matrix."""
    gate, up = (half.contiguous() for half in state["a"].chunk(2, dim=1))
    found = {f"gate.{i}": part.squeeze(0) for i, part in enumerate(gate.chunk(4))}
    return found | {f"up.{i}": part for i, part in enumerate(up.unbind())}


def _fused(state: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = torch.cat([state["b"].t(), state["c"]], dim=1)
    return {"joined": joined, "twice": joined.transpose(0, 1).contiguous()[2:5], "kept": state["a"]}


def _interleaved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    a = state["a"].reshape(4, 3, 2, 5).transpose(1, 2).reshape(4, 6, 5)
    stacked = torch.stack([state["b"], state["b"]], dim=1)
    return {"a": a, "stacked": stacked, "none": state["none"], "row": a[1, 2:4, 1:3]}


CONVERSIONS = {"experts": _experts, "fused": _fused, "interleaved": _interleaved}
SHAPES = {"a": (4, 6, 5), "b": (7, 3), "c": (3, 11), "none": (0, 3)}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elements_arrive_where_the_function_itself_puts_them(conversion: str, dtype: torch.dtype) -> None:
    """Slices, joins, stacks and transposes, from runs of any length: against the function on the whole tensors."""
    torch.manual_seed(0)
    state = {name: torch.randn(shape).to(dtype) for name, shape in SHAPES.items()}
    expected = CONVERSIONS[conversion](dict(state))
    plans = [((name,), TensorPlan(name, dtype, shape)) for name, shape in SHAPES.items()]
    arrangement = trace(CONVERSIONS[conversion], plans)
    assert not arrangement.is_trivial
    assert [(plan.name, plan.shape) for plan in arrangement.targets] == [
        (name, tuple(tensor.shape)) for name, tensor in expected.items()
    ]
    generator = np.random.default_rng(0)
    for limit in (1, 7, 1000):
        found = {name: torch.full_like(tensor, torch.nan).flatten() for name, tensor in expected.items()}
        for source in arrangement.sources:
            values = state[source].flatten()
            cuts = sorted({0, values.numel(), *generator.integers(0, values.numel(), 5).tolist()})
            pieces = [((low, high - low),) for low, high in itertools.pairwise(cuts)]
            if source == "a":  # columns of a matrix, as tensor parallelism gives them
                pieces = [Rows(0, 2, 5, 24), Rows(2, 3, 5, 24)]
            for runs in (part for piece in pieces for part in chunks(piece, limit)):
                own = torch.cat([values[start : start + length] for start, length in runs])
                for name, places, moved in arrangement.place(source, runs, own):
                    assert count(places) == moved.numel() and sum(places[-1]) <= found[name].numel()
                    assert all(sum(run) < after for run, (after, _) in itertools.pairwise(places)), "few, in order"
                    low = 0
                    for start, length in places:
                        found[name][start : start + length] = moved[low : low + length]
                        low += length
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(tensor.shape), tensor), (name, limit)


def _doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"a": torch.cat([state["a"], state["a"] * 2])}


def _overlapping(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"b": state["b"].flatten().unfold(0, 4, 2)}


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        (_doubled, r"'a' comes from aten.mul"),
        (_overlapping, "a tensor whose elements overlap in memory"),
        (
            lambda state: {"a": torch.zeros(3)},
            "'a' comes from aten.zeros|'a' comes from a tensor that is not in the state dict",
        ),
        (lambda state: {"a": torch.cat([state["b"], state["b"].double()])}, "several dtypes|_to_copy"),
        (lambda state: {"a": state["a"].zero_()}, "changes a tensor in place"),
        (lambda state: {"a": state["missing"]}, "KeyError: 'missing'"),
        (lambda state: {"a": state["a"].view(torch.uint8)}, "takes elements of torch.float32 for torch.uint8"),
    ],
)
def test_what_is_more_than_a_move_of_elements_is_refused(
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str
) -> None:
    """Else the file would have elements that nobody wrote."""
    plans = [((name,), TensorPlan(name, torch.float32, shape)) for name, shape in SHAPES.items()]
    with pytest.raises(UnknownOperationError, match=message):
        trace(convert, plans)


# transformers: random weights, no download.

SIZES = {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": 37}


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"num_key_value_heads": 1, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    sizes["head_dim"] = 10
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes))
    model.set_experts_implementation("eager")  # the other wants rows of 16 bytes
    return model


def _deepseek_v3() -> nn.Module:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    experts |= {"moe_intermediate_size": 12, "first_k_dense_replace": 1}
    heads = {"num_key_value_heads": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4}
    heads |= {"v_head_dim": 8, "qk_nope_head_dim": 8}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**SIZES, **experts, **heads))


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**SIZES))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(vocab_size=37, d_model=20, d_kv=10, d_ff=28, num_layers=2, num_heads=2))


def _dinov2() -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    sizes = {"hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    return Dinov2Model(Dinov2Config(**sizes, use_swiglu_ffn=True))


MODELS = {name: family[0] for name, family in FAMILIES.items()}
MODELS |= {"qwen3-moe": _qwen3_moe, "deepseek-v3": _deepseek_v3, "bert": _bert, "t5": _t5, "dinov2": _dinov2}
AUTO = {"bert": "AutoModelForMaskedLM", "t5": "AutoModelForSeq2SeqLM", "dinov2": "AutoModel"}


def _twins(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    model = make()
    torch.manual_seed(3)
    return model, make()


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _same_directory(found: Path, expected: Path) -> None:
    """Files, names, shapes, dtypes, bits and configurations."""
    names = {file.name for file in expected.iterdir()}
    assert {file.name for file in found.iterdir()} == names | {"README.md"}
    ours, theirs = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert torch.equal(ours[name], value), name
    for file in expected.glob("*.json"):
        assert _json(found / file.name) == _json(file), file.name


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_is_what_save_pretrained_writes(family: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    """One tensor an expert, as vLLM reads them, not one for all; ties once; architectures, dtype, generation config."""
    import transformers

    model, plain = _twins(MODELS[family])
    ema, _ = average(model, plain)
    ema.export(tmp_path / "export", dtype=dtype, layout="transformers")
    ema.export(tmp_path / "default", dtype=dtype)
    plain.load_state_dict(ema.full_state_dict())
    plain.to(dtype or torch.float32).save_pretrained(tmp_path / "expected")
    _same_directory(tmp_path / "export", tmp_path / "expected")
    auto = getattr(transformers, AUTO.get(family, "AutoModelForCausalLM"))
    for directory in ("export", "default"):
        loaded, info = auto.from_pretrained(tmp_path / directory, output_loading_info=True)
        assert {name: list(keys) for name, keys in info.items() if keys} == {}
        assert (type(loaded), loaded.dtype) == (type(plain), dtype or torch.float32)
        for name, value in plain.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    _, info = transformers.AutoModel.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert all(name.startswith("pooler.") for name in info["missing_keys"]), "the masked model has no pooler"
    assert model.config.architectures is None, "the live model's config is not touched"


def _wrapped(model: nn.Module, by: str) -> nn.Module:
    if by.startswith("zero"):
        return make_engine(int(by[-1]), "bf16", model=model)
    if by == "ddp":
        return torch.compile(DistributedDataParallel(model))
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    if by == "fsdp1":
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer)
    return shard_layers(model, layers, by)


@pytest.mark.world_size()
@pytest.mark.parametrize(("by", "world_size"), [("ddp", 2), ("fsdp1", 3), ("fsdp2", 3)])
@pytest.mark.parametrize("family", ["mixtral", "deepseek-v3", "llama-tied"])
def test_every_wrapper_writes_what_the_plain_model_saves(
    family: str, by: str, rank: int, world_size: int, tmp_path: Path
) -> None:
    """Rows of fused experts lie on several ranks, and a wrapped model has another class, or other names."""
    model, plain = _twins(MODELS[family])
    ema, oracle = average(_wrapped(model, by), plain)
    ema.export(tmp_path / "export", layout="transformers")
    ema.export(tmp_path / "gathered", layout="transformers", gather=True)
    state = ema.full_state_dict()
    if rank == 0:
        plain.load_state_dict(state)
        oracle.check(plain.state_dict())
        plain.save_pretrained(tmp_path / "expected")
        for directory in ("export", "gathered"):
            _same_directory(tmp_path / directory, tmp_path / "expected")


@pytest.mark.world_size(2)
@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_writes_what_the_plain_model_saves(stage: int, rank: int, tmp_path: Path) -> None:
    """Masters are flat slices in fp32, and in stage 3 a parameter of the module has no shape."""
    model, plain = _twins(MODELS["qwen3-moe"])
    engine = _wrapped(model, f"zero{stage}")
    ema = ShardedEMA(engine, decay=DECAY)
    tokens = torch.arange(8).view(1, 8) + rank
    for _ in range(2):
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
        ema.update()
    ema.export(tmp_path / "export", layout="transformers")
    state = ema.full_state_dict()
    if rank == 0:
        plain.load_state_dict(state)
        plain.bfloat16().save_pretrained(tmp_path / "expected")
        _same_directory(tmp_path / "export", tmp_path / "expected")


def test_files_of_a_sharded_export_are_all_in_the_index(tmp_path: Path) -> None:
    model, plain = _twins(MODELS["mixtral"])
    ema, _ = average(model, plain)
    ema.export(tmp_path / "export", max_shard_size=20_000)
    state = read(tmp_path / "export")
    assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in state
    loaded = type(plain).from_pretrained(tmp_path / "export")
    for name, value in ema.full_state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_conversion_that_cannot_be_followed_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are computed, not moved: no rank has them, and zeros would be in their place."""
    from transformers import core_model_loading

    real = core_model_loading.revert_weight_conversion

    def computed(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: value * 2 if name == "lm_head.weight" else value for name, value in real(model, state).items()}

    monkeypatch.setattr(core_model_loading, "revert_weight_conversion", computed)
    model = _qwen3_moe()
    ema = ShardedEMA(model, decay=DECAY)
    with pytest.raises(CheckpointError, match=r"layout='transformers'.*'lm_head.weight' comes from aten.mul"):
        ema.export(tmp_path / "export", layout="transformers")
    assert not list(tmp_path.iterdir())
    with caplog.at_level(logging.WARNING, "dist_ema"):
        ema.export(tmp_path / "export")
    assert "module's own names" in caplog.text and "lm_head.weight" in caplog.text
    assert read(tmp_path / "export").keys() == model.state_dict().keys()


def test_halves_of_a_joined_tensor_are_not_taken_for_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """save_pretrained joins what there is: without the frozen half the tensor would have half its shape."""
    model = _dinov2()
    for name, parameter in model.named_parameters():
        if "up_proj" in name or "norm" in name:
            parameter.requires_grad_(False)
    ema = ShardedEMA(model, decay=DECAY)
    with pytest.raises(CheckpointError, match=r"mlp.weights_in.bias' is made of tensors of which some are left out"):
        ema.export(tmp_path / "refused", layout="transformers", include_untracked=False)
    ema.export(tmp_path / "own", include_untracked=False)
    assert "are left out" in caplog.text
    assert read(tmp_path / "own").keys() == ema.full_state_dict(include_untracked=False).keys()


def test_what_is_left_out_is_left_out_under_its_saved_name(tmp_path: Path) -> None:
    model = _qwen3_moe()
    model.model.layers[0].requires_grad_(False)
    ema = ShardedEMA(model, decay=DECAY)
    ema.export(tmp_path / "whole", layout="transformers")
    ema.export(tmp_path / "part", layout="transformers", include_untracked=False)
    whole, part = read(tmp_path / "whole"), read(tmp_path / "part")
    assert part.keys() == {name for name in whole if not name.startswith("model.layers.0.")}
    assert all(torch.equal(whole[name], value) for name, value in part.items())


def test_a_tokenizer_comes_along_with_the_models_own_config(tmp_path: Path) -> None:
    model = _bert()

    class Tokenizer:
        def save_pretrained(self, path: str) -> None:
            (Path(path) / "tokenizer.json").write_text("{}")

    ema = ShardedEMA(model, decay=DECAY)
    ema.export(tmp_path / "both", config_from=[model.config, Tokenizer()])
    assert {"config.json", "tokenizer.json"} <= {file.name for file in (tmp_path / "both").iterdir()}
    assert _json(tmp_path / "both" / "config.json")["architectures"] == ["BertForMaskedLM"]
    ema.export(tmp_path / "model", config_from=model)
    assert _json(tmp_path / "model" / "config.json") == _json(tmp_path / "both" / "config.json")
    ema.export(tmp_path / "alone", config_from=Tokenizer())
    assert {file.name for file in (tmp_path / "alone").iterdir()} == {
        "model.safetensors",
        "tokenizer.json",
        "README.md",
    }
    ema.export(tmp_path / "none", config_from=[])
    assert {file.name for file in (tmp_path / "none").iterdir()} == {"model.safetensors", "README.md"}


@pytest.mark.world_size(2)
def test_a_wrong_layout_is_an_error_on_every_rank(rank: int, tmp_path: Path) -> None:
    model, plain = _twins(MODELS["llama-tied"])
    ema, _ = average(_wrapped(model, "fsdp2"), plain)
    for layout, message in [
        ("gguf", "layout='gguf': allowed are"),
        ("peft", "the target is a LlamaForCausalLM without"),
    ]:
        with pytest.raises(EMAConfigError, match=message) as caught:
            ema.export(tmp_path / "export", layout=layout)
        assert len(everywhere(str(caught.value))) == dist.get_world_size()
    assert not list(tmp_path.iterdir())
