"""trl's GRPO with an average as its reference policy, as the guide's page on reinforcement learning does it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from support import ROOT

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

pytest.importorskip("trl", reason="is in the extra 'test'")

from datasets import Dataset
from test_transformers import full_weights, strategy, tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig

GUIDE = ROOT / "dist_ema" / "guide" / "reinforcement-learning.md"
KEPT = 0.4
EVERY = 2
STEPS = 5
SAVED = 4


class Recorder(TrainerCallback):
    """The weights of policy and reference after each step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.policy: list[dict[str, Tensor]] = []
        self.reference: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.policy.append(full_weights(self.trainer))
        self.reference.append(reference_weights(self.trainer))


def reference_weights(trainer: Any) -> dict[str, Tensor]:
    """Whole, by the plain model's names. Collective."""
    import deepspeed
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.ref_model).named_parameters():
        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter]):
                found[name] = parameter.detach().clone()
        else:
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            found[name] = value.detach().clone()
    return found


def run(folder: Path, resume: bool, **arguments: Any) -> tuple[Any, Recorder]:
    """Trains by the guide's lines, with an interval of two steps."""
    torch.manual_seed(0)
    model = tiny()
    if dist.get_rank() == 0 and not resume:
        model.save_pretrained(folder / "model")
    dist.barrier()
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(36)} | {"</s>": 36}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    config = GRPOConfig(
        folder / "run",
        max_steps=STEPS,
        beta=0.1,
        learning_rate=0.1,
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        report_to=[],
        save_strategy="steps",
        save_steps=SAVED,
        bf16=False,
        disable_tqdm=True,
        **arguments,
    )

    def reward(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    names = {
        "model": type(model).from_pretrained(folder / "model"),
        "reward": reward,
        "arguments": config,
        "prompts": Dataset.from_dict({"prompt": [f"w{index} w{index + 1}" for index in range(16)]}),
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>"),
    }
    lines = re.findall(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)[0]
    before, train = lines.replace("512ba", f"{EVERY}ba").split("trainer.train()")
    assert not train.strip()
    exec(compile(before, str(GUIDE), "exec"), names)
    trainer: Any = names["trainer"]
    recorder = Recorder(trainer)
    trainer.add_callback(recorder)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, recorder


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero3"])
def test_the_reference_policy_is_the_average(name: str, tmp_path: Path) -> None:
    """trl's own synchronization gathers two models under ZeRO-3, and starts anew when a run is resumed."""
    with strategy(name) as arguments:
        _, recorder = run(tmp_path, resume=False, **arguments)
        expected = {key: value.double() for key, value in recorder.policy[0].items()}
        for step in range(STEPS + 1):
            if step and step % EVERY == 0:
                for key, value in recorder.policy[step].items():
                    expected[key] = KEPT * expected[key] + (1 - KEPT) * value.double()
            for key, value in recorder.reference[step].items():
                torch.testing.assert_close(value.double(), expected[key], rtol=1e-5, atol=1e-6)
        moved = expected["model.embed_tokens.weight"] - recorder.policy[0]["model.embed_tokens.weight"]
        assert moved.abs().max() > 1e-3

        _, resumed = run(tmp_path, resume=True, **arguments)
        for key, value in resumed.reference[0].items():
            assert torch.equal(value, recorder.reference[SAVED][key]), key
