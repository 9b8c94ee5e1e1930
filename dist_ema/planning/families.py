"""Builds models of common families without memory, from a config.json alone: for plans if transformers is not
installed.

A plan needs names, shapes, ties and the plan of tensor parallelism, so the layers here have no forward. They are those
that transformers 5 builds, in its order; tests compare each family with it, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

#: What transformers' plans say of the parts that all families but GPT-2 have.
_ENDS = {"lm_head": "colwise_gather_output", "model.embed_tokens": "embedding_rowwise"}
_ATTENTION = {f"model.layers.*.self_attn.{name}_proj": "colwise" for name in "qkv"}
_ATTENTION |= {"model.layers.*.self_attn.o_proj": "rowwise"}
_MLP = {
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
_EXPERTS = {
    "model.layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "model.layers.*.mlp.experts.down_proj": "rowwise",
}
_SHARED_EXPERTS = {name.replace(".mlp.", ".mlp.shared_experts."): style for name, style in _MLP.items()}


class Config:
    """Reads the numbers of a config.json.

    Args:
        values: the contents of the file.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def size(self, key: str, default: int | None = None, *, least: int = 1) -> int:
        """Returns a whole number. Raises ValueError if it is missing without a default, is below ``least``, or is no
        number.
        """
        value = self._values.get(key)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"it has no {key}")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{key}={value!r}: must be a whole number of at least {least}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """Returns True or False. Raises ValueError for anything else."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise ValueError(f"{key}={value!r}: must be true or false")
        return value

    def is_null(self, key: str) -> bool:
        """Returns whether the file has the entry as null, which means something else than its absence."""
        return key in self._values and self._values[key] is None


class _Tensors(nn.Module):
    """Holds parameters by name and shape."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))


class _Model(nn.ModuleDict):
    """Represents a model with the plan of tensor parallelism that transformers has for it."""

    def __init__(self, parts: Mapping[str, nn.Module], plan: Mapping[str, str]) -> None:
        super().__init__(parts)
        self._plan = dict(plan)

    @property
    def tp_plan(self) -> dict[str, str]:
        """Styles by pattern, as ``PreTrainedModel.tp_plan``."""
        return self._plan


def _linear(inputs: int, outputs: int, bias: bool = False) -> nn.Module:
    return _Tensors({"weight": (outputs, inputs), "bias": (outputs,)} if bias else {"weight": (outputs, inputs)})


def _weight(*shape: int) -> nn.Module:
    """Returns an embedding, an RMSNorm or a router."""
    return _Tensors({"weight": shape})


def _attention(config: Config, *, head: int, groups: int, qkv_bias: bool, out_bias: bool, norms: bool) -> nn.Module:
    """Returns an attention layer with ``groups`` heads of keys and values."""
    hidden = config.size("hidden_size")
    heads = config.size("num_attention_heads")
    parts = {
        "q_proj": _linear(hidden, heads * head, qkv_bias),
        "k_proj": _linear(hidden, groups * head, qkv_bias),
        "v_proj": _linear(hidden, groups * head, qkv_bias),
        "o_proj": _linear(heads * head, hidden, out_bias),
    }
    if norms:
        parts |= {"q_norm": _weight(head), "k_norm": _weight(head)}
    return nn.ModuleDict(parts)


def _mlp(hidden: int, inner: int, bias: bool = False) -> nn.Module:
    return nn.ModuleDict(
        {
            "gate_proj": _linear(hidden, inner, bias),
            "up_proj": _linear(hidden, inner, bias),
            "down_proj": _linear(inner, hidden, bias),
        }
    )


def _experts(count: int, hidden: int, inner: int) -> nn.Module:
    """Returns all experts of a layer, fused as transformers 5 has them."""
    return _Tensors({"gate_up_proj": (count, 2 * inner, hidden), "down_proj": (count, hidden, inner)})


