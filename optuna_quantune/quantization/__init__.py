"""The ONNX side: statistics, ranges, scales and the quantized model. Knows nothing of Optuna."""
