from __future__ import annotations

import random

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.digest import canonical_digest
from optuna_quantune.quantization.quantizer import Quantizer


@pytest.fixture
def built(quantizer: Quantizer) -> onnx.ModelProto:
    proto = onnx.ModelProto()
    proto.CopyFrom(quantizer.quantize(QuantizationConfig()).proto)
    return proto


def test_order_names_and_metadata_do_not_matter(built: onnx.ModelProto) -> None:
    other = onnx.ModelProto()
    other.CopyFrom(built)
    fixed = {spec.name for spec in (*built.graph.input, *built.graph.output)}

    def rename(name: str) -> str:
        return name if not name or name in fixed else f"other/{name}"

    for node in other.graph.node:
        node.name, node.doc_string = f"node {node.name}", "written by somebody else"
        node.input[:] = [rename(name) for name in node.input]
        node.output[:] = [rename(name) for name in node.output]
        attributes = sorted(node.attribute, key=lambda a: a.name, reverse=True)
        copies = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in attributes]
        del node.attribute[:]
        node.attribute.extend(copies)
    initializers = [numpy_helper.to_array(tensor) for tensor in other.graph.initializer]
    renamed = [
        numpy_helper.from_array(values, rename(tensor.name))
        for tensor, values in zip(other.graph.initializer, initializers, strict=True)
    ]
    renamed.append(numpy_helper.from_array(np.ones(3, dtype=np.float32), "read by nobody"))
    random.Random(0).shuffle(renamed)
    del other.graph.initializer[:]
    other.graph.initializer.extend(renamed)
    del other.graph.value_info[:]
    other.producer_name = "another tool"
    onnx.checker.check_model(other)
    assert canonical_digest(other) == canonical_digest(built)


def test_the_order_of_independent_nodes_does_not_matter(built: onnx.ModelProto) -> None:
    # Dequantized weights depend on nothing: they may all stand first.
    constants = {tensor.name for tensor in built.graph.initializer}
    first = [node for node in built.graph.node if set(node.input) <= constants]
    rest = [node for node in built.graph.node if not set(node.input) <= constants]
    assert list(built.graph.node) != [*first[::-1], *rest]
    other = onnx.ModelProto()
    other.CopyFrom(built)
    del other.graph.node[:]
    other.graph.node.extend([*first[::-1], *rest])
    onnx.checker.check_model(other)
    assert canonical_digest(other) == canonical_digest(built)


def test_every_number_matters(built: onnx.ModelProto) -> None:
    before = canonical_digest(built)
    for index in range(len(built.graph.initializer)):
        other = onnx.ModelProto()
        other.CopyFrom(built)
        tensor = other.graph.initializer[index]
        values = numpy_helper.to_array(tensor).copy()
        # One unit in the last place of one number.
        values.reshape(-1).view(f"u{values.itemsize}")[-1] ^= 1
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        assert canonical_digest(other) != before, tensor.name


def test_operators_attributes_and_connections_matter(built: onnx.ModelProto) -> None:
    before = canonical_digest(built)
    changed = 0
    for index, node in enumerate(built.graph.node):
        other = onnx.ModelProto()
        other.CopyFrom(built)
        target = other.graph.node[index]
        if node.op_type == "Add":
            target.op_type = "Sub"
        elif node.op_type == "Conv":
            next(a for a in target.attribute if a.name == "pads").ints[0] += 1
        elif node.op_type == "MaxPool":
            target.input[0] = built.graph.input[0].name
        else:
            continue
        changed += 1
        assert canonical_digest(other) != before, node.name
    assert changed == 5


def test_knobs_that_change_nothing_build_the_same_model(quantizer: Quantizer) -> None:
    # There are 80 calibration inputs. Weights with one scale for each channel are symmetric with
    # every scheme that has a free zero point, activations are not.
    every, all_80 = QuantizationConfig(), QuantizationConfig(calibration_images=80)
    assert quantizer.quantize(every).digest == quantizer.quantize(all_80).digest
    first, second = (
        QuantizationConfig(calibration_images=1, clipping="max"),
        QuantizationConfig(calibration_images=32, clipping="max"),
    )
    assert quantizer.quantize(first).digest != quantizer.quantize(second).digest
    scales = {
        scheme: quantizer.quantize(QuantizationConfig(scheme=scheme)).digest
        for scheme in ("asymmetric", "symmetric", "symmetric_uint8", "symmetric_power2")
    }
    assert len(set(scales.values())) == 4
