"""Communicates between ranks: collective calls, process groups, and full tensors from the parts of all ranks.

| File | Subject |
|---|---|
| ``collectives`` | short messages between ranks, with tags; sums over ranks |
| ``agreement`` | ``agreed``: an error on one rank becomes an error on all; ranks compare their calls |
| ``groups``, ``channels``, ``attendance`` | the process groups that the library makes, and who waits in them |
| ``windows`` | large sends and receives, within bounded memory |
| ``gather``, ``resharding`` | full tensors, and other shards, from the parts of all ranks |
| ``catalogue`` | the list of all full tensors, and which rank writes which part |
"""
