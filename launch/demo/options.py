"""The options of ``train.py``, from YAML and the command line. Imports no torch: a wrong option is reported at once."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser
from jsonargparse.typing import NonNegativeInt, Path_fr, PositiveFloat, PositiveInt

from demo.checkpoints import FOLDER, differences, latest
from dist_ema.schedules.clock import Time

UNITS = ("ba", "sp", "tok")  # of what train.py counts
EXPORT = "export"  # the folder of the exported average, inside the output folder

# Keys of DeepSpeed's JSON that other options decide, and what to use instead.
OURS = {
    "bf16": "use precision=bf16",
    "fp16": "use precision=fp32 or bf16",
    "optimizer": "use lr",
    "train_batch_size": "use batch",
    "train_micro_batch_size_per_gpu": "use batch",
    "gradient_accumulation_steps": "every batch is a step",
}

Engine = Literal["ddp", "fsdp1", "fsdp2", "hsdp", "tp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class Options:
    """Trains a byte-level GPT and a sharded average of its weights.

    Args:
        engine: how the model is spread over the processes.
        data: text to train on, a file or a folder; by default the Python standard library's own sources.
        out: folder for all that is written; by default a fresh ``runs/<engine>-<number>``.
        steps: optimizer steps.
        batch: sequences per step, of all processes together; under tp each tensor-parallel group counts as one.
        lr: learning rate of AdamW, constant.
        seed: of the initial weights and of the training batches.
        precision: what matrix products compute in; the average is fp32 in any case.
        layers: transformer blocks.
        width: of the residual stream; a multiple of heads.
        heads: attention heads per block.
        context: bytes per sequence.
        half_life: of the average, in batches (20ba), samples (5000sp) or tokens (1000000tok) of all processes.
        update_interval: batches between two updates of the average (1ba).
        ema_start: when averaging starts, in the same units or as a part of the run (0.1dur).
        eval_every: steps between two evaluations of live and averaged weights.
        eval_windows: validation sequences, the same at every evaluation and world size.
        checkpoint_every: how often to save all that a restart needs (100ba, or sp, tok; a number is of steps), or null.
        keep_checkpoints: how many of the newest to keep.
        resume: auto goes on from the newest checkpoint in out; never refuses an out that has one.
        replicas: hsdp only: copies of the model, each sharded over the rest; by default one a node, or two on one node.
        tensor_parallel: tp only: processes that share each layer; by default two.
        deepspeed: zero1, zero2 and zero3 only: DeepSpeed's JSON; a path in a YAML is relative to that YAML.
    """

    engine: Engine = "ddp"
    data: str | None = None
    out: str | None = None
    steps: PositiveInt = 300
    batch: PositiveInt = 16
    lr: PositiveFloat = 4e-3
    seed: NonNegativeInt = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    layers: PositiveInt = 4
    width: PositiveInt = 96
    heads: PositiveInt = 4
    context: PositiveInt = 128
    half_life: str = "10ba"
    update_interval: str = "1ba"
    ema_start: str = "0.1dur"
    eval_every: PositiveInt = 30
    eval_windows: PositiveInt = 128
    checkpoint_every: PositiveInt | str | None = "100ba"
    keep_checkpoints: PositiveInt = 2
    resume: Literal["auto", "never"] = "auto"
    replicas: PositiveInt | None = None
    tensor_parallel: PositiveInt | None = None
    deepspeed: Path_fr | None = None

    def check(self, world_size: int) -> None:
        """What no single option can know by itself. Raises ValueError naming option, value and what is allowed."""
        if self.width % self.heads:
            raise ValueError(f"width={self.width}: must be a multiple of heads={self.heads}")
        Time.parse(self.half_life, option="half_life", units=UNITS)
        Time.parse(self.update_interval, option="update_interval", units=UNITS)
        Time.parse(self.ema_start, option="ema_start", units=(*UNITS, "dur"), positive=False)
        if self.data is not None and not Path(self.data).exists():
            raise ValueError(f"data={self.data}: no such file or folder")
        self.checkpoint_interval()
        self._check_out()
        self._check_layout(world_size)
        self._check_deepspeed()

    def _check_out(self) -> None:
        if self.out is None:
            if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")):
                raise ValueError("out=None: is a fresh folder at each restart; torchrun's --max-restarts needs an out")
            return
        if not self.out.strip():
            raise ValueError(f"out={self.out!r}: give a folder, or null for a fresh one")
        found = latest(Path(self.out))
        if found is None and (Path(self.out) / EXPORT).exists():
            raise ValueError(
                f"out={self.out}: holds the export of an earlier run; give another folder, or remove {EXPORT}"
            )
        if found is not None and self.resume == "never":
            raise ValueError(
                f"out={self.out}: holds checkpoints of an earlier run, and resume=never; give another folder, or "
                f"remove {FOLDER} and {EXPORT}"
            )
        if found is not None and (why := differences(found, vars(self))):
            raise ValueError(
                f"out={self.out}: its checkpoint {found.name} does not fit these options: {why}. Give those of the "
                "earlier run, or another folder"
            )

    def checkpoint_interval(self) -> Time | None:
        """Training between two checkpoints; None for no checkpoints."""
        if self.checkpoint_every is None:
            return None
        return Time.parse(self.checkpoint_every, option="checkpoint_every", units=UNITS)

    def _check_layout(self, world_size: int) -> None:
        for name, engine in (("replicas", "hsdp"), ("tensor_parallel", "tp")):
            value = getattr(self, name)
            if value is not None and self.engine != engine:
                raise ValueError(f"{name}={value}: only with engine={engine}, not engine={self.engine}")
            if value is not None and world_size % value:
                raise ValueError(f"{name}={value}: must divide the number of processes, {world_size}")
        if self.engine == "tp":
            size = self.tensor_parallel_size(world_size)
            for name in ("heads", "context"):
                if getattr(self, name) % size:
                    raise ValueError(f"{name}={getattr(self, name)}: must be a multiple of tensor_parallel={size}")

        parts = world_size // self.tensor_parallel_size(world_size) if self.engine == "tp" else world_size
        if self.batch % parts:
            raise ValueError(f"batch={self.batch}: must be a multiple of {parts}, the processes that share it out")

    def _check_deepspeed(self) -> None:
        if not self.engine.startswith("zero"):
            if self.deepspeed is not None:
                raise ValueError(
                    f"deepspeed={self.deepspeed}: only with engine=zero1, zero2 or zero3, not {self.engine}"
                )
            return
        if self.deepspeed is None:
            raise ValueError(
                f"engine={self.engine}: needs deepspeed, the path of DeepSpeed's JSON (configs/{self.engine}.json)"
            )
        try:
            config = self.deepspeed_config()
            stage = config["zero_optimization"]["stage"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"deepspeed={self.deepspeed}: no JSON with zero_optimization.stage in it ({error!r})"
            ) from error
        if f"zero{stage}" != self.engine:
            raise ValueError(
                f"deepspeed={self.deepspeed}: has zero_optimization.stage {stage}, but engine={self.engine}"
            )
        for key, instead in OURS.items():
            if key in config:
                raise ValueError(f"deepspeed={self.deepspeed}: has {key}, which train.py sets; {instead}")

    def tensor_parallel_size(self, world_size: int) -> int:
        """Processes that share each layer."""
        return self.tensor_parallel or (2 if world_size % 2 == 0 else 1)

    def replica_count(self, world_size: int) -> int:
        """Copies of the model under hsdp: one per node, as the slow links are between nodes; on one node two."""
        nodes = world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        return self.replicas or (nodes if nodes > 1 else 2 if world_size % 2 == 0 else 1)

    def deepspeed_config(self) -> dict[str, Any]:
        """DeepSpeed's JSON as it stands in the file. Raises ValueError where it is not an object."""
        config = json.loads(Path(self.deepspeed.absolute).read_text()) if self.deepspeed is not None else None
        if not isinstance(config, dict):
            raise ValueError("not an object")
        return config


