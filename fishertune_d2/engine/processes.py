"""Starts a run in one or several processes, by Detectron2's launcher or under torchrun."""

import os
import re
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from threading import Thread

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from . import preemption

# The variables that torchrun gives each of its processes, beside the address where they meet.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# The message of torch.distributed if another process is gone.
_LEFT_ALONE = re.compile(r"Connection (closed|reset) by (remote )?peer")
# Seconds that a process waits for the others when it leaves.
_PATIENCE = 10


def launch(main: Callable[[Namespace], object], args: Namespace, *, device: str) -> None:
    """Runs ``main(args)`` in every process of a run.

    A process that torchrun started joins the others of its run: by NCCL on GPUs, one for each
    process, or by gloo on CPUs. Otherwise this is the only process so far, and Detectron2's
    launcher starts as many as ``--num-gpus`` and its other options say. However ``main`` ends, its
    process leaves the others' group, and waits at most 10 seconds for them. A ValueError refuses
    ``--num-gpus`` or ``--num-machines`` under torchrun, and more processes than GPUs. ``args`` come
    from Detectron2's ``default_argument_parser``, whose launcher must be able to pickle ``main``;
    ``device`` is MODEL.DEVICE.
    """
    if all(name in os.environ for name in _TORCHRUN):
        _join_torchrun(args, device)
        _run(main, args)
    elif args.num_gpus * args.num_machines > 1:  # this process only waits for the others
        places = (args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
        gpus = nullcontext() if device.startswith("cuda") else _hidden_gpus()
        with preemption.forwarding(), gpus:
            detectron2_launch(partial(_run, main), *places, args=(args,))
    else:
        main(args)


def _run(main: Callable[[Namespace], object], args: Namespace) -> None:
    """Runs one of several processes, leaves their group, and exits if another has stopped."""
    try:
        main(args)
        comm.synchronize()  # otherwise the first one to finish would wait in vain for the others
    except RuntimeError as error:  # torch.distributed has no class of its own for this error
        if _LEFT_ALONE.search(str(error)) is None:
            raise
        # The parent shows only the first process that ends, so let the other one end first.
        time.sleep(_PATIENCE + 1)
        print(
            f"Process {comm.get_rank()} stops because another process of this run has stopped",
            file=sys.stderr,
        )
        sys.exit(1)
    finally:
        # In a thread, because NCCL waits for messages that other processes may never send.
        leaving = Thread(target=torch.distributed.destroy_process_group, daemon=True)
        leaving.start()
        leaving.join(_PATIENCE)


@contextmanager
def _hidden_gpus() -> Iterator[None]:
    """Hides the GPUs from processes that start meanwhile, to which Detectron2 would give NCCL."""
    name = "CUDA_VISIBLE_DEVICES"
    before = os.environ.get(name)
    os.environ[name] = ""
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def _join_torchrun(args: Namespace, device: str) -> None:
    processes = int(os.environ["LOCAL_WORLD_SIZE"])
    if (args.num_gpus, args.num_machines) != (1, 1):
        raise ValueError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and --num-gpus "
            f"{args.num_gpus} --num-machines {args.num_machines} asks for others: leave these out"
        )
    on_gpus = device.startswith("cuda")
    if on_gpus and processes > torch.cuda.device_count():
        raise ValueError(
            f"torchrun started {processes} processes on this machine, which has "
            f"{torch.cuda.device_count()} GPUs: start one for each (--nproc-per-node), or choose "
            "MODEL.DEVICE cpu"
        )
    if on_gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo", timeout=DEFAULT_TIMEOUT)
    comm.create_local_process_group(processes)
