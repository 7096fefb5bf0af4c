"""Samplers that QuantuneSampler is compared with, one module each.

Every module has ``create(search_space, *, seed) -> BaseSampler``, the form that
``optuna-quantune tune --sampler baselines.cma:create`` takes from a checkout. Each is a version
that is fair on categorical knobs; its docstring says why. Not part of the installed package.
"""
