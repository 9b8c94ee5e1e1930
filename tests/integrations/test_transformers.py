"""The Trainer of transformers: real runs of a tiny Llama, alone and on two CPU processes under each strategy."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from support.oracle import DenseAverage

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

pytest.importorskip("transformers", reason="is in the extra 'test'")
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dist_ema import ShardedEMA, read_checkpoint
from dist_ema.errors import CheckpointError, EMAConfigError, EMAStateError
from dist_ema.integrations.transformers import EMACallback

DECAY = 0.6
CONFIG = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 22, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 16}


def tiny() -> nn.Module:
    """The same weights on every rank and in every run."""
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**CONFIG, **HEADS, tie_word_embeddings=True))


class Tokens(Dataset):  # type: ignore[type-arg]
    """Random sentences of six tokens."""

    def __init__(self, count: int, seed: int) -> None:
        self.rows = torch.randint(0, 37, (count, 6), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


TRAIN, EVAL = Tokens(48, 0), {"a": Tokens(16, 1), "b": Tokens(16, 2)}


def full_weights(trainer: Trainer) -> dict[str, Tensor]:
    """What the optimizer trains, whole, by the plain model's names. Collective."""
    from torch.distributed.tensor import DTensor

    found = {}
    for name, parameter in trainer.accelerator.unwrap_model(trainer.model).named_parameters():
        if trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param

            found[name] = safe_get_full_fp32_param(parameter).clone()
        elif isinstance(parameter, DTensor):
            found[name] = parameter.full_tensor().detach().clone()
        else:
            found[name] = parameter.detach().clone()
    return found


class Recorder(TrainerCallback):
    """The dense average, from the weights at the trainer's real steps."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.last: dict[str, Tensor] = {}
        self.dense: DenseAverage | None = None
        self.at: dict[int, dict[str, Tensor]] = {}
        self.weights: dict[int, dict[str, Tensor]] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        weights = full_weights(self.trainer)
        if self.dense is None:
            self.dense = DenseAverage(set(weights), DECAY)
        if not self.at or not same(weights, self.last):  # a step that was skipped leaves all weights as they were
            self.dense.update(weights)
        self.last = self.weights[state.global_step] = weights
        self.at[state.global_step] = dict(self.dense.average)


@contextmanager
def strategy(name: str) -> Iterator[dict[str, Any]]:
    """Arguments under which a strategy really wraps the model on CPU processes."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    arguments: dict[str, Any] = {"use_cpu": name in ("plain", "ddp")}
    environment, threads, prepare = dict(os.environ), torch.get_num_threads(), PartialState._prepare_backend
    if name.startswith("zero"):
        from support.zero_models import reset_deepspeed

        reset_deepspeed()
        zero = {"stage": int(name[-1]), "stage3_param_persistence_threshold": 20}
        zero["stage3_gather_16bit_weights_on_model_save"] = True
        arguments["deepspeed"] = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": zero,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
    elif name == "fsdp2":
        arguments |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    try:
        if name.startswith("zero") or name == "fsdp2":  # on CPUs accelerate 1.15 knows DDP only, and drops them
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
        yield arguments
    finally:
        PartialState._prepare_backend = prepare
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.set_num_threads(threads)
        for variable in os.environ.keys() - environment.keys():
            del os.environ[variable]


def make(
    folder: Path,
    *callbacks: TrainerCallback,
    model: Any = None,
    kind: type[Trainer] = Trainer,
    settings: type[TrainingArguments] = TrainingArguments,
    **arguments: Any,
) -> Trainer:
    """A trainer of six steps in two epochs."""
    options: dict[str, Any] = {
        "per_device_train_batch_size": 16 // (dist.get_world_size() if dist.is_initialized() else 1),
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.05,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 5,
    }
    own = ("compute_metrics", "train_dataset", "eval_dataset", "model_init", "processing_class")
    given = {name: arguments.pop(name) for name in own if name in arguments}
    args = settings(output_dir=str(folder), **{**options, **arguments})
    if "model_init" not in given:
        given["model"] = tiny() if model is None else model
    given = {"train_dataset": TRAIN, "eval_dataset": EVAL, **given}
    return kind(args=args, callbacks=[*callbacks], **given)


