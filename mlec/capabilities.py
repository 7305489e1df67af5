"""What this version offers, in words: the tables and the help of the command line, and the errors, all read it here.

What other packages add by entry points is not here: `mlec.registry` puts both together.
"""

from __future__ import annotations

from mlec.errors import UsageError

TARGETS = {
    "tvm": {
        "cpu": "the processor of the machine that compiles",
        "cpu:x86-64-v3": "a level, or a processor by LLVM's name; corrections such as ,-avx512f may follow",
        "cpu:x86-64-v3,x86-64-v4": "code for each of several; the file runs the best that the processor has",
        "cpu:portable": "code for x86-64-v2, x86-64-v3 and x86-64-v4",
        "cpu:aarch64": "any 64-bit ARM processor",
        "cuda": "NVIDIA GPUs of the common architectures",
        "cuda:sm_80,sm_90": "NVIDIA GPUs of the architectures named",
    },
    "numpy": {"numpy": "the interpreter that says what each op means: slow, makes no code"},
}
"""By backend, the forms of the targets that it serves. The word before the colon is the *kind* of target."""

PRECISIONS = {
    "fp32": "as the source computes",
    "fp64": "what the source computes in 64 bits stays so",
    "fp16": "networks with weights in 16 bits of float16, sums in float32",
    "bf16": "networks with weights in 16 bits of bfloat16, and products of such where the processor has them; sums in float32",
    "int8": "networks with 8 bits where that keeps their results, calibrated on inputs of yours",
}
"""What a precision means."""

MODELS = {
    "torch": "nn.Module, fx.GraphModule, ExportedProgram",
    "xgboost": "Booster, XGBClassifier, XGBRegressor, XGBRanker and their random forests",
    "lightgbm": "Booster, LGBMClassifier, LGBMRegressor, LGBMRanker",
    "sklearn": "fitted estimators and pipelines",
}
"""The models in memory that each of our frontends takes."""

MODEL_FILES = {
    "torch": "torch.export.save (.pt2, .pt), pickled module, state dict",
    "xgboost": "save_model (.json, .ubj)",
    "lightgbm": "save_model (.txt)",
    "sklearn": "skops, pickled estimator",
}
"""The files of models that each of our frontends reads."""

COMPILABLE_FILES = {**MODEL_FILES, "graph": "text that begins with `graph @`, after comments (.mlet)"}
"""The files that can be compiled, by what they are of."""


def check_precision(name: str) -> None:
    """Refuses a precision that does not exist.

    Raises:
        UsageError: naming those that do.
    """
    if name not in PRECISIONS:
        raise UsageError(
            f"precision takes {', '.join(PRECISIONS)}, got {name!r}", hint="`mlec targets` says what each means"
        )
