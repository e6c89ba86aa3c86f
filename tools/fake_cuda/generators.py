"""Draws the random numbers of the device on the CPU, from the state of a CUDA generator."""

import hashlib

import torch

# Operators that draw random numbers, by the start of their names.
RANDOM = tuple(
    """bernoulli exponential multinomial native_dropout normal poisson rand random_ randn randint
    randperm rrelu uniform""".split()
)


def draw(operator, args: tuple, kwargs: dict):
    """Computes a random operator on the CPU, and advances the CUDA generator.

    The numbers depend only on the generator's seed and offset. So to seed, save or restore a
    generator has the same effect as on a GPU.

    Returns:
        The operator's result, on the device.

    Raises:
        RuntimeError: if the generator is not the device's.
    """
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
    source = given[0] if given else torch.cuda.default_generators[0]
    if source.device.type != "cuda":
        raise RuntimeError(
            f"Expected a 'cuda' device type for generator but found '{source.device.type}' "
            f"(operator {operator}) [fake CUDA device]"
        )
    words = f"{source.initial_seed()} {source.get_offset()}".encode()
    source.set_offset(source.get_offset() + 4)
    own = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(words).digest()[:7]))
    args = tuple(own if isinstance(x, torch.Generator) else x for x in args)
    kwargs = {k: own if isinstance(v, torch.Generator) else v for k, v in kwargs.items()}
    if given:
        return operator(*args, **kwargs)
    # Operators without a generator among their arguments draw from the CPU's own.
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(own.get_state())
    try:
        return operator(*args, **kwargs)
    finally:
        torch.default_generator.set_state(before)