def loss_of(weights: dict[str, Tensor], rows: Tensor) -> float:
    """What a plain model with these weights says to a data set."""
    model = tiny().eval()
    model.load_state_dict({name: value.float() for name, value in weights.items()}, strict=False)
    with torch.no_grad():
        return float(model(input_ids=rows, labels=rows).loss)


def check_average(ema: ShardedEMA, average: dict[str, Tensor]) -> None:
    state = ema.full_state_dict()
    if state:
        expected = DenseAverage(set(average), DECAY)
        expected.average = average
        expected.check({name: state[name] for name in average})


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def follow(trainer: Trainer) -> Recorder:
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    return recorder


def check_wrapped(trainer: Trainer, name: str) -> None:
    kinds = {"plain": "LlamaForCausalLM", "ddp": "DistributedDataParallel", "fsdp2": "FSDPLlamaForCausalLM"}
    assert type(trainer.model_wrapped).__name__ == kinds.get(name, "DeepSpeedEngine")
    if name.startswith("zero"):
        assert trainer.model_wrapped.zero_optimization_stage() == int(name[-1])


def a_run(name: str, folder: Path) -> None:
    with strategy(name) as arguments:
        arguments |= {"eval_strategy": "steps", "eval_steps": 2}
        plain = make(folder / "plain", **arguments)
        plain.train()
        expected, losses = full_weights(plain), logged(plain, "loss")
        del plain

        saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
        callback = EMACallback(decay=DECAY)
        trainer = make(folder / "ema", callback, **arguments, **saving)
        recorder = follow(trainer)
        trainer.train()
        check_wrapped(trainer, name)
        ema = callback.ema
        assert ema is not None and ema.num_updates == 6
        assert recorder.dense is not None
        check_average(ema, recorder.dense.average)
        assert same(full_weights(trainer), expected), "training is not that without an average"
        assert logged(trainer, "loss") == losses
        check_logged(trainer, recorder)
        check_evaluation(trainer, callback, recorder)
        assert sorted(path.parent.name for path in (folder / "ema").glob("checkpoint-*/ema")) == [
            "checkpoint-4",
            "checkpoint-6",
        ]
        check_resumed(folder, trainer, callback, {**arguments, **saving})
        if name in ("plain", "ddp"):  # before training the Trainer evaluates under no other strategy
            check_evaluated_first(folder, arguments)


def logged(trainer: Trainer, key: str) -> dict[int, float]:
    return {row["step"]: row[key] for row in trainer.state.log_history if key in row}


def check_logged(trainer: Trainer, recorder: Recorder) -> None:
    """Evaluations in training were on the average of that step."""
    for key, dataset in EVAL.items():
        found = logged(trainer, f"eval_{key}_loss")
        assert list(found) == [2, 4, 6]
        for step, value in found.items():
            assert value == pytest.approx(loss_of(recorder.at[step], dataset.rows), rel=1e-5)
    assert logged(trainer, "ema/num_updates") == {step: step for step in range(1, 7)}
    assert all(value > 0.01 for step, value in logged(trainer, "ema/distance").items() if step > 1)


