"""The ONNX Runtime side: inputs in, outputs and metrics out. Knows nothing of Optuna."""
