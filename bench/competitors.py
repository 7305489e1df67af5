"""The peers, one class each. What doesn't run models of a kind is left out of that row; what fails or isn't installed is named there."""

from __future__ import annotations

import copy
import os
import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bench.harness import Case, Competitor, OtherKindError, Predict, UnavailableError


def _needs(module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnavailableError(f"{error.name} is not installed") from error


class Mlec(Competitor):
    """Saved to a file and loaded again: what a user runs."""

    name: ClassVar[str] = "mlec"

    def prepare(self, case: Case, threads: int) -> Predict:
        return shipped(case, threads, tuple(case.inputs(4)) if case.framework == "torch" else None)


def shipped(case: Case, threads: int, example: tuple[Any, ...] | None, **options: Any) -> Predict:
    """The model compiled with these options, saved and loaded."""
    import mlec

    compiled = mlec.compile(case.model, example, validate=False, progress=False, num_threads=threads, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.mle"
        compiled.save(path)
        loaded = mlec.load(path, num_threads=threads)
    if case.method:
        method = getattr(loaded, case.method)
        return lambda inputs: method(inputs[0])
    return loaded.run


class Source(Competitor):
    """The library that the model was trained with, called as its users call it."""

    name: ClassVar[str] = "source"

    def prepare(self, case: Case, threads: int) -> Predict:
        if case.framework == "torch":
            return TorchEager().prepare(case, threads)
        alone = getattr(_with_jobs(case.model, 1), case.method)
        together = getattr(_with_jobs(case.model, threads), case.method)
        return lambda inputs: (alone if len(inputs[0]) < FEWEST_ROWS_OF_JOBS else together)(inputs[0])


FEWEST_ROWS_OF_JOBS = 1024
"""For fewer rows, scikit-learn takes longer to start its threads than to predict."""


def _with_jobs(model: Any, jobs: int) -> Any:
    """A copy of an estimator, whose parts too work in so many threads."""
    copied = copy.deepcopy(model)
    parameters = copied.get_params(deep=True) if hasattr(copied, "get_params") else {}
    for name in parameters:
        if name.split("__")[-1] == "n_jobs":
            copied.set_params(**{name: jobs})
    return copied


class TorchEager(Competitor):
    name: ClassVar[str] = "torch eager"

    def prepare(self, case: Case, threads: int) -> Predict:
        if case.framework != "torch":
            raise OtherKindError("not a torch model")
        torch = _needs("torch")
        torch.set_num_threads(threads)
        return _torch_call(torch, case.model.eval())


def _torch_call(torch: Any, module: Any) -> Predict:
    def predict(inputs: list[Any]) -> list[Any]:
        with torch.inference_mode():
            result = module(*(torch.from_numpy(x) for x in inputs))
        results = result if isinstance(result, tuple) else (result,)
        return [r.numpy() for r in results]

    return predict


class TorchCompile(Competitor):
    name: ClassVar[str] = "torch.compile"

    def prepare(self, case: Case, threads: int) -> Predict:
        if case.framework != "torch":
            raise OtherKindError("not a torch model")
        torch = _needs("torch")
        torch.set_num_threads(threads)
        return _torch_call(torch, torch.compile(case.model.eval(), dynamic=False))


class OnnxRuntime(Competitor):
    name: ClassVar[str] = "ONNX Runtime"

    def prepare(self, case: Case, threads: int) -> Predict:
        if hasattr(case.inputs(1)[0], "columns"):
            raise OtherKindError("a DataFrame would have to be taken apart for it")
        runtime = _needs("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        session = runtime.InferenceSession(onnx_bytes(case), options, providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        kinds = [np.float32 if "float" in i.type and "double" not in i.type else None for i in session.get_inputs()]
        wanted = [o.name for o in session.get_outputs()]
        if case.method == "predict_proba":
            wanted = wanted[1:]

        def predict(inputs: list[Any]) -> Any:
            feed = {
                n: x if k is None or x.dtype == k else x.astype(k) for n, x, k in zip(names, inputs, kinds, strict=True)
            }
            return session.run(wanted, feed)

        return predict


def onnx_bytes(case: Case) -> bytes:
    """The model as ONNX, by the converter that its framework's users take."""
    columns = case.inputs(1)[0].shape[1]
    if case.framework == "torch":
        return _torch_onnx(case)
    if case.framework == "sklearn":
        convert = _needs("skl2onnx").to_onnx
        options = {id(case.model): {"zipmap": False}} if case.method == "predict_proba" else None
        return convert(case.model, case.inputs(2)[0].astype(np.float32), options=options).SerializeToString()
    tools = _needs("onnxmltools")
    types = _needs("onnxmltools.convert.common.data_types")
    initial = [("x", types.FloatTensorType([None, columns]))]
    convert = tools.convert_xgboost if case.framework == "xgboost" else tools.convert_lightgbm
    extra = {} if case.framework == "xgboost" else {"zipmap": False}
    return convert(case.model, initial_types=initial, **extra).SerializeToString()


def _torch_onnx(case: Case) -> bytes:
    torch = _needs("torch")
    _needs("onnxscript")
    example = tuple(torch.from_numpy(x) for x in case.inputs(4))
    dynamic = tuple({0: torch.export.Dim("n", min=1, max=1 << 16)} for _ in example)
    program = torch.onnx.export(case.model.eval(), example, dynamic_shapes=dynamic, dynamo=True, verbose=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        program.save(path)
        return path.read_bytes()


class OpenVino(Competitor):
    name: ClassVar[str] = "OpenVINO"

    def prepare(self, case: Case, threads: int) -> Predict:
        if case.framework != "torch":
            raise OtherKindError("timed on networks only")
        openvino = _needs("openvino")
        core = openvino.Core()
        model = core.read_model(onnx_bytes(case))
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda inputs: list(request.infer(list(inputs), share_inputs=True).values())


class XgboostNative(Competitor):
    name: ClassVar[str] = "XGBoost inplace_predict"

    def prepare(self, case: Case, threads: int) -> Predict:
        if case.framework != "xgboost":
            raise OtherKindError("not an XGBoost model")
        booster = case.model.get_booster()
        booster.set_param({"nthread": threads})
        return lambda inputs: booster.inplace_predict(inputs[0])


class LightgbmNative(Competitor):
    name: ClassVar[str] = "LightGBM Booster"

    def prepare(self, case: Case, threads: int) -> Predict:
        if case.framework != "lightgbm":
            raise OtherKindError("not a LightGBM model")
        booster = case.model.booster_
        return lambda inputs: booster.predict(inputs[0], num_threads=threads)


class TreeliteGtil(Competitor):
    name: ClassVar[str] = "Treelite"
    max_nodes: ClassVar[int] = 400_000

    def prepare(self, case: Case, threads: int) -> Predict:
        model = treelite_model(case)
        if (nodes := nodes_of(model)) > self.max_nodes:
            raise UnavailableError(f"{nodes} nodes would take minutes to time")
        gtil = _needs("treelite.gtil")
        return lambda inputs: gtil.predict(model, inputs[0], nthread=threads)


def treelite_model(case: Case) -> Any:
    """Raises `OtherKindError` for what Treelite does not read."""
    if not case.group.startswith("trees"):
        raise OtherKindError("not a tree ensemble")
    treelite = _needs("treelite")
    if case.framework == "xgboost":
        return treelite.frontend.from_xgboost(case.model.get_booster())
    if case.framework == "lightgbm":
        return treelite.frontend.from_lightgbm(case.model.booster_)
    return treelite.sklearn.import_model(case.model)


def nodes_of(model: Any) -> int:
    """Of a model of Treelite."""
    return sum(int(model.get_tree_accessor(i).get_field("num_nodes")[0]) for i in range(model.num_tree))


class Tl2cgen(Competitor):
    """C code by TL2cgen, compiled by gcc -O3: needs a C compiler and patience."""

    name: ClassVar[str] = "TL2cgen"
    max_nodes: ClassVar[int] = 40_000

    def prepare(self, case: Case, threads: int) -> Predict:
        model = treelite_model(case)
        generator = _needs("tl2cgen")
        if (nodes := nodes_of(model)) > self.max_nodes:
            raise UnavailableError(f"{nodes} nodes would compile for minutes")
        self.folder = tempfile.TemporaryDirectory()
        library = os.path.join(self.folder.name, "model.so")
        generator.export_lib(model, toolchain="gcc", libpath=library, params={"parallel_comp": 2})
        predictor = generator.Predictor(library, nthread=threads)
        return lambda inputs: predictor.predict(generator.DMatrix(inputs[0]))


class Lleaves(Competitor):
    name: ClassVar[str] = "lleaves"

    def prepare(self, case: Case, threads: int) -> Predict:
        if case.framework != "lightgbm":
            raise OtherKindError("not a LightGBM model")
        lleaves = _needs("lleaves")
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.txt")
            case.model.booster_.save_model(path)
            model = lleaves.Model(model_file=path)
            model.compile()
        return lambda inputs: model.predict(inputs[0], n_jobs=threads)


ALL: tuple[Competitor, ...] = (
    Mlec(), Source(), OnnxRuntime(), XgboostNative(), LightgbmNative(), TreeliteGtil(), Tl2cgen(), Lleaves(), TorchCompile(), OpenVino(),
)  # fmt: skip