def check_evaluation(trainer: Trainer, callback: EMACallback, recorder: Recorder) -> None:
    """After training, and when it raises."""
    assert recorder.dense is not None
    before = full_weights(trainer)
    rows = EVAL["a"].rows
    averaged, live = loss_of(recorder.dense.average, rows), loss_of(before, rows)
    assert abs(averaged - live) > 1e-3
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(averaged, rel=1e-5)
    assert trainer.predict(EVAL["a"]).metrics["test_loss"] == pytest.approx(averaged, rel=1e-5)

    def fail(_: Any) -> dict[str, float]:
        raise KeyError("a metric that is missing")

    trainer.compute_metrics = fail
    with pytest.raises(KeyError, match="a metric that is missing"):
        trainer.evaluate()
    trainer.compute_metrics = None
    assert same(full_weights(trainer), before), "the live weights are not live"
    trainer.remove_callback(EMACallback)
    assert trainer.evaluate(EVAL["a"])["eval_loss"] == pytest.approx(live, rel=1e-5)
    trainer.add_callback(callback)
    assert trainer.evaluate(EVAL["a"])["eval_loss"] == pytest.approx(averaged, rel=1e-5)


def check_evaluated_first(folder: Path, arguments: dict[str, Any]) -> None:
    """Before training there is no average; and the evaluation has prepared the model in its own way."""
    callback = EMACallback(decay=DECAY)
    trainer = make(folder / "first", callback, **arguments)
    live = loss_of(dict(tiny().named_parameters()), EVAL["a"].rows)
    assert trainer.evaluate(EVAL["a"])["eval_loss"] == pytest.approx(live, rel=1e-5)
    recorder = follow(trainer)
    if dist.is_initialized():  # accelerate 1.15 then leaves the model without DDP, and ranks train apart
        with pytest.raises(EMAStateError, match="every rank would train alone"):
            trainer.train()
        assert type(trainer.model_wrapped) is LlamaForCausalLM
        return
    trainer.train()
    assert callback.ema is not None and recorder.dense is not None
    check_average(callback.ema, recorder.dense.average)
    check_logged(trainer, recorder)


def check_resumed(folder: Path, trainer: Trainer, callback: EMACallback, arguments: dict[str, Any]) -> None:
    assert callback.ema is not None
    wanted, weights = callback.ema.fingerprint(), full_weights(trainer)
    resumed = EMACallback(decay=DECAY)
    other = make(folder / "ema", resumed, **arguments)
    other.train(resume_from_checkpoint=str(folder / "ema" / "checkpoint-4"))
    assert resumed.ema is not None and resumed.ema.num_updates == 6
    assert same(full_weights(other), weights)
    assert resumed.ema.fingerprint() == wanted, "resuming is not going on"
    assert resumed.ema.progress.epochs == pytest.approx(2 - 1 / 3)


def test_alone(tmp_path: Path) -> None:
    a_run("plain", tmp_path)


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_on_two_processes(name: str, on_ranks: Callable[..., None], tmp_path: Path) -> None:
    on_ranks(a_run, 2, name=name, folder=tmp_path)
    if name in ("ddp", "fsdp2"):  # DeepSpeed itself refuses another world size
        on_ranks(another_world_size, 1 if name == "ddp" else 4, name=name, folder=tmp_path)


def another_world_size(name: str, folder: Path) -> None:
    """Bit for bit, before a further step is made."""
    with strategy(name) as arguments:
        callback = EMACallback(decay=DECAY)
        trainer = make(folder / "ema", callback, **arguments)
        path = folder / "ema" / "checkpoint-6"
        trainer.train(resume_from_checkpoint=str(path))
        check_wrapped(trainer, name)
        assert callback.ema is not None and callback.ema.num_updates == 6
        state = callback.ema.full_state_dict()
        if state:
            assert same(state, read_checkpoint(path / "ema"))


