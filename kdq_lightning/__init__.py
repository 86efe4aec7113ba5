"""kdq-lightning: distil a network and quantize it, or quantize it as it is? Import what you need from the submodules."""
