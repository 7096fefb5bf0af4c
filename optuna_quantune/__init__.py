"""Finds the int8 configuration of a float ONNX model that loses the least accuracy, with Optuna."""
