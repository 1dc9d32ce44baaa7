"""Input factories and the one comparator, used by the tests, the benches and anyone who adds an op."""

from mmkernels.testing.accuracy import Accuracy, assert_as_accurate

__all__ = ["Accuracy", "assert_as_accurate"]
