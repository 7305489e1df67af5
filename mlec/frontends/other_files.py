"""Files that no frontend reads: what they are, and what to do instead."""

from __future__ import annotations

import re

from mlec.capabilities import COMPILABLE_FILES

_SAVE_AGAIN = "save the model, with the library that it is of, as one of: " + "; ".join(COMPILABLE_FILES.values())

_KINDS = (
    (
        rb"\x08[\x01-\x1f][\x12\x1a\x22\x2a\x32\x3a\x42]", "an ONNX model, which cannot be compiled yet",
        "compile the model that it was made from: a torch module, an estimator or a Booster",
    ),
    (
        rb".{257}ustar|(storages|tensors|pickle|sys_info)\0", "a tar archive, as torch wrote its files before version 0.2",
        "where it is one of torch, read it with torch.load and save it again; else unpack it",
    ),
    (
        rb".{7}\0\{\s*\"", "a file of safetensors, which has the weights of a model, but not the model",
        "load them into their module, and compile that, or what torch.export.save makes of it",
    ),
    (
        rb"binf|bs64", "an XGBoost model in the binary format that XGBoost 3 reads no more",
        "load it with the version of XGBoost that wrote it, and save_model('model.json')",
    ),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file, as Keras writes its models", _SAVE_AGAIN),
    (rb"GGUF", "a file of GGUF", _SAVE_AGAIN),
    (rb"CBM1", "a CatBoost model", _SAVE_AGAIN),
    (
        rb"\x80[\x02-\x05]", "a pickle, of no estimator or module that is known by its first bytes",
        "pickles are read that hold a torch module or an estimator of scikit-learn, XGBoost or LightGBM",
    ),
)  # fmt: skip


def described(head: bytes) -> tuple[str, str]:
    """What a file is that begins with these bytes, and what to do; empty and a list of what can be compiled where that is not known."""
    for pattern, kind, hint in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            return kind, hint
    return "", "there are: " + "; ".join(f"{name}: {files}" for name, files in COMPILABLE_FILES.items())
