"""Other tools on the same models and images, each in an environment of its own; see README.md.

The scripts here import numpy, onnxruntime and the tool that they run, nothing of this project.
"""
