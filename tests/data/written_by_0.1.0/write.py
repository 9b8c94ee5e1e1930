"""Writes the files beside it, by the version of the library that is imported.

``python write.py`` writes all into an empty folder, ``python write.py KIND...`` some kinds: ``averages``, ``offline``,
``transformers``, ``accelerate``, ``lightning``, ``composer``. Run it with the version whose files are to be kept, never
to make a failing test pass: the files stand for those that users have.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))
os.environ["DS_ACCELERATOR"] = "cpu"

from support import written  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.distributed.checkpoint as dcp  # noqa: E402

import dist_ema  # noqa: E402


def averages(size: int) -> None:
    """What ``save``, ``dcp.save`` and ``torch.save`` write on so many ranks."""
    if size == 1:
        for options in written.OPTIONS:
            ema = written.make("plain", options)
            for moment, steps in written.MOMENTS.items():
                written.advance(ema, steps, options)
                _record(f"options/{options}/{moment}", options, written.facts(ema))
    tables = (written.SAVED, written.DCP, written.PER_RANK, written.FULL, written.LIVE)
    for table in tables:
        for name, (engine, options) in table.items():
            if written.ENGINES[engine] == size:
                ema = written.make(engine, options)
                written.advance(ema, range(written.UPDATES), options)
                _write(ema, name, options)
                _record(name, options, written.facts(ema))


def _write(ema: dist_ema.ShardedEMA, name: str, options: str) -> None:
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    if name in written.SAVED:
        ema.save(path, **written.OPTIONS[options].save)
        ema.close()
    elif name in written.DCP:
        dcp.save({"ema": ema}, checkpoint_id=path)
    else:
        full, live = name in written.FULL, name.endswith("live")
        state = ema.state_dict(full=full, live=live)
        if not full:
            torch.save(state, f"{path}.rank{dist.get_rank()}.pt")
        elif dist.get_rank() == 0:
            torch.save(state, f"{path}.pt")


def offline(size: int) -> None:
    """Snapshots, exports and merges."""
    if size != 2:
        return
    ema = written.make("fsdp2", "engine")
    ema.snapshot(HERE / "snapshots", every="2ba")
    ema.snapshot(HERE / "snapshots_bf16", every="0.25ep", dtype=torch.bfloat16)
    written.advance(ema, range(4), "engine")
    ema.wait()
    ema.export(HERE / "export", name="slow", max_shard_size=3000, dtype=torch.bfloat16)
    snapshots = [HERE / "snapshots" / "2ba", HERE / "snapshots" / "4ba"]
    dist_ema.merge(snapshots, HERE / "merged", name="slow", weights=[0.25, 0.75])
    dist_ema.merge(snapshots, HERE / "merged_checkpoint", name="slow", weights=[0.25, 0.75], checkpoint=True)
    dist_ema.synthesize(snapshots, HERE / "synthesized", target="decay=0.75", checkpoint=True)
    for name in written.READABLE:
        found = written.digests(dist_ema.read_checkpoint(HERE / name, written.READABLE[name]))
        _record(name, "", found)
    for name in written.FOLDERS:
        _record(name, "", written.digests(written.read_folder(HERE / name)))


def trainer(name: str) -> Callable[[int], None]:
    """A kind of one of the trainers."""

    def write(size: int) -> None:
        from support import written_trainers

        for file, (kind, ranks) in written_trainers.FILES.items():
            if kind == name and ranks == size:
                _record(file, "", written_trainers.write(kind, HERE / file))

    return write


KINDS = {"averages": averages, "offline": offline}
KINDS |= {name: trainer(name) for name in ("transformers", "accelerate", "lightning", "composer")}


def _record(name: str, options: str, found: object) -> None:
    """Keeps what a file has to give; on rank 0."""
    if dist.get_rank():
        return
    path = HERE / "expected.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if options and not name.startswith("options/"):  # every engine has to give the same
        wanted = known[f"options/{options}/written"]
        assert found == wanted, name
    else:
        known[name] = found
    path.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def _on_rank(rank: int, size: int, kind: str, rendezvous: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29411")
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=size)
    KINDS[kind](size)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    for kind in sys.argv[1:] or KINDS:
        for size in (1, 2, 4):
            with tempfile.TemporaryDirectory() as folder:
                ranks = [
                    multiprocessing.Process(target=_on_rank, args=(rank, size, kind, f"{folder}/group"))
                    for rank in range(size)
                ]
                for process in ranks:
                    process.start()
                for process in ranks:
                    process.join()
                assert not any(process.exitcode for process in ranks), (kind, size)
