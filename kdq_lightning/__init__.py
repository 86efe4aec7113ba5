"""kdq-lightning: distil a network and quantize it, or quantize it as it is? Import from the submodules."""

__version__ = "0.1.0"
