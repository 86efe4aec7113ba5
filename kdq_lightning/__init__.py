"""kdq-lightning: distil a network and quantize it, or quantize it as it is? Import from the submodules."""

from importlib.metadata import version

__version__ = version("kdq-lightning")
