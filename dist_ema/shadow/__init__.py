"""The averaged copy, on the device or in host memory behind a thread; and its visits to the model.

Who waits for what, on which CUDA stream. *Current* is the caller's stream on the weights' device; threads of ours never
use a default stream:

==================  ==========================  =======================================================================
work                runs on                     waits for
==================  ==========================  =======================================================================
update, on device   current                     nothing: it is queued behind the optimizer's step
offload: buffers    current                     nothing; copied before the next forward pass can write them
offload: weights    a stream of its own         all that *current* had queued at ``update()`` (``wait_stream``)
offload: average    the worker thread, CPU      the event behind those copies (``CudaLink.join``), on the host
next optimizer      current                     that event (``wait_for_reads``, a step pre-hook): on the device, not the
step                                            host; weights in host memory: the worker has read them
next ``update()``   the caller                  the worker's last job, on the host; all calls but ``update`` do as well
swap                current                     ``wait_for_reads``, and that a background save has read the shadow
background save     its thread, own stream      the event that *current* recorded at ``save()`` (``Handover``); live
                                                weights are written before ``save()`` returns
next ``update()``   the caller                  that the save has read the shadow (``wait_until_read``), on the host
load                reader threads, own stream  the event that *current* recorded when reading began (``Handover``);
                                                the caller waits for the threads
==================  ==========================  =======================================================================

Copies between a device and pageable memory are over when they return, so whoever waits for a thread of ours has waited
for its copies.
"""
