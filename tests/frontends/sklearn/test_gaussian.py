"""Discriminant analysis with a covariance for each class, mixtures, ellipses, and kernels given by their name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sklearn import datasets
from sklearn.covariance import EllipticEnvelope
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis
from sklearn.kernel_ridge import KernelRidge
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture

from mlec.errors import UnsupportedModelError

IRIS, KIND = datasets.load_iris(return_X_y=True)
TARGETS = np.column_stack([IRIS[:, 0] * 2, IRIS[:, 1] - IRIS[:, 2]])


@pytest.mark.parametrize("kinds", [KIND, KIND == 1, np.array(["x", "y", "zz"])[KIND]], ids=["3", "2", "names"])
@pytest.mark.parametrize("settings", [{}, {"reg_param": 0.3}, {"solver": "eigen", "shrinkage": 0.1}], ids=str)
def test_quadratic_discriminant(lab: Any, kinds: np.ndarray, settings: dict[str, Any]) -> None:
    lab.check(QuadraticDiscriminantAnalysis(**settings).fit(IRIS, kinds), IRIS * 1.01, -IRIS, rtol=1e-9)


def test_quadratic_discriminant_of_a_class_without_a_prior(lab: Any) -> None:
    lab.check(QuadraticDiscriminantAnalysis(priors=[0.5, 0.5, 0.0]).fit(IRIS, KIND), IRIS, rtol=1e-9)


@pytest.mark.parametrize("covariance", ["full", "tied", "diag", "spherical"])
@pytest.mark.parametrize("cls", [GaussianMixture, BayesianGaussianMixture])
def test_mixtures(lab: Any, covariance: str, cls: Any) -> None:
    lab.check(cls(n_components=3, covariance_type=covariance, random_state=0).fit(IRIS), IRIS, IRIS * 5, rtol=1e-9)


def test_mixture_of_finite_weights(lab: Any) -> None:
    kind = "dirichlet_distribution"
    lab.check(BayesianGaussianMixture(n_components=2, weight_concentration_prior_type=kind).fit(IRIS), IRIS, rtol=1e-9)


def test_elliptic_envelope(lab: Any) -> None:
    lab.check(EllipticEnvelope(contamination=0.07, random_state=0).fit(IRIS), IRIS * 1.01, IRIS - 5, rtol=1e-9)


@pytest.mark.parametrize("kernel", ["linear", "poly", "rbf", "sigmoid", "cosine", "laplacian"])
def test_kernel_ridge(lab: Any, kernel: str) -> None:
    model = KernelRidge(kernel=kernel, gamma=0.05, coef0=0.5, degree=2)
    lab.check(model.fit(IRIS, TARGETS[:, 0]), IRIS, IRIS * 0, rtol=1e-9)
    lab.check(model.fit(IRIS, TARGETS), IRIS, rtol=1e-9)


def test_kernel_ridge_by_a_function_is_refused(lab: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="KernelRidge: kernel"):
        lab.lower(KernelRidge(kernel="chi2", gamma=0.1).fit(IRIS, TARGETS))
