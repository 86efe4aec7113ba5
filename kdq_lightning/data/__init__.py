"""Images: datamodules for CIFAR, class folders and digits, and stateless augmentation a batch at a time."""
