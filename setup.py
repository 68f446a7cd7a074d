"""The metadata is in pyproject.toml; the extensions of csrc/ will be declared here. None is built today."""

from setuptools import setup

setup()
