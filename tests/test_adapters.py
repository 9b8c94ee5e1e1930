"""Exports that diffusers and peft load: their files, their names, and what their own ``save_pretrained`` writes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from exports import DECAY, average, everywhere, shard_layers
from safetensors.torch import load_file
from torch import Tensor, nn

from dist_ema import ShardedEMA
from dist_ema.cli import main
from dist_ema.errors import EMAConfigError

UNET = "diffusion_pytorch_model.safetensors"


def _unet() -> nn.Module:
    from diffusers import UNet2DModel

    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    sizes = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    torch.manual_seed(0)
    return UNet2DModel(**sizes, **blocks)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, num_hidden_layers=2, **sizes))


def _lora(base: nn.Module | None = None, name: str = "default", **options: object) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **options}
    torch.manual_seed(1)
    return get_peft_model(base or _llama(), LoraConfig(**options), adapter_name=name)


def _json(path: Path) -> dict:
    return json.loads(path.read_text())


def _names(directory: Path) -> set[str]:
    return {file.name for file in directory.iterdir()}


def _same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.world_size(2)
@pytest.mark.parametrize("by", ["plain", "fsdp1", "fsdp2"])
def test_diffusers_loads_what_it_would_have_saved(by: str, rank: int, tmp_path: Path) -> None:
    """``from_pretrained`` looks for another file name, and in config.json for the class, which FSDP2 replaces."""
    model, plain = _unet(), _unet()
    model = model if by == "plain" else shard_layers(model, model.down_blocks, by)
    ema, oracle = average(model, plain)
    ema.export(tmp_path / "one", layout="diffusers")
    ema.export(tmp_path / "many", layout="diffusers", max_shard_size="30KB")
    ema.save(tmp_path / "checkpoint")
    state = ema.full_state_dict()
    if rank != 0:
        return
    plain.load_state_dict(state)
    oracle.check(plain.state_dict())
    plain.save_pretrained(tmp_path / "expected")
    assert _names(tmp_path / "one") == _names(tmp_path / "expected") == {UNET, "config.json"}
    assert _json(tmp_path / "one" / "config.json") == _json(tmp_path / "expected" / "config.json")
    _same(load_file(tmp_path / "one" / UNET), load_file(tmp_path / "expected" / UNET))
    assert (tmp_path / "many" / f"{UNET}.index.json").exists() and UNET not in _names(tmp_path / "many")
    offline = ["export", str(tmp_path / "checkpoint"), str(tmp_path / "offline"), "--layout", "diffusers"]
    assert main([*offline, "--config-from", str(tmp_path / "one")]) == 0
    for directory in ("one", "many", "offline"):
        loaded, info = type(plain).from_pretrained(tmp_path / directory, output_loading_info=True)
        assert not any(info.values()), info
        _same(loaded.state_dict(), state)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("by", ["plain", "fsdp1", "fsdp2"])
def test_peft_loads_the_adapter_alone(by: str, rank: int, tmp_path: Path) -> None:
    """Names without the adapter's, no base weight, and the configuration for inference."""
    from peft import PeftModel

    options = {"modules_to_save": ["lm_head"], "use_dora": True}
    model, plain = _lora(**options), _lora(**options)
    model = model if by == "plain" else shard_layers(model, model.base_model.model.model.layers, by)
    ema, oracle = average(model, plain)
    ema.export(tmp_path / "export", layout="peft", max_shard_size=1000)
    ema.export(tmp_path / "gathered", layout="peft", gather=True)
    state = ema.full_state_dict()
    everywhere(None)
    if rank != 0:
        return
    plain.load_state_dict(state)
    oracle.check(plain.state_dict())
    plain.save_pretrained(tmp_path / "expected")
    for directory in ("export", "gathered"):
        assert _names(tmp_path / directory) == {"adapter_model.safetensors", "adapter_config.json"}
        files = (tmp_path / place / "adapter_model.safetensors" for place in (directory, "expected"))
        _same(*map(load_file, files))
        assert _json(tmp_path / directory / "adapter_config.json") == _json(
            tmp_path / "expected" / "adapter_config.json"
        )
    assert not model.peft_config["default"].inference_mode, "the live model's config is not touched"
    loaded = PeftModel.from_pretrained(_llama(), tmp_path / "export")
    _same(loaded.state_dict(), state)


def test_the_active_adapter_is_written_under_the_name_that_it_has(tmp_path: Path) -> None:
    """Also that of a transformers model, around which there is no PeftModel."""
    from peft import LoraConfig, PeftModel

    model = _lora(name="style")
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    ShardedEMA(model, decay=DECAY).export(tmp_path / "style", layout="peft")
    model.save_pretrained(tmp_path / "expected")
    files = (tmp_path / place / "adapter_model.safetensors" for place in ("style", "expected/style"))
    _same(*map(load_file, files))
    inside = _llama()
    inside.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), adapter_name="mine")
    ShardedEMA(inside, decay=DECAY).export(tmp_path / "inside", layout="peft")
    loaded = PeftModel.from_pretrained(_llama(), tmp_path / "inside").state_dict()
    weights = {name: value for name, value in inside.state_dict().items() if "lora" in name}
    assert len(weights) == 4
    for name, value in weights.items():
        assert torch.equal(loaded["base_model.model." + name.replace(".mine.", ".default.")], value), name
    inside.add_adapter(LoraConfig(r=4, target_modules=["q_proj"]), adapter_name="second")
    inside.set_adapter(["mine", "second"])
    with pytest.raises(EMAConfigError, match="2 are active"):
        ShardedEMA(inside, decay=DECAY).export(tmp_path / "refused", layout="peft")


def test_names_that_from_pretrained_would_not_find_come_without_a_config(tmp_path: Path) -> None:
    """It would load the base's configuration, find none of the names and go on with random weights."""
    ema = ShardedEMA(_lora(), decay=DECAY)
    ema.export(tmp_path / "export")
    assert _names(tmp_path / "export") == {"model.safetensors"}
    with pytest.raises(EMAConfigError, match="layout='transformers': the PeftModel has adapters"):
        ema.export(tmp_path / "refused", layout="transformers")
    assert not (tmp_path / "refused").exists()
