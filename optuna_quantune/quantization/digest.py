"""One hash for all ONNX models that compute the same: what makes a configuration a duplicate.

Configurations with different knobs can build the same model (a clipping that cuts nothing off, a
set size beyond the number of inputs, ...). Their files may still differ in what does not matter.
"""

from __future__ import annotations

import hashlib

import onnx
from onnx import numpy_helper

from optuna_quantune.quantization.graph import reads


def canonical_digest(proto: onnx.ModelProto) -> str:
    """SHA-256 of what a model computes, hexadecimal.

    Each tensor's hash is that of its node's operator, attributes and input hashes; that of a
    constant is of its type, shape and values. So names of nodes and inner tensors, the order of
    nodes, initializers and attributes, unused initializers, documentation and metadata do not
    matter; names of inputs and outputs do.

    Args:
        proto: The model; its nodes stand in topological order, as ONNX demands.
    """
    graph = proto.graph
    hashes = {"": _hash(b"none")}
    for spec in graph.input:
        hashes[spec.name] = _hash(b"input", spec.name.encode(), spec.type.SerializeToString())
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        kind = f"{tensor.data_type} {list(tensor.dims)}".encode()
        hashes[tensor.name] = _hash(b"constant", kind, values.tobytes())
    for node in graph.node:
        attributes = sorted(a.SerializeToString(deterministic=True) for a in node.attribute)
        computed = _hash(
            node.domain.encode(),
            node.op_type.encode(),
            _hash(*attributes),
            *(hashes[name] for name in reads(node)),
        )
        for index, name in enumerate(node.output):
            if name:
                hashes[name] = _hash(computed, str(index).encode())
    opsets = sorted(f"{opset.domain} {opset.version}".encode() for opset in proto.opset_import)
    outputs = [part for o in graph.output for part in (o.name.encode(), hashes[o.name])]
    return _hash(_hash(*opsets), *outputs).hex()


def _hash(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
