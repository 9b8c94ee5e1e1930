"""Computes which elements of a model a rank holds, averages and writes. Calls no process group.

Words that mean the same thing everywhere in the library:

full tensor      a parameter or buffer as the plain, unwrapped model has it, with its fqn
                 (:class:`~dist_ema.comm.catalogue.FullTensor`).
fqn              its canonical name: the key in the plain model's ``state_dict()``, without any wrapper's prefix.
alias            another fqn of the same, tied tensor; values are kept once, under the first name.
live             what the optimizer trains, or a forward pass computes with.
masters          fp32 copies of the live weights that DeepSpeed's optimizer trains in place of the bf16 or fp16 ones.
source           the live tensor, or the part of the masters, that an average follows on this rank: plain, ND.
shadow           the averaged copy of this rank's part of a tensor: always flat (1D), contiguous, plain.
local shard      the elements of a full tensor that one rank has as a source.
run              ``(start, length)``: elements that follow each other in the row-major flattening of the full tensor. A
                 local shard is a sorted list of runs: one for FSDP1, ZeRO and ``Shard(0)``, one a row for a column
                 shard, none for an empty shard.
box              a hyper-rectangle of the full tensor: offsets and sizes, one a dimension; torch.distributed.checkpoint
                 calls it a chunk. Column shards are thousands of runs and one box.
spec             what an engine says of one tensor on this rank (:class:`spec.TensorSpec`).
replicas         ranks with the same local shard, which split its shadow among them (:class:`spec.Replicas`).
share            what this rank keeps of one tensor: the part of its local shard that it averages, copies or leaves
                 live (:class:`shares.Share`).
partitioned      of a tensor: its elements are spread over the ranks of a mesh. Otherwise each rank has it whole, and
                 ranks are not known to agree.
mesh             the ranks over which a tensor is spread, once each; named by its lowest rank.
writer           of all ranks that hold an element, the one whose value is saved, exported, gathered
                 (:mod:`dist_ema.comm.catalogue`).
tracked          averaged or copied, that is: part of the average. The rest is *untracked*: frozen, excluded, ignored.
"""
