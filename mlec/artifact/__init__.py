"""The .mle file: one container for graph, weights, kernels and metadata. Specified in ``docs/format.md``.

`write` makes a file, `sign` signs one, `Artifact.open` checks and maps one, `decide` says whether its machine code may run.
Nothing in this package executes anything that a file holds.
"""

from typing import TYPE_CHECKING, Any

from mlec.hidden import Hidden

# msgspec takes three names from there, which Python itself has from 3.11 on, in 4 ms less.
with Hidden("typing_extensions"):
    import msgspec  # noqa: F401

from mlec.artifact.kernels import KINDS, RELOCATABLE, KernelBlob
from mlec.artifact.model import ModelMetadata, read_model
from mlec.artifact.reader import Artifact
from mlec.artifact.trust import TrustDecision, TrustDigest, check_signed, decide, is_built_here, record_built
from mlec.artifact.weights import DTYPES, TensorEntry, Tensors

if TYPE_CHECKING:
    from mlec.artifact.encryption import EncryptionKey
    from mlec.artifact.keyring import Keyring, TrustedKey
    from mlec.artifact.resign import sign
    from mlec.artifact.signing import Attributes, Signature, Signer
    from mlec.artifact.writer import SaveResult, Storage, write

__all__ = [
    "DTYPES",
    "KINDS",
    "RELOCATABLE",
    "Artifact",
    "Attributes",
    "EncryptionKey",
    "KernelBlob",
    "Keyring",
    "ModelMetadata",
    "SaveResult",
    "Signature",
    "Signer",
    "Storage",
    "TensorEntry",
    "Tensors",
    "TrustDecision",
    "TrustDigest",
    "TrustedKey",
    "check_signed",
    "decide",
    "is_built_here",
    "read_model",
    "record_built",
    "sign",
    "write",
]

_LATER = {
    "EncryptionKey": "encryption", "Keyring": "keyring", "TrustedKey": "keyring", "sign": "resign",
    "Attributes": "signing", "Signature": "signing", "Signer": "signing",
    "SaveResult": "writer", "Storage": "writer", "write": "writer",
}  # fmt: skip
"""What reading a plain file does not need is imported when it is asked for; by the module that has it."""


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
