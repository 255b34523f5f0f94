"""What runs the pass manager many times to find something out: which layers hurt, how much may be quantized."""
