"""Image classifiers by name: the project's own, torchvision's, timm's, and whatever an import path leads to."""

from kdq_lightning.networks.catalogue import (
    NETWORKS,
    Network,
    build_network,
    check_images,
    find_network,
    is_listed,
    network_names,
)
from kdq_lightning.networks.class_rows import class_dimensions, count_classes, reorder_classes, state_shapes
from kdq_lightning.networks.features import check_hint_layer, features_at, parameters_before, strided_on_one_pixel
from kdq_lightning.networks.pretrained import Published, pretrained_state

__all__ = [
    "NETWORKS",
    "Network",
    "Published",
    "build_network",
    "check_hint_layer",
    "check_images",
    "class_dimensions",
    "count_classes",
    "features_at",
    "find_network",
    "is_listed",
    "network_names",
    "parameters_before",
    "pretrained_state",
    "reorder_classes",
    "state_shapes",
    "strided_on_one_pixel",
]
