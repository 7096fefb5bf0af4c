"""The Optuna side: the sampler and what it is made of. Knows nothing of ONNX."""
