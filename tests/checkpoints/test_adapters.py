"""Exports that diffusers and peft load: their files, their names, and what their own ``save_pretrained`` writes."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path

from support.exports import DECAY, average, everywhere, shard_layers
from support.oracle import DenseAverage
from support.zero_models import make_engine

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel as DDP

from dist_ema import ShardedEMA
from dist_ema.cli import main
from dist_ema.errors import EMAConfigError, EMAStateError

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
    """PEFT writes sets as lists, in an order that changes from process to process and from copy to copy."""
    found = json.loads(path.read_text())
    return {key: sorted(value) if key == "target_modules" else value for key, value in found.items()}


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
    assert _names(tmp_path / "one") - {"README.md"} == _names(tmp_path / "expected") == {UNET, "config.json"}
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
        assert _names(tmp_path / directory) - {"README.md"} == {"adapter_model.safetensors", "adapter_config.json"}
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
    assert _names(tmp_path / "export") == {"model.safetensors", "README.md"}
    with pytest.raises(EMAConfigError, match="layout='transformers': the PeftModel has adapters"):
        ema.export(tmp_path / "refused", layout="transformers")
    assert not (tmp_path / "refused").exists()


@pytest.mark.world_size(2)
@pytest.mark.parametrize("by", ["fsdp2", "zero3"])
def test_only_the_adapter_of_a_sharded_model_is_averaged_and_written(by: str, rank: int, tmp_path: Path) -> None:
    """And the model computes with it, under PEFT's wrappers; the base lies where it lay."""
    from peft import PeftModel

    model, plain = _lora(), _lora()
    tokens = torch.arange(12).view(2, 6)
    if by == "zero3":
        engine = make_engine(3, model=model, zero={"stage3_param_persistence_threshold": 0})
        target, forward = engine, engine
    else:
        target = forward = shard_layers(model, model.base_model.model.model.layers, by)
    optimizer = None if by == "zero3" else torch.optim.Adam(target.parameters(), lr=0.02)
    ema = ShardedEMA(target, decay=DECAY)
    oracle = DenseAverage({name for name, value in plain.named_parameters() if value.requires_grad}, DECAY)
    for _ in range(3):
        loss = forward(tokens).logits.square().mean()
        if by == "zero3":
            target.backward(loss)
            target.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        ema.update()
        oracle.update(ShardedEMA(target, decay=0.0).full_state_dict())  # before its first update: the live weights
    assert all(("lora" in share.spec.name) == (share.mode == "average") for share in ema._average.shares)
    ema.export(tmp_path / "adapter", layout="peft")
    state = ema.full_state_dict()
    model.eval()
    with ema.average_parameters(), torch.no_grad():
        found = forward(tokens).logits
    everywhere(None)
    if rank == 0:
        oracle.check(state)
        loaded = PeftModel.from_pretrained(_llama(), tmp_path / "adapter").eval()
        weights = loaded.state_dict()
        assert all(torch.equal(weights[name], value) for name, value in state.items() if "lora" in name)
        with torch.no_grad():
            torch.testing.assert_close(loaded(tokens).logits, found, rtol=1e-5, atol=1e-5)


def _moved(model: nn.Module) -> ShardedEMA:
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    ema.update()
    return ema


def test_adapters_are_merged_inside_with_their_average() -> None:
    """For a while; for good takes the adapter out of the model, which is said at the end, and the merged one stands."""
    model, tokens = _lora().eval(), torch.arange(6).view(1, 6)
    ema = _moved(model)
    with ema.average_parameters(), torch.no_grad():
        wanted = model(tokens).logits
    live = {name: value.clone() for name, value in model.state_dict().items() if "lora" in name}
    with ema.average_parameters(), torch.no_grad():
        model.merge_adapter()
        torch.testing.assert_close(model(tokens).logits, wanted)
        model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in live.items())
    with pytest.raises(EMAStateError, match="has other tensors"), ema.average_parameters():
        merged = model.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, wanted)


