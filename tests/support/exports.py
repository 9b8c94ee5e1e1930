"""Averages beside the dense average of a plain model that follows along, and exports read as others read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from support.oracle import DenseAverage

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from dist_ema import ShardedEMA

INDEX = "model.safetensors.index.json"


DECAY = 0.6


@torch.no_grad()
def perturb(model: nn.Module, step: int) -> None:
    """Multiplies every trained element by one number: the same on any shard, so a plain model follows along."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.mul_(1.0 - 0.25 * step)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1.5)
        elif buffer.dtype != torch.bool:
            buffer.add_(step)


def average(model: nn.Module, plain: nn.Module, **options: object) -> tuple[ShardedEMA, DenseAverage]:
    """Three updates of the wrapped model, and of the dense average of the plain one."""
    trained = {name for name, value in plain.named_parameters(remove_duplicate=False) if value.requires_grad}
    ema, oracle = ShardedEMA(model, decay=DECAY, **options), DenseAverage(trained, DECAY)
    for step in range(3):
        perturb(model, step)
        perturb(plain, step)
        ema.update()
        oracle.update(plain.state_dict())
    return ema, oracle


def read(directory: Path) -> dict[str, Tensor]:
    """Every tensor of an export, by safetensors' own loader, held against the index where there is one."""
    files = sorted(directory.glob("*.safetensors"))
    state = {name: value for file in files for name, value in load_file(file).items()}
    if not (directory / INDEX).exists():
        assert [file.name for file in files] == ["model.safetensors"]
        return state
    index = json.loads((directory / INDEX).read_text())
    count = len(files)
    assert [file.name for file in files] == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert index["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    return state


def everywhere(value: object) -> list[object]:
    """``value`` of every rank."""
    values: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=37, num_hidden_layers=2, tie_word_embeddings=True, **sizes))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=37, n_positions=16, n_embd=12, n_layer=2, n_head=2))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 20, "intermediate_size": 28, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(MixtralConfig(vocab_size=37, num_hidden_layers=2, num_local_experts=3, **sizes))


def shard_layers(model: nn.Module, layers: nn.ModuleList, by: str) -> nn.Module:
    if by == "fsdp1":
        for index, layer in enumerate(layers):
            layers[index] = FullyShardedDataParallel(layer, device_id=torch.device("cpu"), use_orig_params=True)
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], str, Callable[[nn.Module], nn.ModuleList]]] = {
    "llama-tied": (_llama, "fsdp2", lambda model: model.model.layers),
    "gpt2": (_gpt2, "fsdp1", lambda model: model.transformer.h),
    "mixtral": (_mixtral, "fsdp2", lambda model: model.model.layers),
}
