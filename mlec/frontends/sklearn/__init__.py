"""The scikit-learn frontend: fitted estimators, pipelines and everything made of them.

How it is laid out:

* `lowering` - an estimator becomes a graph with its signature;
* `registry` - which function lowers which class; `context` - what those functions work with; `columns` - what flows between steps;
* one file for each family of estimators: `linear`, `svm`, `kernels`, `neighbors`, `naive_bayes`, `neural`, `trees`, `clusters`,
  `gaussian`, `preprocessing`, `distributions`, `encoders`, `decomposition`, `compose`;
* `foreign` - steps of other libraries;
* `files` - reading saved estimators.

Importing this package imports scikit-learn only when a model is lowered or loaded.
"""

from mlec.frontends.sklearn.frontend import SklearnFrontend

__all__ = ["SklearnFrontend"]