def test_the_best_models_average(tmp_path: Path) -> None:
    """The average of the checkpoint whose metric was best goes on, not the last one; epochs are counted."""

    class Worse(Trainer):
        """The second epoch is said to be better than the others."""

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            found = super().evaluate(*args, **kwargs)
            if self.is_in_train:
                found["eval_a_loss"] = abs(self.state.epoch - 2)
            return found

    callback = EMACallback(half_life="1ep", update_interval="1ep", ema_start="0.25dur")
    arguments = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch", "save_total_limit": 1}
    arguments |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_loss", "num_train_epochs": 4}
    trainer = make(tmp_path, callback, kind=Worse, **arguments)
    seen: dict[int, dict[str, Tensor]] = {}

    class Watch(TrainerCallback):
        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert callback.ema is not None
            seen[int(state.epoch)] = callback.ema.full_state_dict()

    trainer.add_callback(Watch())
    trainer.train()
    ema = callback.ema
    assert ema is not None and trainer.state.best_global_step == 6
    assert (ema.num_updates, ema.progress.batches, round(ema.progress.epochs, 6)) == (2, 3, 1)
    assert same(ema.full_state_dict(), seen[2]) and not same(seen[2], seen[4])
    assert trainer.evaluate()["eval_a_loss"] == pytest.approx(loss_of(seen[2], EVAL["a"].rows), rel=1e-5)
    assert logged(trainer, "ema/num_updates") == {3: 1, 6: 2, 9: 3, 12: 4}


@pytest.mark.parametrize("averaged", [False, True])
def test_which_weights_save_model_writes(averaged: bool, tmp_path: Path) -> None:
    """A checkpoint that held the average as its model would throw training back to it on resuming."""
    callback = EMACallback(averages={"fast": 0.1, "slow": 0.9}, evaluate="fast", save_averaged=averaged and "slow")
    trainer = make(tmp_path, callback, save_strategy="steps", save_steps=6)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert callback.ema is not None
    live, slow = full_weights(trainer), callback.ema.full_state_dict("slow")
    for folder, wanted in (("final", slow if averaged else live), ("checkpoint-6", live)):
        found = dict(LlamaForCausalLM.from_pretrained(tmp_path / folder).named_parameters())
        assert all(torch.equal(found[name], wanted[name]) for name in found), folder
    assert same(full_weights(trainer), live)
    rows = EVAL["a"].rows
    fast = loss_of(callback.ema.full_state_dict("fast"), rows)
    assert trainer.evaluate(EVAL["a"])["eval_loss"] == pytest.approx(fast, rel=1e-5)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_added_to_a_trainer_that_skips_a_step(optim: str, tmp_path: Path) -> None:
    """Accumulation, and a step that the loss scale skips: neither a micro-batch nor that step is counted.

    Of a fused optimizer, the Trainer's default, accelerate does not notice it.
    """
    accumulation = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    trainer = make(tmp_path, optim=optim, max_steps=6, **accumulation)
    callback = EMACallback(trainer, decay=DECAY, half_life=None)
    trainer.add_callback(callback)
    trainer.args.include_num_input_tokens_seen = "all"
    before = full_weights(trainer)
    assert trainer.evaluate(EVAL["a"])["eval_loss"] == pytest.approx(loss_of(before, EVAL["a"].rows), rel=1e-5)

    class Overflow(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(trainer.model.parameters()).grad.fill_(float("inf"))

    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    trainer.add_callback(Overflow())
    recorder = follow(trainer)
    trainer.args.max_grad_norm = 0.0
    trainer.train()
    ema = callback.ema
    assert ema is not None and recorder.dense is not None and trainer.state.global_step == 6
    assert (ema.num_updates, ema.progress.batches, ema.progress.tokens) == (5, 4, 5 * 8 * 6)
    assert ema.progress.epochs == pytest.approx(5 / 6)
    check_average(ema, recorder.dense.average)


def test_a_new_average_for_each_training(tmp_path: Path) -> None:
    """``model_init`` (hyperparameter_search) makes a new model at each ``train()``; a resumed one goes on."""
    callback = EMACallback(decay=DECAY)
    trainer = make(tmp_path, callback, model_init=tiny, save_strategy="epoch", max_steps=6)
    trainer.train()
    first, model = callback.ema, trainer.model
    assert first is not None
    wanted = first.fingerprint()
    trainer.train()
    assert callback.ema is not first and trainer.model is not model
    assert callback.ema is not None and callback.ema.fingerprint() == wanted
    trainer.train(resume_from_checkpoint=True)
    assert callback.ema.num_updates == 6 and callback.ema.fingerprint() == wanted


def test_peft_and_a_compiled_model(tmp_path: Path) -> None:
    """Only adapters are trained; names and files are those of the model without wrappers."""
    peft = pytest.importorskip("peft", reason="is in the extra 'test'")
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    callback = EMACallback(decay=DECAY, save_averaged=True)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_a_loss", "eval_strategy": "epoch"}
    arguments = {"torch_compile": True, "torch_compile_backend": "eager", "save_strategy": "epoch"}
    trainer = make(tmp_path, callback, model=model, **arguments, **best)
    trainer.train()
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    assert callback.ema is not None
    state = callback.ema.full_state_dict(include_untracked=False)
    assert state and all(name.startswith("base_model.model.model.layers.") and "lora" in name for name in state)
    trainer.save_model(str(tmp_path / "final"))
    again = peft.PeftModel.from_pretrained(tiny(), tmp_path / "final")
    found = {name: value for name, value in again.state_dict().items() if "lora" in name}
    assert same(found, state)
    resumed = EMACallback(decay=DECAY)
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    other = make(tmp_path, resumed, model=model, **arguments)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.ema is not None and resumed.ema.num_updates == 6


def test_a_subclass_with_an_evaluation_of_its_own(tmp_path: Path) -> None:
    """Neither ``super().evaluate()`` nor ``evaluation_loop()`` is called: examples of question answering do so."""

    class Mixin:
        model: Any

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            weight = next(self.model.parameters())
            return {"eval_loss": float(weight.detach().double().sum())}

    class Own(Mixin, Trainer):  # type: ignore[misc]
        """One that inherits it."""

    callback = EMACallback(decay=DECAY)
    trainer = make(tmp_path, callback, kind=Own)
    trainer.train()
    assert callback.ema is not None
    averaged = next(iter(callback.ema.full_state_dict().values())).double().sum()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(averaged), rel=1e-9)
    assert trainer.pop_callback(EMACallback) is callback
    assert trainer.evaluate()["eval_loss"] == float(next(trainer.model.parameters()).detach().double().sum())


