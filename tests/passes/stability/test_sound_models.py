"""Models whose numerics are sound: nothing severe is found in any, and what is said of small losses is little."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import mlec
from mlec.pipeline import PassContext, PassPipeline

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional
PASSES = PassPipeline.parse("infer-shapes,canonicalize,fold-constants,cse,stability")


def severe(model: Any, examples: tuple[Any, ...] | None = None) -> list[str]:
    seen = {f"x{i}": (float(e.min()), float(e.max())) for i, e in enumerate(examples or ())}
    graph = mlec.lower(model, examples)
    names = [spec.name for spec in graph.signature.inputs]
    context = PassContext(seen_ranges=dict(zip(names, seen.values(), strict=False)))
    _, records = PASSES.run(graph, context)
    return [f"{f['rule']}: {f['input']}, {f['shows']}" for f in records[-1].findings if f["severity"] != "note"]


class Function(nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self, function: Callable[..., Any], *modules: Any) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, x: Any, y: Any) -> Any:
        return self.function(x, y, *self.inner)


def sequence(*layers: Any) -> Any:
    return nn.Sequential(*layers)


def shifted_softmax(x: Any, y: Any) -> Any:
    e = torch.exp(x - x.max(-1, keepdim=True).values)
    return e / e.sum(-1, keepdim=True)


def standardised(x: Any, y: Any) -> Any:
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred * centred).mean(-1, keepdim=True) + 1e-5)


def mixed_experts(x: Any, y: Any, gate: Any, *experts: Any) -> Any:
    shares = gate(x).softmax(-1)
    return sum(shares[:, i : i + 1] * expert(x) for i, expert in enumerate(experts))


def turned(x: Any, y: Any) -> Any:
    """Rotary positions."""
    angle = torch.arange(x.shape[-1] // 2) / 10
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1)


def focal(x: Any, y: Any) -> Any:
    loss = F.binary_cross_entropy_with_logits(x, y, reduction="none")
    return ((1 - torch.exp(-loss)) ** 2 * loss).mean()


def masked_softmax(x: Any, y: Any) -> Any:
    return torch.softmax(x.masked_fill(y < 0.2, -1e9), -1)


def masked_mean(x: Any, y: Any) -> Any:
    return (x * y).sum(-1) / y.sum(-1).clamp(min=1)


ROWS, OTHER = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.rand(4, 8)
NETWORKS: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
    "softmax": (lambda: sequence(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Softmax(-1)), (ROWS,)),
    "log_softmax": (lambda: sequence(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4), nn.LogSoftmax(-1)), (ROWS,)),
    "layer norm": (lambda: sequence(nn.Linear(8, 16), nn.LayerNorm(16), nn.SiLU(), nn.Linear(16, 4)), (ROWS,)),
    "rms norm": (lambda: sequence(nn.Linear(8, 16), nn.RMSNorm(16), nn.Linear(16, 4)), (ROWS,)),
    "batch norm": (lambda: sequence(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 1), nn.Sigmoid()), (ROWS,)),
    "half precision": (lambda: sequence(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softmax(-1)).half(), (ROWS.half(),)),
    "bfloat16": (lambda: sequence(nn.Linear(8, 8), nn.LayerNorm(8), nn.Softmax(-1)).bfloat16(), (ROWS.bfloat16(),)),
    "convolutions": (
        lambda: sequence(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 10)),
        (torch.randn(2, 1, 8, 8),),
    ),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (torch.randn(2, 5, 16),)),
    "embedding": (lambda: sequence(nn.Embedding(20, 8), nn.LayerNorm(8)), (torch.randint(0, 20, (2, 5)),)),
    "bce with logits": (
        lambda: Function(lambda x, y, l: F.binary_cross_entropy_with_logits(l(x), y), nn.Linear(8, 8)), (ROWS, OTHER.round()),
    ),
    "cross entropy": (
        lambda: Function(lambda x, y, l: F.cross_entropy(l(x), y), nn.Linear(8, 5)), (ROWS, torch.tensor([0, 1, 2, 3])),
    ),
    "kl divergence": (
        lambda: Function(lambda x, y: F.kl_div(F.log_softmax(x, -1), F.softmax(y, -1), reduction="sum")), (ROWS, OTHER),
    ),
    "normalize": (lambda: Function(lambda x, y: F.normalize(x, dim=-1)), (ROWS, OTHER)),
    "cosine similarity": (lambda: Function(lambda x, y: F.cosine_similarity(x, y)), (ROWS, OTHER)),
    "activations": (
        lambda: Function(lambda x, y: F.softplus(x) + F.mish(x) + F.elu(x) + F.logsigmoid(y) + F.hardswish(y)), (ROWS, OTHER),
    ),
    "logsumexp": (lambda: Function(lambda x, y: torch.logsumexp(x, -1)), (ROWS, OTHER)),
    "softmax by hand, shifted": (lambda: Function(shifted_softmax), (ROWS, OTHER)),
    "layer norm by hand": (lambda: Function(standardised), (ROWS, OTHER)),
    "log of positive numbers": (lambda: Function(lambda x, y: torch.log(y) - x), (ROWS, OTHER + 0.01)),
    "mixture of experts": (lambda: Function(mixed_experts, nn.Linear(8, 3), *(nn.Linear(8, 4) for _ in range(3))), (ROWS, OTHER)),
    "rotary positions": (lambda: Function(turned), (ROWS, OTHER)),
    "focal loss": (lambda: Function(focal), (ROWS, OTHER.round())),
    "masked softmax": (lambda: Function(masked_softmax), (ROWS, OTHER)),
    "masked mean": (lambda: Function(masked_mean), (ROWS, OTHER.round())),
    "residual": (lambda: Function(lambda x, y: x + F.relu(x) - torch.sigmoid(y) * x), (ROWS, OTHER)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_is_wrong_with_a_sound_network(name: str) -> None:
    torch.manual_seed(0)
    make, examples = NETWORKS[name]
    assert severe(make().eval(), examples) == []


sklearn = pytest.importorskip("sklearn")
from sklearn import (  # noqa: E402
    cluster,
    decomposition,
    discriminant_analysis,
    ensemble,
    linear_model,
    mixture,
    naive_bayes,
    neighbors,
    neural_network,
    pipeline,
    preprocessing,
    svm,
    tree,
)

ESTIMATORS: list[Any] = [
    linear_model.LogisticRegression(),
    linear_model.LinearRegression(),
    linear_model.SGDClassifier(loss="log_loss"),
    linear_model.PoissonRegressor(),
    svm.SVC(),
    svm.SVC(kernel="poly"),
    svm.SVR(),
    svm.OneClassSVM(),
    svm.LinearSVC(),
    neural_network.MLPClassifier(max_iter=5),
    neural_network.MLPRegressor(max_iter=5),
    tree.DecisionTreeClassifier(),
    ensemble.RandomForestClassifier(5),
    ensemble.ExtraTreesRegressor(5),
    ensemble.GradientBoostingClassifier(n_estimators=5),
    ensemble.HistGradientBoostingClassifier(max_iter=5),
    ensemble.IsolationForest(n_estimators=5),
    ensemble.AdaBoostClassifier(n_estimators=3),
    naive_bayes.GaussianNB(),
    neighbors.KNeighborsClassifier(),
    neighbors.KNeighborsRegressor(weights="distance"),
    neighbors.NearestCentroid(),
    cluster.KMeans(3, n_init=1),
    mixture.GaussianMixture(2),
    discriminant_analysis.LinearDiscriminantAnalysis(),
    discriminant_analysis.QuadraticDiscriminantAnalysis(),
    preprocessing.StandardScaler(),
    preprocessing.MinMaxScaler(),
    preprocessing.RobustScaler(),
    preprocessing.MaxAbsScaler(),
    preprocessing.Normalizer(),
    preprocessing.Normalizer("l1"),
    preprocessing.PowerTransformer(),
    preprocessing.QuantileTransformer(n_quantiles=10),
    preprocessing.PolynomialFeatures(),
    preprocessing.KBinsDiscretizer(3),
    decomposition.PCA(2, whiten=True),
    decomposition.KernelPCA(2, kernel="rbf"),
    pipeline.make_pipeline(preprocessing.StandardScaler(), ensemble.RandomForestClassifier(5)),
    pipeline.make_pipeline(
        preprocessing.StandardScaler(), preprocessing.PolynomialFeatures(), linear_model.LogisticRegression()
    ),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda e: str(e)[:60].replace("\n", ""))
def test_nothing_is_wrong_with_a_sound_estimator(estimator: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 5)) * [1, 2, 3, 10, 0.1]
    labels = np.digitize(X[:, 0], [-0.5, 0.5])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        estimator.fit(X, labels)
    assert severe(estimator) == []
