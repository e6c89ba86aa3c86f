"""FLOPs and memory of the stages of training, counted on a fake run."""

from collections import Counter
from dataclasses import dataclass, replace

import torch

from fishertune_d2.engine.weight_average import trained_tensors
from fishertune_d2.fisher import find_candidates

from .fake_model import on_fake_device
from .fake_run import FakeRun
from .flops import count_flops
from .memory import Memory, estimator_bytes, held_bytes, optimizer_bytes, saved_bytes, weight_bytes


@dataclass(frozen=True)
class Stage:
    """One stage of training, in one process.

    Attributes:
        name: "warmup", "estimation" or "tuning".
        steps: iterations, or batches of the estimate.
        images: the images of a batch.
        flops: multiply-adds of a step; see :mod:`fishertune_d2.plan.flops`.
        uncounted: operators that ``flops`` leaves out though they may matter, and how often each
            is called in a pass.
        memory: the memory that a step holds.
    """

    name: str
    steps: int
    images: int
    flops: int
    uncounted: Counter[str]
    memory: Memory


def plan_stages(run: FakeRun) -> list[Stage]:
    """Counts the stages of a run, in order."""
    stages = []
    for name, (steps, images) in run.stages.items():
        flops, uncounted = step_flops(run, name)
        memory = replace(held_memory(run, name), activations=activation_bytes(run, name))
        stages.append(Stage(name, steps, images, flops, uncounted, memory))
    return stages


def step_flops(run: FakeRun, name: str) -> tuple[int, Counter[str]]:
    """Counts the FLOPs of one step of a stage, and the operators of a pass that they leave out."""
    model = run.model(name)
    run.enter_end(name, model)
    step = run.one_pass(name, model, torch.device("meta"))
    flops = count_flops(step.loss, step.wanted)
    passes = step.repeats * (flops.forward + flops.backward) + step.forwards * flops.forward
    return passes * run.stages[name][1] // step.images, flops.uncounted


def held_memory(run: FakeRun, name: str) -> Memory:
    """Counts the bytes that a stage holds all the time: all but the activations."""
    model = run.model(name)
    weights = weight_bytes(model)
    selected = run.enter(name, model)
    averages = held_bytes(trained_tensors(model, selected)) if run.averages(name) else 0
    if run.self_trains(name):  # the teacher
        head = model.sem_seg_head.parameters()
        averages += held_bytes([p.data for p in head if p.requires_grad])
    memory = Memory(weights, averages=averages, **optimizer_bytes(run.optimizer(model)))
    if selected is not None:
        vectors = weight_bytes(model) - weights
        return replace(memory, selection=vectors + held_bytes(selected.extra_tensors()))
    if name != "estimation":
        return memory
    return replace(
        memory,
        # The decoder's gradients are those of this run's last warm-up step; its moments may also
        # come from another run's.
        gradients=memory.gradients if "warmup" in run.stages else 0,
        optimizer=memory.optimizer if run.warms_up else 0,
        fisher=estimator_bytes(run.cost, find_candidates(model.backbone)),
    )


def activation_bytes(run: FakeRun, name: str) -> int:
    """Counts the bytes that the forward pass of a stage keeps, on the run's device."""
    model = run.model(name)
    with on_fake_device(model, run.device):
        run.enter_end(name, model)
        return saved_bytes(model, run.one_pass(name, model, run.device).loss)