def test_seq2seq_generates_with_the_average(tmp_path: Path) -> None:
    """``Seq2SeqTrainer`` overrides ``evaluate()``, ``predict()`` and ``prediction_step()``."""
    torch.manual_seed(1)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(vocab_size=37, **sizes, decoder_start_token_id=0, dropout_rate=0.0))
    plain = copy.deepcopy(model)
    callback = EMACallback(decay=DECAY)
    given: dict[str, Any] = {"kind": Seq2SeqTrainer, "settings": Seq2SeqTrainingArguments}
    trainer = make(tmp_path, callback, model=model, predict_with_generate=True, generation_max_length=5, **given)
    trainer.train()
    found = trainer.predict(EVAL["a"]).predictions
    live = [tensor.clone() for tensor in trainer.model.parameters()]
    assert callback.ema is not None
    plain.load_state_dict(callback.ema.full_state_dict(), strict=False)
    wanted = plain.generate(EVAL["a"].rows, max_length=5, decoder_start_token_id=0)
    assert found[:, : wanted.shape[1]].tolist() == wanted.tolist()
    assert all(torch.equal(one, other) for one, other in zip(live, trainer.model.parameters(), strict=True))


def test_trl(tmp_path: Path) -> None:
    """``SFTTrainer`` overrides ``evaluate()``, ``log()`` and ``_save_checkpoint()``."""
    trl = pytest.importorskip("trl", reason="is in the extra 'test'")
    from datasets import Dataset as Rows
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(36)} | {"</s>": 36}, unk_token="</s>"))
    data = {name: Rows.from_dict({"input_ids": part.rows.tolist()}) for name, part in {"": TRAIN, **EVAL}.items()}
    callback = EMACallback(decay=DECAY)
    given: dict[str, Any] = {"kind": trl.SFTTrainer, "settings": trl.SFTConfig, "train_dataset": data.pop("")}
    given["processing_class"] = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>")
    saving = {"eval_strategy": "epoch", "save_strategy": "epoch", "use_cpu": True, "bf16": False}
    trainer = make(tmp_path, callback, eval_dataset=data, **given, **saving)
    recorder = follow(trainer)
    trainer.train()
    assert recorder.dense is not None and callback.ema is not None
    check_average(callback.ema, recorder.dense.average)
    for step, value in logged(trainer, "eval_b_loss").items():
        assert value == pytest.approx(loss_of(recorder.at[step], EVAL["b"].rows), rel=1e-5)
    assert logged(trainer, "ema/num_updates") == {step: step for step in range(1, 7)}
    assert (tmp_path / "checkpoint-3" / "ema").is_dir()


