"""In-context learning as scikit-learn estimators: fit places labelled texts in the context, predict answers after them."""

from manyicl.estimator.classifier import ManyShotClassifier
from manyicl.estimator.generator import ManyShotGenerator

__all__ = ["ManyShotClassifier", "ManyShotGenerator"]
