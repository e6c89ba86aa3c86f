"""Says which folders are packages. pyproject.toml holds everything else."""

from setuptools import find_packages, setup

setup(
    # configs/ stands at the top of a checkout and inside the package in a wheel. pyproject.toml
    # cannot add such a folder to the packages that are found.
    packages=[
        *find_packages(include=["fishertune_d2", "fishertune_d2.*"]),
        "fishertune_d2.configs",
    ],
    package_dir={"fishertune_d2.configs": "configs"},
)
