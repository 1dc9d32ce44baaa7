"""Input factories and the accuracy comparison used by tests, benches and new ops."""

from mmkernels.testing.accuracy import Accuracy, assert_as_accurate

__all__ = ["Accuracy", "assert_as_accurate"]