def _decoder(config: Config, layers: Iterable[nn.Module], plan: dict[str, str], *, tied: bool) -> nn.Module:
    """Returns a decoder: embedding, layers, norm and head."""
    hidden = config.size("hidden_size")
    words = config.size("vocab_size")
    embedding = _weight(words, hidden)
    head = _weight(words, hidden)
    if config.flag("tie_word_embeddings", tied):
        head.weight = embedding.weight
    body = {"embed_tokens": embedding, "layers": nn.ModuleList(layers), "norm": _weight(hidden)}
    return _Model({"model": nn.ModuleDict(body), "lm_head": head}, _ENDS | plan)


def _layer(hidden: int, attention: nn.Module, mlp: nn.Module) -> nn.Module:
    norms = {"input_layernorm": _weight(hidden), "post_attention_layernorm": _weight(hidden)}
    return nn.ModuleDict({"self_attn": attention, "mlp": mlp, **norms})


def _llama_like(
    config: Config,
    *,
    biases: tuple[bool, bool] | None = None,
    default_groups: int | None = None,
    default_head: int | None = None,
    mlp_bias: bool = False,
    norms: bool = False,
    tied: bool = False,
    experts: bool = False,
) -> nn.Module:
    """Builds Llama, and models that differ from it by a few numbers.

    Args:
        config: the sizes.
        biases: whether queries, keys and values, and the output, have biases; None means what ``attention_bias`` says.
        default_groups: heads of keys and values if the file does not say; None means as many as of queries.
        default_head: elements of a head if the file does not say; None means its part of the hidden size.
        mlp_bias: whether the file may ask for biases in the MLP.
        norms: whether queries and keys are normalized.
        tied: whether embedding and head are one tensor if the file does not say.
        experts: whether the MLP is a mixture of experts.
    """
    hidden = config.size("hidden_size")
    inner = config.size("intermediate_size")
    heads = config.size("num_attention_heads")
    if config.is_null("num_key_value_heads"):
        groups = heads
    else:
        groups = config.size("num_key_value_heads", default_groups or heads)
    head = config.size("head_dim", default_head or max(hidden // heads, 1))
    qkv_bias, out_bias = biases or (config.flag("attention_bias", False),) * 2

    def mlp() -> nn.Module:
        if not experts:
            return _mlp(hidden, inner, mlp_bias and config.flag("mlp_bias", False))
        count = config.size("num_local_experts", 8)
        return nn.ModuleDict({"gate": _weight(count, hidden), "experts": _experts(count, hidden, inner)})

    layers = (
        _layer(
            hidden,
            _attention(config, head=head, groups=groups, qkv_bias=qkv_bias, out_bias=out_bias, norms=norms),
            mlp(),
        )
        for _ in range(config.size("num_hidden_layers"))
    )
    return _decoder(config, layers, _ATTENTION | (_EXPERTS if experts else _MLP), tied=tied)


def _llama(config: Config) -> nn.Module:
    return _llama_like(config, mlp_bias=True)


def _mistral(config: Config) -> nn.Module:
    return _llama_like(config, biases=(False, False), default_groups=8)


def _mixtral(config: Config) -> nn.Module:
    return _llama_like(config, biases=(False, False), default_groups=8, experts=True)


def _qwen2(config: Config) -> nn.Module:
    return _llama_like(config, biases=(True, False), default_groups=32)


def _qwen3(config: Config) -> nn.Module:
    return _llama_like(config, default_groups=32, default_head=128, norms=True)


def _gemma(config: Config) -> nn.Module:
    return _llama_like(config, default_groups=16, default_head=256, tied=True)


def _deepseek_v3(config: Config) -> nn.Module:
    hidden = config.size("hidden_size")
    experts = config.size("n_routed_experts")
    inner = config.size("moe_intermediate_size")
    dense = config.size("first_k_dense_replace", least=0)

    def mlp(number: int) -> nn.Module:
        if number < dense:
            return _mlp(hidden, config.size("intermediate_size"))
        gate = _weight(experts, hidden)
        gate.register_buffer("e_score_correction_bias", torch.empty(experts))
        shared = _mlp(hidden, inner * config.size("n_shared_experts"))
        return nn.ModuleDict({"experts": _experts(experts, hidden, inner), "gate": gate, "shared_experts": shared})

    numbers = range(config.size("num_hidden_layers"))
    layers = (_layer(hidden, _latent_attention(config), mlp(number)) for number in numbers)
    return _decoder(config, layers, _MLP | _EXPERTS | _SHARED_EXPERTS, tied=False)


def _latent_attention(config: Config) -> nn.Module:
    """Returns DeepSeek's attention, in which queries, keys and values are computed from a narrow tensor."""
    hidden = config.size("hidden_size")
    heads = config.size("num_attention_heads")
    bias = config.flag("attention_bias", False)
    plain, rotary, value = (config.size(key) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    narrow = config.size("kv_lora_rank")
    queries = heads * (plain + rotary)
    parts: dict[str, nn.Module] = {}
    if config.is_null("q_lora_rank"):
        parts |= {"q_proj": _linear(hidden, queries)}
    else:
        rank = config.size("q_lora_rank")
        parts |= {"q_a_proj": _linear(hidden, rank, bias), "q_a_layernorm": _weight(rank)}
        parts |= {"q_b_proj": _linear(rank, queries)}
    parts |= {
        "kv_a_proj_with_mqa": _linear(hidden, narrow + rotary, bias),
        "kv_a_layernorm": _weight(narrow),
        "kv_b_proj": _linear(narrow, heads * (plain + value)),
        "o_proj": _linear(heads * value, hidden, bias),
    }
    return nn.ModuleDict(parts)


def _gpt2(config: Config) -> nn.Module:
    width = config.size("n_embd", 768)
    words = config.size("vocab_size", 50257)
    inner = config.size("n_inner", 4 * width)
    if config.flag("add_cross_attention", False):
        raise ValueError("add_cross_attention=True")

    def turned(inputs: int, outputs: int) -> nn.Module:
        """GPT-2's linear layer, whose weight is the transpose of torch's."""
        return _Tensors({"weight": (inputs, outputs), "bias": (outputs,)})

    def norm() -> nn.Module:
        return _Tensors({"weight": (width,), "bias": (width,)})

    def layer() -> nn.Module:
        attention = {"c_attn": turned(width, 3 * width), "c_proj": turned(width, width)}
        mlp = {"c_fc": turned(width, inner), "c_proj": turned(inner, width)}
        return nn.ModuleDict(
            {"ln_1": norm(), "attn": nn.ModuleDict(attention), "ln_2": norm(), "mlp": nn.ModuleDict(mlp)}
        )

    embedding = _weight(words, width)
    head = _weight(words, width)
    if config.flag("tie_word_embeddings", True):
        head.weight = embedding.weight
    layers = nn.ModuleList(layer() for _ in range(config.size("n_layer", 12)))
    positions = _weight(config.size("n_positions", 1024), width)
    body = {"wte": embedding, "wpe": positions, "h": layers, "ln_f": norm()}
    return _Model({"transformer": nn.ModuleDict(body), "lm_head": head}, {})


#: By ``model_type``: the class in ``architectures``, and what builds it.
FAMILIES: dict[str, tuple[str, Callable[[Config], nn.Module]]] = {
    "deepseek_v3": ("DeepseekV3ForCausalLM", _deepseek_v3),
    "gemma": ("GemmaForCausalLM", _gemma),
    "gpt2": ("GPT2LMHeadModel", _gpt2),
    "llama": ("LlamaForCausalLM", _llama),
    "mistral": ("MistralForCausalLM", _mistral),
    "mixtral": ("MixtralForCausalLM", _mixtral),
    "qwen2": ("Qwen2ForCausalLM", _qwen2),
    "qwen3": ("Qwen3ForCausalLM", _qwen3),
}
