"""Full tensors one after the other on every rank, for inference servers."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

from support.models import CASES, build

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dist_ema import ShardedEMA
from dist_ema.comm import gather as stream
from dist_ema.errors import EMAConfigError, EMAStateError


@torch.no_grad()
def averaged(case: str) -> ShardedEMA:
    model = CASES[case].wrap(build(scalar=False, hidden=12))
    ema = ShardedEMA(model, decay=0.5)
    for _ in range(3):
        for parameter in model.parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.mul_(1.25)
        ema.update()
    return ema


@pytest.mark.world_size(3)
@pytest.mark.parametrize("case", ["plain", "ddp", "fsdp1-full", "fsdp2"])
def test_every_rank_has_every_tensor_in_one_order(case: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ema = averaged(case)
    full = ema.full_state_dict()
    found = list(ema.iter_full_tensors())
    names: list[list[str]] = [[] for _ in range(3)]
    dist.all_gather_object(names, [name for name, _ in found])
    assert names[0] == names[1] == names[2]
    if rank == 0:
        assert [name for name, _ in found] == list(full)
        assert all(
            torch.equal(value.view(-1).view(torch.uint8), full[name].view(-1).view(torch.uint8))
            for name, value in found
        )
    digests = {name: float(value.double().sum()) for name, value in found}
    shared: list[dict[str, float]] = [{} for _ in range(3)]
    dist.all_gather_object(shared, digests)
    assert shared[0] == shared[1] == shared[2]
    for _, value in ema.iter_full_tensors(dtype=torch.bfloat16, device="cpu"):
        assert value.dtype == torch.bfloat16 or not value.is_floating_point()


@pytest.mark.world_size(2)
def test_a_loop_that_all_leave_hangs_nobody_and_one_that_some_leave_is_told(rank: int) -> None:
    model = fully_shard(nn.Sequential(*(nn.Linear(64, 64) for _ in range(4))))
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with mock.patch.object(stream, "WINDOW_BYTES", 20_000):  # one tensor at a time
        for name, _ in ema.iter_full_tensors():
            if name == "1.weight":
                break
        assert ema.fingerprint()
        loop = ema.iter_full_tensors()
        next(loop)
        if rank == 0:
            with pytest.raises(EMAStateError, match="ranks make different calls"):
                ema.fingerprint()
        else:
            with pytest.raises(EMAStateError, match="ranks make different calls"):
                list(loop)
        loop = ema.iter_full_tensors()
        next(loop)
        ema.update()
        with pytest.raises(EMAStateError, match="was updated, loaded or reset since the first tensor"):
            list(loop)


@pytest.mark.world_size(2)
def test_what_is_wrong_is_refused_at_the_call(rank: int) -> None:
    ema = ShardedEMA(fully_shard(nn.Linear(3, 3)), averages={"a": 0.5, "b": 0.9})
    for options in ({}, {"name": "c"}, {"name": "a", "dtype": torch.int8}):
        with pytest.raises(EMAConfigError):
            ema.iter_full_tensors(**options)
    assert len(list(ema.iter_full_tensors("a"))) == 2


class Server:
    """What an inference server does with weights: vLLM's and SGLang's models take such iterators."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def load_weights(self, weights: object) -> set[str]:
        own, loaded = dict(self.model.named_parameters()), set()
        for name, value in weights:  # type: ignore[attr-defined]
            if name in own:
                own[name].copy_(value)
                loaded.add(name)
        return loaded


@pytest.mark.world_size(2)
def test_a_transformers_model_is_served_from_it(rank: int, tmp_path: Path) -> None:
    """Rank 1 serves; its memory is never more than the model and some tensors."""
    from transformers import AutoModelForCausalLM, GPT2Config

    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=16, vocab_size=30)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for block in model.transformer.h:
        fully_shard(block)
    fully_shard(model)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.to_local().mul_(1.5)  # type: ignore[attr-defined]
    ema.update()
    torch.manual_seed(1)
    server = Server(AutoModelForCausalLM.from_config(config).eval())
    weights = ema.iter_full_tensors()
    if rank == 1:
        loaded = server.load_weights(weights)
        assert loaded == set(dict(server.model.named_parameters()))
    else:
        for _ in weights:  # the others take part
            pass
    tokens = torch.arange(8).view(1, 8)
    model.eval()
    with ema.average_parameters(), torch.no_grad():
        expected = model(tokens).logits
    if rank == 1:
        with torch.no_grad():
            torch.testing.assert_close(server.model(tokens).logits, expected)


@pytest.mark.world_size(2)
def test_safetensors_are_written_while_it_streams(rank: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    ema = averaged("fsdp2")
    part: dict[str, Tensor] = {}
    for number, (name, value) in enumerate(ema.iter_full_tensors(dtype=torch.float32)):
        part = {name: value}
        if rank == 1:
            save_file(part, tmp_path / f"{number:03}.safetensors")
    dist.barrier()
    full = ema.full_state_dict()
    if rank == 0:
        found = {name: value for file in tmp_path.glob("*.safetensors") for name, value in load_file(file).items()}
        assert found.keys() == full.keys()
        assert all(torch.equal(found[name], value) for name, value in full.items())


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **sizes)
    text = LlamaConfig(vocab_size=37, **sizes)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=36))


@pytest.mark.world_size(2)
@pytest.mark.parametrize("window", [2_000, 16 << 20], ids=["small windows", "one window"])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral", "llava"])
def test_servers_get_the_names_of_the_hub(family: str, window: int, rank: int, tmp_path: Path) -> None:
    """transformers 5 fuses experts and renames modules; vLLM and SGLang load the names of the files on the Hub."""
    from support.exports import FAMILIES, read, shard_layers

    torch.manual_seed(0)
    if family == "llava":
        model = fully_shard(_llava())
    else:
        build_model, by, layers = FAMILIES[family]
        model = build_model()
        model = shard_layers(model, layers(model), by)
    ema = ShardedEMA(model, decay=0.5)
    ema.update()
    ema.export(tmp_path / "export", layout="transformers")
    with mock.patch.object(stream, "WINDOW_BYTES", window), mock.patch("dist_ema.comm.windows.WINDOW_BYTES", window):
        found = list(ema.iter_full_tensors(layout="transformers"))
    dist.barrier()
    expected = read(tmp_path / "export")
    assert len(found) == len(expected), "a tensor came twice, or never"
    assert dict(found).keys() == expected.keys()
    for name, value in found:
        assert value.dtype == expected[name].dtype and torch.equal(value, expected[name]), name
    if family == "mixtral":
        assert "model.layers.0.block_sparse_moe.experts.2.w3.weight" in expected
    if family == "llava":
        assert "language_model.model.layers.0.mlp.up_proj.weight" in expected


@pytest.mark.world_size(2)
def test_a_layout_that_servers_do_not_know_is_refused_on_every_rank(rank: int) -> None:
    ema = ShardedEMA(fully_shard(nn.Linear(4, 4)))
    with pytest.raises(EMAConfigError, match=r"layout='diffusers': allowed are None and 'transformers'"):
        ema.iter_full_tensors(layout="diffusers")
    with pytest.raises(EMAStateError, match="layout"):
        ema.iter_full_tensors(layout="transformers" if rank else None)
    # Another model's names are its own.
    assert [name for name, _ in ema.iter_full_tensors(layout="transformers")] == ["weight", "bias"]
