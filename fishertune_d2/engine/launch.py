"""Starts a run in one process or several: by Detectron2's launcher, or as torchrun started it."""

import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext

import torch
from detectron2.engine import launch as detectron2_launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm

from . import preemption

# What torchrun tells each of its processes, beside where they meet.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def launch(main: Callable[[Namespace], object], args: Namespace, *, device: str) -> None:
    """Runs ``main(args)`` in every process of a run.

    A process that torchrun started joins the others of its run: by NCCL on GPUs, one for each
    process, or by gloo on CPUs. Otherwise this is the only process so far, and Detectron2's
    launcher starts as many as ``--num-gpus`` and its other options say.

    Args:
        main: what to run; a function of a module, for Detectron2's launcher pickles it.
        args: of Detectron2's ``default_argument_parser``.
        device: MODEL.DEVICE.

    Raises:
        ValueError: if processes are asked for in both ways, or torchrun started more of them than
            this machine has GPUs.
    """
    if not all(name in os.environ for name in _TORCHRUN):
        options = {name: getattr(args, name) for name in ("num_machines", "machine_rank")}
        several = args.num_gpus * args.num_machines > 1  # then this process only waits for them
        with preemption.forwarding() if several else nullcontext():
            detectron2_launch(main, args.num_gpus, dist_url=args.dist_url, args=(args,), **options)
        return
    _join_torchrun(args, device)
    main(args)
    torch.distributed.destroy_process_group()


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