def test_an_optimizer_that_moves_the_weights_for_an_evaluation(tmp_path: Path) -> None:
    """As schedule-free ones do, and trl's vLLM holds weights of a step: neither may take the average for the live."""

    class ScheduleFree(torch.optim.SGD):
        training = True

        def eval(self) -> None:
            self._move(2.0, False)

        def train(self) -> None:
            self._move(0.5, True)

        @torch.no_grad()
        def _move(self, factor: float, training: bool) -> None:
            if self.training is not training:
                self.training = training
                for parameter in self.param_groups[0]["params"]:
                    parameter.mul_(factor)

    class Own(Trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._last_loaded_step, self.generated = -1, []

        def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
            self.optimizer = ScheduleFree(self.model.parameters(), lr=0.05)
            return self.optimizer

        def generate(self) -> None:
            if self.state.global_step != self._last_loaded_step:
                self.vllm = next(self.model.parameters()).detach().clone()
                self._last_loaded_step = self.state.global_step
            self.generated.append(self.vllm)

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.generate()
            return loss

        def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
            found = super().prediction_step(*args, **kwargs)
            self.generate()
            return found

    arguments = {"kind": Own, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset": EVAL["a"], "use_cpu": True}
    plain: Any = make(tmp_path, **{**arguments, "eval_strategy": "no"})
    plain.train()
    trainer: Any = make(tmp_path, EMACallback(decay=DECAY), **arguments)
    recorder = follow(trainer)
    trainer.train()
    assert logged(trainer, "loss") == logged(plain, "loss")
    for step, value in logged(trainer, "eval_loss").items():
        assert value == pytest.approx(loss_of(recorder.at[step], EVAL["a"].rows), rel=1e-5)
    trained = [trainer.generated[index] for index in (0, 1, 6, 7, 12, 13)]  # four batches are evaluated in between
    assert all(torch.equal(one, other) for one, other in zip(trained, plain.generated, strict=True))
    name = next(iter(recorder.at[2]))
    torch.testing.assert_close(trainer.generated[2], recorder.at[2][name].float())


def test_layers_that_a_callback_freezes_and_unfreezes(tmp_path: Path) -> None:
    """Gradual unfreezing, and freezing: the next update stopped training."""

    class Freezing(TrainerCallback):
        """Trains the second layer alone, then both, then the first alone."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            first, second = model.model.layers
            first.requires_grad_(state.global_step >= 2)
            second.requires_grad_(state.global_step < 4)

    model = tiny()
    model.model.layers[0].requires_grad_(False)
    callback = EMACallback(decay=DECAY)
    arguments = {"use_cpu": True, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    trainer = make(tmp_path, Freezing(), callback, model=model, **arguments)
    recorder = follow(trainer)
    trainer.train()
    assert callback.ema is not None and callback.ema.num_updates == 6
    # What joins at the third step was constant until the step before, but the dense average knows its first value.
    expected = DenseAverage(set(recorder.last), DECAY)
    before: dict[str, Tensor] = {}
    for step, weights in sorted(recorder.weights.items()):
        joins = {name for name in weights if name.startswith("model.layers.0.")} if step == 3 else set()
        for name in joins:
            assert torch.equal(before[name], recorder.weights[1][name])
            del expected.average[name]
        expected.update(weights)
        before = weights
    check_average(callback.ema, expected.average)
    resumed = EMACallback(decay=DECAY)
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    other = make(tmp_path, Freezing(), resumed, model=model, **arguments)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.ema is not None
    assert resumed.ema.fingerprint() == callback.ema.fingerprint()


@pytest.mark.parametrize("options", [{"ema_start": "7ba"}, {"ema_start": "3ep"}], ids=str)
def test_an_average_that_never_begins_is_said_when_training_begins(
    options: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six steps in two epochs. Its users evaluated the live model and did not know it."""
    found: list[int] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            found.append(len([record for record in caplog.records if "no average" in record.getMessage()]))

    trainer = make(tmp_path, EMACallback(decay=DECAY, **options), Look(), use_cpu=True)
    trainer.train()
    assert set(found) == {1}
    assert len([record for record in caplog.records if "no average" in record.getMessage()]) == 1, "once"


@pytest.mark.parametrize(
    ("options", "before"),
    [
        ({"ignore_data_skip": True}, 4),  # the epoch begins again, so that state.epoch falls back
        ({"per_device_train_batch_size": 8}, 6),  # twice the steps an epoch: for the Trainer it is the second again
        ({"per_device_train_batch_size": 24}, 6),  # fewer: it is the fourth already
    ],
)
def test_epochs_of_a_run_that_is_resumed_in_another_way(options: dict[str, Any], before: int, tmp_path: Path) -> None:
    """One step is trained, and it is one step's part of an epoch that counts."""
    arguments: dict[str, Any] = {"num_train_epochs": 4, "use_cpu": True}
    make(tmp_path, EMACallback(half_life="1ep"), save_strategy="steps", save_steps=2, **arguments).train()
    callback = EMACallback(half_life="1ep")

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = True

    trainer = make(tmp_path, callback, Stop(), **arguments, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{before}"))
    assert callback.ema is not None and callback.ema.num_updates == before + 1
    step = options.get("per_device_train_batch_size", 16) / 48
    assert callback.ema.progress.epochs == pytest.approx((before - 1) / 3 + step)


def test_a_checkpoint_from_a_callback_that_comes_before(tmp_path: Path) -> None:
    """``enable_jit_checkpoint`` saves in ``on_step_end``, before the callbacks that were given see the step."""

    class Terminate(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for other in trainer.callback_handler.callbacks:
                if state.global_step == 2 and (manager := getattr(other, "jit_manager", None)) is not None:
                    manager.is_checkpoint_requested = True

    whole = EMACallback(decay=DECAY)
    make(tmp_path / "whole", whole, use_cpu=True).train()
    callback = EMACallback(decay=DECAY)
    trainer = make(tmp_path, callback, Terminate(), enable_jit_checkpoint=True, use_cpu=True)
    trainer.train()
    assert callback.ema is not None and whole.ema is not None and callback.ema.num_updates == 3
    assert same(read_checkpoint(tmp_path / "checkpoint-3" / "ema"), callback.ema.full_state_dict())
    resumed = EMACallback(decay=DECAY)
    make(tmp_path, resumed, use_cpu=True).train(resume_from_checkpoint=True)
    assert resumed.ema is not None and resumed.ema.fingerprint() == whole.ema.fingerprint()


def test_bf16_full_eval_leaves_the_average_whole(tmp_path: Path) -> None:
    """Outside of training the Trainer casts the model for good; with the average inside, that would be rounded."""
    callback = EMACallback(decay=DECAY)
    trainer = make(tmp_path, callback, bf16_full_eval=True, use_cpu=True)
    trainer.train()
    assert callback.ema is not None
    before = callback.ema.fingerprint()
    trainer.evaluate()
    assert callback.ema.fingerprint() == before


def test_evaluate_false_and_a_second_training(tmp_path: Path) -> None:
    """It goes on with the weights of the first, from step 0 of its own, and so does the average."""
    callback = EMACallback(decay=DECAY, evaluate=False)
    trainer = make(tmp_path, callback)
    trainer.train()
    recorder = follow(trainer)
    trainer.train()
    assert callback.ema is not None and recorder.dense is not None and callback.ema.num_updates == 6
    check_average(callback.ema, recorder.dense.average)
    live = loss_of(full_weights(trainer), EVAL["a"].rows)
    assert trainer.evaluate(EVAL["a"])["eval_loss"] == pytest.approx(live, rel=1e-5)


def test_a_checkpoint_without_an_average(tmp_path: Path) -> None:
    make(tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=r"checkpoint-4 has no ema/.*missing='start'"):
        make(tmp_path, EMACallback()).train(resume_from_checkpoint=checkpoint)
    callback = EMACallback(missing="start")
    make(tmp_path, callback).train(resume_from_checkpoint=checkpoint)
    assert callback.ema is not None and callback.ema.num_updates == 2


def test_what_is_refused(tmp_path: Path) -> None:
    for options, message in (({"missing": "ignore"}, "missing='ignore': allowed are 'error' and 'start'"),):
        with pytest.raises(EMAConfigError, match=message):
            EMACallback(**options)
    with pytest.raises(TypeError, match="unexpected keyword argument 'halflife'"):
        EMACallback(halflife="1ba")
    for options, message in (
        ({"update_interval": "10sp"}, "does not count sp: allowed are ba, ep, and with"),
        ({"half_life": "10tok"}, "include_num_input_tokens_seen"),
        ({"max_duration": "10ba"}, "max_duration='10ba', and the Trainer's is 6ba or 2ep: leave it out"),
        ({"averages": {"x": 0.5, "y": 0.9}}, "evaluate=True: allowed are False, 'x', 'y'"),
        ({"save_averaged": "slow"}, "save_averaged='slow': allowed are False, True, 'ema'"),
    ):
        with pytest.raises(EMAConfigError, match=message):
            make(tmp_path, EMACallback(**options)).train()
    make(tmp_path, EMACallback(max_duration="2ep"), max_steps=-1)
    trainer = make(tmp_path, EMACallback())
    with pytest.raises(EMAConfigError, match="two EMACallbacks"):
        EMACallback(trainer)
    trainer.add_callback(EMACallback())
    with pytest.raises(EMAConfigError, match="two EMACallbacks"):
        trainer.train()
    shared = EMACallback(make(tmp_path))
    with pytest.raises(EMAConfigError, match="belongs to another Trainer"):
        make(tmp_path, shared).train()

    with pytest.raises(EMAConfigError, match="another Trainer, '1ep'"):  # meant as a half life
        make(tmp_path, EMACallback("1ep")).train()

    class Late(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                late.add_callback(EMACallback())

    late = make(tmp_path, Late())
    with pytest.raises(EMAStateError, match="before train"):
        late.train()

    class Inside(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            inside._save_checkpoint(inside.model, None)

    inside = make(tmp_path, EMACallback(), Inside(), eval_strategy="epoch")
    with pytest.raises(EMAStateError, match="inside an evaluation"):
        inside.train()


def test_an_update_inside_an_evaluation_says_who_holds_the_average(tmp_path: Path) -> None:
    callback = EMACallback(decay=DECAY)

    class Update(TrainerCallback):
        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert callback.ema is not None
            callback.ema.update()

    with pytest.raises(EMAStateError, match="which the Trainer holds open"):
        make(tmp_path, callback, Update(), eval_strategy="epoch").train()


def test_importing_the_library_imports_no_trainer() -> None:
    code = "import sys, dist_ema; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    code = "import sys; sys.modules['transformers'] = None; import dist_ema.integrations.transformers"
    found = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "ImportError: EMACallback needs transformers 5: pip install 'dist_ema[transformers]'" in found.stderr
