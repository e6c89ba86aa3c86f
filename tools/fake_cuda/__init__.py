"""A fake CUDA device: the project runs on ``cuda:0`` on a machine without a GPU.

python tools/fake_cuda train_net.py --config-file configs/demo.yaml
FISHERTUNE_TEST_DEVICE=cuda python tools/fake_cuda -m pytest tests/engine
python tools/fake_cuda -m fake_cuda.count_steps configs/fishertune_dinov2.yaml --details

Two parts make the device:

- ``runtime.c`` stands in for CUDA's runtime and driver and says that there is one GPU of compute
  capability 9.0. PyTorch then initialises CUDA, has CUDA generators, chooses the attention kernels
  and the autocast rules of a GPU, and runs backward passes in the GPU's own thread.
- ``tensor.py`` has a tensor that says it is on ``cuda:0`` and holds a CPU tensor. Operators compute
  real values on what is held. What CUDA refuses is refused: tensors of two devices in one operator,
  a generator of another device, NumPy's view of a tensor.

``counts.py`` counts the operators that start a kernel, the times that the host waits for the
device, and the uploads, each by the line of the project that causes it.

What a run on this device does not show: the numbers of CUDA's kernels (every value is a CPU's, sums
come in a CPU's order and never vary), operators and types that CUDA lacks but a CPU has, races
between streams, memory (it never runs out), speed, fusion, NCCL and anything else of several GPUs.
A wait inside a kernel of PyTorch that ``tensor.WAITING`` does not list goes uncounted.
Only the process that was started has the device, and workers forked from it; processes that it
starts afresh see a machine without a GPU.
"""
