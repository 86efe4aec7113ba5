"""Post-training quantization of any `nn.Module` from Gram matrices of its layer inputs; torch only."""
