"""Packaging that pyproject.toml cannot express; everything else is there."""

from setuptools import setup

setup(
    # The licence stands here because setuptools before 77 rejects the SPDX string in pyproject.toml and setuptools
    # from 2027 on rejects the table form; this spelling works for all of them, and so for offline machines.
    license="Apache-2.0",
    # The import name `kernels` belongs to another distribution, so the folder is installed inside fusedlr.
    package_dir={"fusedlr.kernels": "kernels"},
    packages=[
        "fusedlr",
        "fusedlr.backends",
        "fusedlr.clipping",
        "fusedlr.integrations",
        "fusedlr.kernels",
        "fusedlr.optimizers",
        "fusedlr.schedules",
    ],
    package_data={"fusedlr": ["py.typed"]},
)
