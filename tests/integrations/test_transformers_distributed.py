"""transformers' own parallelism: ``from_pretrained(distributed_config=DistributedConfig(...))``.

Its tensor parallelism packs gate and up projections, which no other wrapper does, and its experts may lie on another
mesh than everything else. A wrong order of rows would neither change a count of elements nor a checksum, so every
result is compared with the plain model that was loaded from the same file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn

from dist_ema import ShardedEMA, read_checkpoint

transformers = pytest.importorskip("transformers", minversion="5.20")
DistributedConfig = pytest.importorskip("transformers.distributed").DistributedConfig

TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: Model, ranks and layout. transformers 5.23 refuses pp with fsdp, and pp with tp fails while it loads.
LAYOUTS: dict[str, tuple[str, int, dict[str, int]]] = {
    "tp": ("experts", 2, {"tp_size": 2}),
    "tp of 4": ("experts", 4, {"tp_size": 4}),
    "dense tp": ("dense", 2, {"tp_size": 2}),
    "fsdp + tp": ("experts", 4, {"fsdp_size": 2, "tp_size": 2}),
    "ep": ("experts", 2, {"tp_size": 2, "ep_size": 2}),
    "fsdp + ep": ("experts", 4, {"fsdp_size": 4, "ep_size": 2}),
    "fsdp + tp + ep": ("experts", 4, {"fsdp_size": 2, "tp_size": 2, "ep_size": 2}),
    "hsdp": ("dense", 4, {"dp_replicate_size": 2, "fsdp_size": 2}),
    "pp": ("dense", 2, {"pp_size": 2}),
}


def _config(model: str) -> Any:
    if model == "dense":
        return transformers.LlamaConfig(**TINY)
    return transformers.Qwen3MoeConfig(
        **TINY, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, head_dim=4
    )


@pytest.mark.world_size()
@pytest.mark.parametrize(("world_size", "layout"), [(ranks, layout) for layout, (_, ranks, _) in LAYOUTS.items()])
def test_a_model_that_transformers_has_sharded_averages_as_the_plain_one(
    rank: int, world_size: int, layout: str, tmp_path: Path
) -> None:
    kind, _, sizes = LAYOUTS[layout]
    if rank == 0:
        torch.manual_seed(0)
        transformers.AutoModelForCausalLM.from_config(_config(kind)).float().save_pretrained(tmp_path / "model")
    dist.barrier()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "model", distributed_config=DistributedConfig(**sizes), dtype=torch.float32)
    dense = load(tmp_path / "model", dtype=torch.float32)
    if "experts" in kind and "tp" in layout and "ep" not in layout:
        assert "_StridedShard" in _placements(model), "the layout that this test is for"

    ema = ShardedEMA(model, decay=0.75)
    ema.update()
    mean = {name: tensor.double() for name, tensor in dense.state_dict().items()}
    for step in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + step / 8)
            for parameter in dense.parameters():
                parameter.mul_(1 + step / 8)
        for name, tensor in dense.state_dict().items():
            mean[name] = 0.75 * mean[name] + 0.25 * tensor.double()
        ema.update()

    found = ema.full_state_dict()
    ema.save(tmp_path / "ema")
    ema.export(tmp_path / "exported", dtype=torch.float32, layout="transformers")
    streamed = {name: tensor.clone() for name, tensor in ema.iter_full_tensors()}
    for values in [streamed, read_checkpoint(tmp_path / "ema"), *([found] if rank == 0 else [])]:
        _check_same(values, mean)
    # The exported file is one that transformers reads, experts apart as they were in the first file.
    assert (
        load_file(tmp_path / "exported" / "model.safetensors").keys()
        == load_file(tmp_path / "model" / "model.safetensors").keys()
    )
    _check_same(load(tmp_path / "exported", dtype=torch.float32).state_dict(), mean)

    again = ShardedEMA(model, decay=0.75)
    again.load(tmp_path / "ema")
    again.copy_to()
    _check_same(dict(ShardedEMA(model, decay=0.5).iter_full_tensors()), mean)


def _placements(model: nn.Module) -> set[str]:
    return {
        type(placement).__name__ for tensor in model.parameters() for placement in getattr(tensor, "placements", ())
    }


def _check_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7, msg=name)