class _Parser(ArgumentParser):
    """Names the nearest neighbour of an unknown key, and reports once per node instead of once per process."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            self.exit(2)
        names = [field.name for field in fields(Options)] + ["config"]
        unknown = re.findall(r"--([\w-]+)|[Oo]ption '([\w-]+)'|[Kk]ey '([\w-]+)'", message)
        for name in [name for name in dict.fromkeys("".join(groups) for groups in unknown) if name not in names]:
            nearest = get_close_matches(name.replace("-", "_"), names, n=1, cutoff=0.4)
            message += f"\n  {name} is unknown" + (
                f": did you mean {nearest[0]}?" if nearest else "; --help lists all options"
            )
        message = re.sub(r'Parser key "([\w-]+)":\s*', r"\1: ", message)
        # Without the usage, which is eleven lines of all the options.
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse(argv: list[str] | None, world_size: int) -> Options:
    """Reads ``--config`` and the options after it. Exits with status 2 on a wrong one, before anything has started."""
    parser = _Parser(prog="train.py", description=(Options.__doc__ or "").split("\n")[0], allow_abbrev=False)
    parser.add_argument("--config", action=ActionConfigFile, help="YAML with any of the options; later options win.")
    parser.add_class_arguments(Options)
    values = parser.parse_args(argv).as_dict()
    options = Options(**{field.name: values[field.name] for field in fields(Options)})
    try:
        options.check(world_size)
    except ValueError as error:
        parser.error(str(error))
    return options
