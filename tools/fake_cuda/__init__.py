"""A fake CUDA device: the project runs on ``cuda:0`` on a machine without a GPU.

python tools/fake_cuda train_net.py --config-file configs/demo.yaml
FISHERTUNE_TEST_DEVICE=cuda python tools/fake_cuda -m pytest tests/engine
python tools/fake_cuda -m fake_cuda.count_steps configs/fishertune_dinov2.yaml --details

The device has two parts:

- ``runtime.c`` replaces CUDA's runtime and driver, and reports one GPU of compute capability 9.0.
  PyTorch then initialises CUDA, has CUDA generators, chooses the attention kernels and the autocast
  rules of a GPU, and runs backward passes in the GPU's own thread.
- ``tensor.py`` has a tensor that claims to be on ``cuda:0`` and holds a CPU tensor. Operators
  compute real values with the CPU tensor. The device refuses everything that CUDA refuses: tensors
  of two devices in one operator, a generator of another device, NumPy's view of a tensor.

``counts.py`` counts the operators that start a kernel, the waits of the host for the device, and
the uploads, each by the line of the project that causes it.

A run on this device does not show:

- the numbers of CUDA's kernels: a CPU computes every value, and its order of sums never varies
- operators and types that a CPU has and CUDA lacks
- races between streams
- memory, which never runs out; speed; fusion
- NCCL and other properties of several GPUs
- a wait inside a kernel of PyTorch that ``tensor.WAITING`` does not list

The process that you start and the workers that it forks have the device. Other processes that it
starts see a machine without a GPU.
"""
