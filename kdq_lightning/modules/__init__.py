"""LightningModules: the supervised classifier and one file a distillation strategy."""
