"""The .mle file: one container for graph, weights, kernels and metadata. Specified in ``docs/format.md``.

`write` makes a file, `sign` signs one, `Artifact.open` checks and maps one, `decide` says whether its machine code may run.
Nothing in this package executes anything that a file holds.
"""

from mlec.artifact.encryption import EncryptionKey
from mlec.artifact.kernels import KINDS, KernelBlob
from mlec.artifact.keyring import Keyring, TrustedKey
from mlec.artifact.model import ModelMetadata, read_model
from mlec.artifact.reader import Artifact
from mlec.artifact.resign import sign
from mlec.artifact.signing import Attributes, Signature, Signer
from mlec.artifact.trust import TrustDecision, TrustDigest, decide, is_built_here, record_built
from mlec.artifact.weights import DTYPES, TensorEntry, Tensors
from mlec.artifact.writer import SaveResult, Storage, write

__all__ = [
    "DTYPES",
    "KINDS",
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
    "decide",
    "is_built_here",
    "read_model",
    "record_built",
    "sign",
    "write",
]
