"""Packaging of scanax: the top-level folders are installed as ``scanax.<folder>``."""

from setuptools import find_packages, setup

FOLDERS = ("models", "train", "configs", "kernels")

packages, package_dir = [], {}
for folder in FOLDERS:
    for package in [folder, *(f"{folder}.{name}" for name in find_packages(folder))]:
        packages.append(f"scanax.{package}")
        package_dir[f"scanax.{package}"] = package.replace(".", "/")

setup(
    packages=packages,
    package_dir=package_dir,
    package_data={
        "scanax.kernels": ["*.json", "*.h"],
        "scanax.kernels.delta_product": ["*.cc"],
        "scanax.kernels.additive_scan": ["*.cc"],
        "scanax.kernels.convolution": ["*.cc"],
        "scanax.kernels.short_convolution": ["*.cc"],
    },
)
