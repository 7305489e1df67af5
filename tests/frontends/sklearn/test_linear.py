"""Linear models, support vector machines, neighbours, naive Bayes, perceptrons, clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import (
    cluster,
    datasets,
    discriminant_analysis,
    linear_model,
    naive_bayes,
    neighbors,
    neural_network,
    svm,
)

IRIS, KIND = datasets.load_iris(return_X_y=True)
BINARY = (KIND == 1).astype(int)
SUGAR, PROGRESS = (part[:150] for part in datasets.load_diabetes(return_X_y=True))
TWO_TARGETS = np.column_stack([PROGRESS, PROGRESS**2])
COUNTS = np.random.default_rng(0).integers(0, 6, (120, 5)).astype(float)
COUNT_KIND = np.random.default_rng(1).integers(0, 3, 120)
NOISE = np.random.default_rng(3).normal(0, 0.3, IRIS.shape)
NAMES = np.array(["setosa", "Versicolor", "virgíniça"])[KIND]

REGRESSORS = [
    linear_model.LinearRegression(),
    linear_model.Ridge(),
    linear_model.RidgeCV(),
    linear_model.Lasso(0.1),
    linear_model.LassoCV(cv=3),
    linear_model.ElasticNet(0.1),
    linear_model.SGDRegressor(random_state=0),
    linear_model.BayesianRidge(),
    linear_model.HuberRegressor(),
    linear_model.QuantileRegressor(alpha=0.01),
    linear_model.PoissonRegressor(),
    linear_model.GammaRegressor(),
    linear_model.TweedieRegressor(power=1.5),
    linear_model.TweedieRegressor(power=0),
    linear_model.RANSACRegressor(random_state=0),
    svm.LinearSVR(),
    linear_model.LinearRegression(fit_intercept=False),
    svm.SVR(),
    svm.SVR(kernel="poly", degree=3, coef0=1.0),
    svm.SVR(kernel="linear"),
    svm.SVR(kernel="sigmoid", gamma=0.2),
    svm.NuSVR(gamma=0.5),
    neighbors.KNeighborsRegressor(),
    neighbors.KNeighborsRegressor(3, weights="distance"),
    neural_network.MLPRegressor(hidden_layer_sizes=(8, 5), max_iter=30, random_state=0),
    neural_network.MLPRegressor(
        hidden_layer_sizes=(6,), activation="tanh", max_iter=20, random_state=0, loss="poisson"
    ),
]


@pytest.mark.parametrize("model", REGRESSORS, ids=str)
def test_regressors(lab: Any, model: Any) -> None:
    lab.check(model.fit(SUGAR, PROGRESS), SUGAR * 1.1)


@pytest.mark.parametrize(
    "model",
    [
        linear_model.LinearRegression(),
        linear_model.Ridge(),
        linear_model.Lasso(),
        linear_model.MultiTaskLasso(),
        neighbors.KNeighborsRegressor(),
        neural_network.MLPRegressor(hidden_layer_sizes=(5,), max_iter=20, random_state=0),
        neighbors.KNeighborsRegressor(weights="distance"),
    ],
    ids=str,
)
@pytest.mark.parametrize("target", [TWO_TARGETS, PROGRESS[:, None]], ids=["two targets", "a column"])
def test_targets_of_two_dimensions(lab: Any, model: Any, target: np.ndarray) -> None:
    lab.check(model.fit(SUGAR, target), SUGAR * 1.1)


CLASSIFIERS = [
    linear_model.LogisticRegression(),
    linear_model.LogisticRegressionCV(cv=3, max_iter=50),
    linear_model.RidgeClassifier(),
    linear_model.Perceptron(),
    linear_model.SGDClassifier(random_state=0),
    linear_model.SGDClassifier(loss="log_loss", random_state=0),
    linear_model.SGDClassifier(loss="modified_huber", random_state=0),
    svm.LinearSVC(),
    svm.SVC(),
    svm.SVC(kernel="linear"),
    svm.SVC(kernel="poly", degree=2),
    svm.SVC(kernel="sigmoid", gamma=0.01),
    svm.SVC(decision_function_shape="ovo"),
    svm.SVC(break_ties=True, gamma=3.0),
    svm.NuSVC(nu=0.2),
    naive_bayes.GaussianNB(),
    neighbors.KNeighborsClassifier(),
    neighbors.KNeighborsClassifier(4, weights="distance"),
    neighbors.KNeighborsClassifier(3, metric="manhattan"),
    neighbors.KNeighborsClassifier(3, p=3),
    neighbors.KNeighborsClassifier(3, metric="chebyshev", weights="distance"),
    neighbors.NearestCentroid(),
    neural_network.MLPClassifier((7,), max_iter=30, random_state=0),
    neural_network.MLPClassifier((7, 3), activation="logistic", max_iter=30, random_state=0),
    discriminant_analysis.LinearDiscriminantAnalysis(),
    discriminant_analysis.LinearDiscriminantAnalysis(solver="eigen"),
]


@pytest.mark.parametrize("model", CLASSIFIERS, ids=str)
@pytest.mark.parametrize(
    "target", [KIND, BINARY, NAMES, KIND - 1.0, BINARY == 1], ids=["three", "two", "names", "floats", "bools"]
)
def test_classifiers(lab: Any, model: Any, target: np.ndarray) -> None:
    if target.dtype.kind == "b" and isinstance(model, neighbors.NearestCentroid):
        pytest.skip("the library itself refuses to average boolean labels")
    # Noise on the training rows, too: which of several equally distant neighbours counts is up to the library's search tree.
    trained, noisy = IRIS + NOISE, IRIS - NOISE[::-1]
    lab.check(model.fit(trained, target), noisy)


def test_liblinear_one_versus_rest(lab: Any) -> None:
    lab.check(linear_model.LogisticRegression(solver="liblinear").fit(IRIS, BINARY), IRIS)


def test_object_labels(lab: Any) -> None:
    labels = np.array(["one", "two", "three"], object)[KIND]
    compiled = lab.check(linear_model.LogisticRegression().fit(IRIS, labels), IRIS)
    assert compiled.predict(IRIS).dtype == object


def test_multilabel(lab: Any) -> None:
    target = np.column_stack([BINARY, KIND == 2]).astype(int)
    lab.check(linear_model.RidgeClassifier().fit(IRIS, target), IRIS)
    lab.check(neural_network.MLPClassifier((5,), max_iter=20, random_state=0).fit(IRIS, target), IRIS)
    lab.check(neighbors.KNeighborsClassifier().fit(IRIS, target), IRIS + 0.01)


def test_several_outputs_with_their_own_labels(lab: Any) -> None:
    target = np.column_stack([NAMES, np.where(BINARY, "yes", "no")])
    compiled = lab.check(neighbors.KNeighborsClassifier().fit(IRIS, target), IRIS + 0.01)
    assert len(compiled.predict_proba(IRIS)) == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_platt_probabilities(lab: Any) -> None:
    for target in (BINARY, KIND, np.arange(150) % 5):
        lab.check(svm.SVC(probability=True, random_state=0).fit(IRIS, target), IRIS * 1.1)


def test_precomputed_kernel(lab: Any) -> None:
    kernel = IRIS @ IRIS.T
    lab.check(svm.SVC(kernel="precomputed").fit(kernel, KIND), kernel)


def test_sparse_coefficients_and_vectors(lab: Any) -> None:
    from scipy import sparse

    lab.check(linear_model.SGDClassifier(penalty="l1", random_state=0).fit(IRIS, KIND).sparsify(), IRIS)
    with_vectors = svm.SVC().fit(sparse.csr_matrix(IRIS), KIND)
    compiled = lab.compile(with_vectors)
    np.testing.assert_array_equal(compiled.predict(IRIS), with_vectors.predict(sparse.csr_matrix(IRIS)))


@pytest.mark.parametrize(
    "model", [naive_bayes.MultinomialNB(), naive_bayes.ComplementNB(), naive_bayes.BernoulliNB(binarize=2.0)], ids=str
)
def test_discrete_naive_bayes(lab: Any, model: Any) -> None:
    lab.check(model.fit(COUNTS, COUNT_KIND), COUNTS[::-1])


@pytest.mark.parametrize(
    "model", [svm.OneClassSVM(), svm.OneClassSVM(kernel="linear"), linear_model.SGDOneClassSVM(random_state=0)], ids=str
)
def test_one_class(lab: Any, model: Any) -> None:
    lab.check(model.fit(IRIS), IRIS, IRIS * 1.3)


@pytest.mark.parametrize(
    "model",
    [cluster.KMeans(4, n_init=1, random_state=0), cluster.MiniBatchKMeans(3, n_init=1, random_state=0)],
    ids=str,
)
def test_clusters(lab: Any, model: Any) -> None:
    lab.check(model.fit(IRIS), IRIS + 0.01, rtol=1e-7)


@pytest.mark.filterwarnings("ignore:overflow")
def test_rows_far_from_all_clusters(lab: Any) -> None:
    """The distances to all centres round to one number, and the library still tells them apart."""
    far = np.vstack([np.eye(4), -np.eye(4)]) * 1e20
    lab.check(cluster.KMeans(4, n_init=1, random_state=0).fit(IRIS), far, far * 1e280)


def test_mean_shift(lab: Any) -> None:
    lab.check(cluster.MeanShift(bandwidth=1.0).fit(IRIS), IRIS + 0.01)


def test_scores_at_the_boundary(lab: Any) -> None:
    """A score of exactly 0 is the first class for linear models, the second for a support vector machine of two classes."""
    x = np.array([[-1.0], [1.0]])
    linear = linear_model.LogisticRegression(fit_intercept=False).fit(x, [0, 1])
    vectors = svm.SVC(kernel="linear").fit(x, [0, 1])
    for model in (linear, vectors):
        assert model.decision_function([[0.0]])[0] == 0.0
        lab.check(model, np.array([[0.0], [1e-300], [-1e-300], [2.0]]))


def test_votes_tie(lab: Any) -> None:
    x = np.array([[0.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]).repeat(2, axis=0)
    for options in ({}, {"break_ties": True}, {"decision_function_shape": "ovo"}):
        model = svm.SVC(kernel="rbf", gamma=1.0, **options).fit(x, [0, 0, 1, 1, 2, 2])
        lab.check(model, np.random.default_rng(0).normal(0, 0.05, (200, 2)), x)
