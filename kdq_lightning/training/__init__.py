"""Everything that runs inside a Trainer: callbacks, quantization after training, the dashboard."""
