"""What saturating products of processors without VNNI cost, and what avoiding them costs.

    python -m benchmarks.saturation DATA [--models NAME ...] [--inputs 300]

DATA is a folder as in `benchmarks.catalogue`; the processor must be an x86-64 one without VNNI.
Such processors add products of uint8 activations and int8 weights in pairs in int16. For each
model one configuration (one scale for each channel, 128 calibration inputs, the other knobs as
they come) is run in four ways, with one thread:

- `8 bits`: weights of 8 bits, as for a device without this trait, in a session as it comes;
- `8 bits, exact`: the same model with ``session.x64quantprecision``, for which ONNX Runtime widens
  weights to uint8 when it loads the model. So `QuantizationObjective` evaluates models of devices
  whose arithmetic is computed on this processor;
- `7 bits`: weights of 7 bits, as with ONNX Runtime's ``reduce_range``, but in depthwise
  convolutions, whose kernel does not add in pairs, in a session as it comes;
- `neighbours`: weights of 8 bits with scales such that the products of no two neighbours can leave
  int16 (`optuna_quantune/quantization/neighbours.py`), in a session as it comes: what the target
  `cpu` writes here. `exact` says whether its outputs are those of exact products to the last bit.

Agreement with the float model on inputs that calibration did not see, output SQNR, and batch-1
latency over the float model's. Results: `benchmarks/results/saturation/`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks import catalogue
from benchmarks import machine
from optuna_quantune.evaluation.dataset import InputSpec
from optuna_quantune.evaluation.latency import latency_ratio
from optuna_quantune.evaluation.metrics import agrees
from optuna_quantune.evaluation.metrics import sqnr_db
from optuna_quantune.evaluation.runner import make_session
from optuna_quantune.evaluation.runner import run
from optuna_quantune.quantization.calibration import calibrate
from optuna_quantune.quantization.config import QuantizationConfig
from optuna_quantune.quantization.model import load_float_model
from optuna_quantune.quantization.placement import ConstantSite
from optuna_quantune.quantization.placement import place
from optuna_quantune.quantization.processor import saturates
from optuna_quantune.quantization.quantizer import Quantizer
from optuna_quantune.quantization.quantizer import required_activations
from optuna_quantune.quantization.quantizer import WeightIntegers
from optuna_quantune.quantization.representation import Representation


RESULTS = Path(__file__).parent / "results" / "saturation"
CALIBRATION = 128


class SevenBits(Quantizer):
    """Weights as ``reduce_range`` has them."""

    def _integers_of(self, site: ConstantSite, *knobs: Any) -> WeightIntegers:
        return WeightIntegers(bits=7 if site.tensor in self._paired else 8)


# What builds the model, whether for products that are added in pairs, and whether they are exact.
WAYS = {
    "8 bits": (Quantizer, False, False),
    "8 bits, exact": (Quantizer, False, True),
    "7 bits": (SevenBits, True, False),
    "neighbours": (Quantizer, True, False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", metavar="NAME", help="all of DATA by default")
    parser.add_argument("--inputs", type=int, default=300)
    arguments = parser.parse_args()
    if not saturates():
        parser.error("products do not saturate on this processor")
    rows: list[dict[str, Any]] = []
    for name in catalogue.names(arguments.data, arguments.models):
        for row in measure(name, arguments.data, arguments.inputs):
            rows.append(row)
            print(row, flush=True)
        write(rows, arguments.inputs)


def measure(name: str, data: Path, n: int) -> list[dict[str, Any]]:
    """One row for each way to run a model."""
    path, calibration, evaluation = catalogue.sources(name, data)
    model = load_float_model(path)
    specs = [InputSpec(i.name, i.shape, i.dtype) for i in model.inputs]
    placement = place(model)
    statistics = calibrate(
        model,
        calibration.subset(np.arange(CALIBRATION)).bind(specs),
        required_activations(placement),
        sizes=("all",),
    )
    inputs = evaluation.subset(np.arange(n)).bind(specs)
    float_session = make_session(path)
    (reference,) = run(float_session, inputs).values()
    feeds = list(inputs.batches(1, np.arange(1)))
    config = QuantizationConfig(calibration_images="all", granularity="channel")
    rows = []
    for way, (build, in_pairs, exact) in WAYS.items():
        representation = Representation(adds_in_pairs=in_pairs, for_kernels=True)
        quantizer = build(model, statistics, representation=representation, placement=placement)
        proto = quantizer.quantize(config).proto
        session = make_session(proto.SerializeToString(), exact_products=exact)
        (outputs,) = run(session, inputs).values()
        exactly = make_session(proto.SerializeToString(), exact_products=True)
        (unsaturated,) = run(exactly, inputs).values()
        rows.append(
            {
                "model": name,
                "weights": way,
                "agreement": float(agrees(outputs, reference).mean()),
                "sqnr_db": sqnr_db(outputs, reference),
                "exact": bool(np.array_equal(outputs, unsaturated)),
                "latency": latency_ratio(session, float_session, feeds, repeats=40).ratio,
            }
        )
    return rows


def write(rows: list[dict[str, Any]], n: int) -> None:
    """The table of all that is done."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(RESULTS / "results.csv", index=False, float_format="%.4f")
    lines = [
        "# Products that saturate",
        "",
        f"`python -m benchmarks.saturation DATA --inputs {n}`; "
        f"{machine.as_markdown(machine.describe())}.",
        "",
        *"\n\n".join(__doc__.split("\n\n")[2:-1]).splitlines(),
        "",
        __doc__.split("\n\n")[-1].split(" Results:")[0],
        "",
        "| model | weights | agreement | SQNR, dB | exact | latency |",
        "| --- | --- | ---: | ---: | --- | ---: |",
    ]
    lines += [
        f"| {row.model} | {row.weights} | {row.agreement:.3f} | {row.sqnr_db:.1f} "
        f"| {'yes' if row.exact else 'no'} | {row.latency:.2f}x |"
        for row in frame.itertuples()
    ]
    (RESULTS / "README.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
