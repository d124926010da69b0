"""Packaging is declared in pyproject.toml; this file is where compiled extensions join it. It needs no torch and no compiler."""

from setuptools import setup

setup()
