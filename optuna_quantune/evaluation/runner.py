"""Models in ONNX Runtime: sessions, and a set of inputs run through one of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from typing import TYPE_CHECKING

import numpy as np
import onnxruntime

from optuna_quantune.errors import InputError
from optuna_quantune.evaluation.source import InputSource
from optuna_quantune.evaluation.source import InputSpec
from optuna_quantune.pipeline import available_cores
from optuna_quantune.pipeline import CORES
from optuna_quantune.pipeline import ordered_map


if TYPE_CHECKING:
    from numpy.typing import NDArray

Provider = str | tuple[str, dict[str, Any]]
# A batch, arrays by input name.
OnFeed = Callable[["Mapping[str, NDArray[Any]]"], None]

# Milliseconds of one thread for an input in batches of 1, 4, 8, 16, 32 (ONNX Runtime 1.32, AMD
# EPYC, minimum of three):
#   SqueezeNet 1.1   float 6.2 6.7 7.1 7.3  7.3   int8 2.8 3.2 3.0 3.3 3.2
#   MobileNetV2      float 7.9 8.7 8.7 9.9 11.4   int8 4.7 4.2 4.5 5.0 4.7
#   ResNet-8, 32 px  float .23 .21 .22 .26  .27
# Activations that stay in the processor's cache beat large batches; 4 is within a tenth of the
# best everywhere and spreads the cost of a call, which matters for tiny models.
DEFAULT_BATCH_SIZE = 4
# By how much outputs may differ between batch sizes, as a share of the largest value: kernels add
# up in another order, on some devices with few bits.
_SAME = 1e-2

# Options that let ONNX Runtime 1.32 load what its own optimizations make it refuse.
# On x86-64 it makes int8 activations uint8, which is faster. From opset 21 on it refuses its own
# result where a Reshape, Transpose or MaxPool stands between a pair and a float node
# ("output_dtype INT8 does not match y_zero_point type UINT8").
_KEEP_INT8 = "session.qdqisint8allowed"
# For exact products it widens weights, and fails where two layers share one ("Attempt to replace
# the existing tensor"). In float, what is between the pairs does not saturate either.
_IN_FLOAT = "session.disable_quant_qdq"

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(int16)": np.int16,
    "tensor(uint16)": np.uint16,
    "tensor(int32)": np.int32,
    "tensor(uint32)": np.uint32,
    "tensor(int64)": np.int64,
    "tensor(uint64)": np.uint64,
    "tensor(bool)": np.bool_,
}


def make_session(
    model: bytes | str | os.PathLike[str],
    *,
    threads: int | None = 1,
    providers: Sequence[Provider] = ("CPUExecutionProvider",),
    spinning: bool = False,
    exact_products: bool = False,
) -> onnxruntime.InferenceSession:
    """Load a model into ONNX Runtime.

    Args:
        model: The path of an ONNX file, or its bytes.
        threads: Threads that share one run (``intra_op_num_threads``). 1 is right for
            evaluation: :func:`iterate` then runs one batch on each core, which needs no
            synchronisation inside a layer. None is all cores, as an application would use them.
        providers: Execution providers in order of preference, with options where needed.
        spinning: Let idle threads wait in a busy loop (``session.intra_op.allow_spinning``).
            With two threads on two idle cores SqueezeNet took 3.0 ms with it and 5.4 ms without,
            but with other work on the machine twice as long as without: sessions that run side by
            side must not spin.
        exact_products: Add uint8 x int8 products in int32 on any processor
            (``session.x64quantprecision``). x86-64 ones without VNNI add them in pairs in int16,
            where they saturate, which the models of other devices do not know.

    Raises:
        InputError: The file is missing or is not a model that ONNX Runtime can run, or a
            provider is not there.
    """
    name = f"model of {len(model)} bytes" if isinstance(model, bytes) else os.fspath(model)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise InputError(f"{name}: no such model file")
    check_providers(providers)
    entries = {
        "session.intra_op.allow_spinning": spinning,
        # A layer with 16-bit activations is computed with float ones, and not with 8-bit ones that
        # ONNX Runtime makes of them (its default, 4, for MatMulNBits).
        "session.qdq_matmulnbits_accuracy_level": 1,
        "session.x64quantprecision": exact_products,
    }

    def load(entries: Mapping[str, int]) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        options.log_severity_level = 3  # errors; what fails is raised here
        for entry, value in entries.items():
            options.add_session_config_entry(entry, str(int(value)))
        return onnxruntime.InferenceSession(
            model, options, providers=list(providers), enable_fallback=0
        )

    try:
        return load(entries)
    except Exception as error:  # ONNX Runtime's errors share no narrower type
        for way_out in (_KEEP_INT8, _IN_FLOAT) if exact_products else (_KEEP_INT8,):
            with contextlib.suppress(Exception):
                return load({**entries, way_out: 1})
        raise InputError(f"{name}: ONNX Runtime cannot load it: {_first_line(error)}") from error


def check_providers(providers: Sequence[Provider]) -> None:
    """Check execution providers: ONNX Runtime would take the processor and only warn.

    Args:
        providers: Names, or pairs of a name and a mapping of options.

    Raises:
        InputError: There are none, or one is not in this ONNX Runtime.
    """
    available = onnxruntime.get_available_providers()
    if isinstance(providers, str) or not providers:
        raise InputError(f"providers: {providers!r} must be a list, of {', '.join(available)}")
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise InputError(
                f"execution provider {name} is not in this ONNX Runtime; it has "
                f"{', '.join(available)}"
            )


def input_specs(session: onnxruntime.InferenceSession) -> tuple[InputSpec, ...]:
    """Give what a model wants for each of its inputs.

    Raises:
        InputError: An input is not a tensor of numbers.
    """
    specs = []
    for node in session.get_inputs():
        if node.type not in _DTYPES:
            raise InputError(f"the model's input {node.name!r} is a {node.type}, not numbers")
        shape = tuple(size if isinstance(size, int) and size > 0 else None for size in node.shape)
        specs.append(InputSpec(node.name, shape, np.dtype(_DTYPES[node.type])))
    return tuple(specs)


def iterate(
    session: onnxruntime.InferenceSession,
    source: InputSource,
    *,
    batch_size: int | None = None,
    indices: NDArray[np.int64] | None = None,
    outputs: Sequence[str] | None = None,
    on_feed: OnFeed | None = None,
) -> Iterator[tuple[NDArray[np.int64], dict[str, NDArray[Any]]]]:
    """Run inputs through a model, a batch at a time, in order.

    As many batches run side by side as the session leaves cores for (one on each core for a
    session of one thread), while the next ones are read and prepared; a caller may stop at any
    time. Models that are run at the same time in one process share its cores
    (:data:`~optuna_quantune.pipeline.CORES`).

    Args:
        session: The model.
        source: The inputs; bound to the model here.
        batch_size: Inputs in a run; None is :data:`DEFAULT_BATCH_SIZE`, or 1 where inputs have
            different shapes. A model with a fixed batch axis gets its own size in any case.
        indices: Which inputs, in which order, of shape (m,); None is all.
        outputs: Names of the wanted outputs; None is all.
        on_feed: Called with each batch in order, arrays by input name, before it is run.

    Yields:
        The indices of a batch, of shape (b,), and the outputs by name, batch axis first.

    Raises:
        InputError: Inputs or output names do not fit the model, an input cannot be read, or the
            model fails.
    """
    specs = input_specs(session)
    bound = source.bind(specs)
    fixed_sizes = {size for spec in specs for size in spec.shape[:1] if size is not None}
    if len(fixed_sizes) > 1:
        raise InputError(
            f"the model's inputs have different fixed batch sizes: {sorted(fixed_sizes)}; the "
            "first axis of every input must count inputs, so make a state that is carried along "
            "a constant (an initializer) of the model"
        )
    fixed_size = fixed_sizes.pop() if fixed_sizes else None
    if batch_size is None:
        batch_size = DEFAULT_BATCH_SIZE if _has_one_shape(bound) else 1
    batch_size = fixed_size or batch_size
    known = [node.name for node in session.get_outputs()]
    names = known if outputs is None else list(outputs)
    if unknown := [name for name in names if name not in known]:
        raise InputError(f"the model has no output {unknown[0]!r}; it has {', '.join(known)}")
    order = np.arange(len(bound)) if indices is None else np.asarray(indices)

    threads = _threads(session)

    def run_batch(feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        rows = len(next(iter(feed.values())))
        padding = (fixed_size or rows) - rows
        if padding:  # the last batch of a model with a fixed batch size above 1
            feed = {name: _padded(array, padding) for name, array in feed.items()}
        with CORES.take(threads):
            results = _run_batch(session, names, feed, source)
        for name, result in zip(names, results, strict=True):
            if np.ndim(result) == 0 or len(result) != rows + padding:
                raise InputError(
                    f"the model's output {name!r} has the shape {np.shape(result)} for a batch of "
                    f"{rows + padding}: it has no batch axis; measure it with a loop of your own "
                    "(evaluate=)"
                )
        return [result[:rows] for result in results]

    def feeds() -> Iterator[dict[str, NDArray[Any]]]:
        for feed in bound.batches(batch_size, indices):
            if on_feed is not None:
                on_feed(feed)
            yield feed

    workers = max(1, available_cores() // threads)
    start = 0
    for results in ordered_map(run_batch, feeds(), workers=workers):
        stop = start + len(results[0])
        yield order[start:stop], dict(zip(names, results, strict=True))
        start = stop


def run(
    session: onnxruntime.InferenceSession,
    source: InputSource,
    *,
    batch_size: int | None = None,
    indices: NDArray[np.int64] | None = None,
    outputs: Sequence[str] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
) -> dict[str, NDArray[Any]]:
    """Run inputs through a model and collect the outputs.

    Args:
        session: The model.
        source: The inputs.
        batch_size: See :func:`iterate`.
        indices: Which inputs, in which order, of shape (m,); None is all.
        outputs: Names of the wanted outputs; None is all.
        on_batch: Called after each batch with the number of inputs done and of all inputs.

    Returns:
        The outputs by name, of shape (m, ...), in the order of the inputs.

    Raises:
        InputError: See :func:`iterate`; also where an output's shape changes with the input.
    """
    total = len(source) if indices is None else len(indices)
    collected: dict[str, NDArray[Any]] = {}
    done = 0
    batches = iterate(session, source, batch_size=batch_size, indices=indices, outputs=outputs)
    for batch, results in batches:
        for name, result in results.items():
            if name not in collected:
                collected[name] = np.empty((total, *result.shape[1:]), result.dtype)
            if result.shape[1:] != collected[name].shape[1:]:
                raise InputError(
                    f"the model's output {name!r} changes its shape with the input, from "
                    f"{collected[name].shape[1:]} to {result.shape[1:]}; name the outputs to "
                    "compare"
                )
            collected[name][done : done + len(batch)] = result
        done += len(batch)
        if on_batch is not None:
            on_batch(done, total)
    return collected


def run_first(session: onnxruntime.InferenceSession, source: InputSource) -> None:
    """Run a model on its first input, whatever shapes its outputs have.

    Raises:
        InputError: The input cannot be read, or the model fails.
    """
    bound = source.bind(input_specs(session))
    for feed in bound.batches(1, np.arange(1)):
        _run_batch(session, None, feed, source)


def why_one_at_a_time(
    session: onnxruntime.InferenceSession, source: InputSource, outputs: Sequence[str]
) -> str | None:
    """Why a model whose batch axis is free cannot have several inputs in a batch after all.

    Exporters mark the axis as free and leave reshapes behind that hold for one input only.

    Args:
        session: The model.
        source: Inputs for it; two of them are run together and apart.
        outputs: Names of the outputs that count.

    Returns:
        What becomes of two inputs in one batch. None if nothing does, or if there is nothing to
        compare with: inputs or outputs of several shapes, or a model that fails on one input, too.
    """
    free = all(size is None for spec in input_specs(session) for size in spec.shape[:1])
    if not (free and _has_one_shape(source) and len(source) > 1):
        return None
    two = source.subset([0, 1])
    try:
        apart = run(session, two, batch_size=1, outputs=outputs)
    except InputError:
        return None
    try:
        together = run(session, two, batch_size=2, outputs=outputs)
    except InputError as error:
        return str(error)
    for name in outputs:
        single, shared = (values[name].astype(np.float64) for values in (apart, together))
        if single.shape != shared.shape or not np.allclose(
            single, shared, rtol=0.0, atol=_SAME * _largest(single), equal_nan=True
        ):
            return f"{source}: the model's output {name!r} is another one for two inputs at once"
    return None


def _run_batch(
    session: onnxruntime.InferenceSession,
    names: Sequence[str] | None,
    feed: dict[str, NDArray[Any]],
    source: InputSource,
) -> list[NDArray[Any]]:
    try:
        results: list[NDArray[Any]] = session.run(names, feed)
    except Exception as error:  # ONNX Runtime's errors share no narrower type
        rows = len(next(iter(feed.values())))
        raise InputError(
            f"{source}: the model fails on a batch of {rows}: {_first_line(error)}"
        ) from error
    return results


def _has_one_shape(source: InputSource) -> bool:
    """Whether all inputs of a source have the same shape, so that they can share a batch."""
    return all(size is not None for spec in source.specs for size in spec.shape[1:])


def _largest(values: NDArray[Any]) -> float:
    return float(np.abs(values[np.isfinite(values)]).max(initial=np.finfo(np.float32).tiny))


def _threads(session: onnxruntime.InferenceSession) -> int:
    return session.get_session_options().intra_op_num_threads or available_cores()


def _padded(array: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.concatenate([array, np.repeat(array[-1:], rows, axis=0)])


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
