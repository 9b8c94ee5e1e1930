"""Handles signals, threads, CUDA streams and pinned memory.

The table says which work waits for what, and on which CUDA stream it runs. *Current* is the caller's stream on the
device of the weights. Threads of the library never use a default stream, but an ``OwnStream``
(:mod:`dist_ema.runtime.streams`):

==================  ==========================  =======================================================================
work                runs on                     waits for
==================  ==========================  =======================================================================
update, on device   current                     nothing: it is queued behind the optimizer's step
beside training     own stream                  all that *current* had queued at ``update()`` (``follow``); buffers are
                                                copied on *current* before
next optimizer      current                     that update (``hold_back``, a step pre-hook): on the device, not the
step                                            host; all calls of the library do as well
into a teacher      current                     nothing; the teacher's next forward is queued behind it, and its full
                                                weights of the last one were dropped before
offload: buffers    current                     nothing; copied before the next forward pass can write them
offload: weights    own stream                  all that *current* had queued at ``update()`` (``follow``)
offload: average    the worker thread, CPU      the event behind those copies (``join``), on the host
next optimizer      current                     that event (``hold_back``, a step pre-hook): on the device, not the
step                                            host; weights in host memory: the worker has read them
next ``update()``   the caller                  the worker's last job, on the host; all calls but ``update`` do as well
swap                current                     ``wait_for_reads``, and that a background save has read the shadow
background save     its thread, own stream      all that *current* had queued at ``save()`` (``Handover``); live
                                                weights are written before ``save()`` returns
next ``update()``   the caller                  that the save has read the shadow (``wait_until_read``), on the host
load                reader threads, own stream  all that *current* had queued when reading began (``Handover``); the
                                                caller waits for the threads, and for their copies (``join``)
==================  ==========================  =======================================================================

Saving and loading copy through two pinned buffers a thread (``Relay``): one is filled again when the event behind its
last copy is there. ``tests/support/stream_checks.py`` checks these rules on a fake GPU that does everything as late as
it may, and on a real one. A CUDA graph that is captured while a thread of ours works is invalidated by its calls: call
``wait()`` before the capture.
"""