def test_an_average_goes_on_when_a_second_adapter_comes() -> None:
    """It is said that there are new tensors; rebind() takes the model as it is now."""
    from peft import LoraConfig

    model = _lora()
    ema = _moved(model)
    before = {name: value for name, value in ema.full_state_dict().items() if "lora" in name}
    model.add_adapter("later", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(EMAStateError, match=r"lora_A.later.weight.* were added. Call reset\(\).* or rebind\(model\)"):
        ema.update()
    ema.rebind(model)
    after = ema.full_state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    ema.update()
    assert ema.num_updates == 3


ADAPTERS = ("one", "two")


# Adapters that are switched: PEFT says by ``requires_grad`` which one is active, and that none is.


def _two_adapters() -> nn.Module:
    """Adapters in the layers and, by ``lm_head``, in the root: FSDP2 leaves the root unsharded after a forward pass."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    base = _llama()
    torch.manual_seed(1)
    model = get_peft_model(base, config, adapter_name=ADAPTERS[0])
    model.add_adapter(ADAPTERS[1], config)
    return model


def _wrapped(model: nn.Module, by: str) -> nn.Module:
    if by == "ddp":
        return DDP(model, find_unused_parameters=True)
    if by == "plain":
        return model
    return shard_layers(model, model.base_model.model.model.layers, by)


class _Joining(DenseAverage):
    """What is trained at an update joins with its value of that moment."""

    def join(self, names: set[str]) -> None:
        for name in names - self.trained:
            self.average.pop(name, None)
        self.trained |= names


def _names_of(model: nn.Module, adapter: str) -> set[str]:
    return {name for name in model.state_dict() if f".{adapter}." in name}


@pytest.mark.parametrize("by", ["plain", "ddp", "fsdp1", "fsdp2"])
@pytest.mark.world_size(2)
def test_adapters_that_are_switched_while_training_match_the_dense_average(by: str, rank: int, tmp_path: Path) -> None:
    """``set_adapter()`` and ``disable_adapter()`` stopped training at the next update."""
    dice = random.Random(3)
    tokens = torch.arange(12).view(2, 6)
    reference = _two_adapters()
    model = _two_adapters()
    for each in (model, reference):
        each.set_adapter("one")
    target = _wrapped(model, by)
    adapters = [value for name, value in model.named_parameters() if "lora" in name]
    optimizer = torch.optim.SGD(adapters, lr=0.5)
    ema = ShardedEMA(target, decay=DECAY)
    dense, active, before = _Joining(set(), DECAY), "one", dict[str, Tensor]()
    for step in range(8):
        active = ADAPTERS[step > 2] if step < 5 else dice.choice(ADAPTERS)
        if dice.random() < 0.5:
            with torch.no_grad():
                target(tokens)
        model.set_adapter(active)
        if step % 2:  # as trl's DPO asks for the logits of the base model
            with torch.no_grad(), model.disable_adapter():
                target(tokens)
        target(input_ids=tokens).logits.square().mean().backward()
        optimizer.step()
        if step % 3 == 2:  # a callback may call update() where all adapters are off
            with model.disable_adapter():
                assert ema.update()
        else:
            assert ema.update()
            dense.join(_names_of(reference, active))
        optimizer.zero_grad()
        live = ShardedEMA(target, decay=0.0).full_state_dict()  # before its first update: the live weights
        if rank == 0:
            moved = {name for name, value in live.items() if before and not torch.equal(value, before[name])}
            assert not moved or moved <= _names_of(reference, active), moved
            assert moved or not before
            dense.update(live)
            before = live
    averaged = ema.full_state_dict(include_untracked=False)
    found = ema.full_state_dict()
    ema.save(tmp_path / "ema")
    resumed = _two_adapters()
    resumed.set_adapter("two")
    later = ShardedEMA(_wrapped(resumed, by), decay=DECAY)
    later.load(tmp_path / "ema")
    loaded = later.full_state_dict(include_untracked=False)
    if rank == 0:
        assert averaged.keys() == _names_of(reference, "one") | _names_of(reference, "two")
        dense.check(found)
        _same(loaded, averaged)
