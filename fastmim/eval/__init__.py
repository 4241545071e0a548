"""What a model has learnt: features, nearest neighbours, linear probe, reconstructions, curves."""

from fastmim.eval.chart import line_chart
from fastmim.eval.features import FeatureBank, evaluation_mode, extract_features, pixel_features
from fastmim.eval.knn import knn_accuracy
from fastmim.eval.linear import LinearProbe, linear_probe
from fastmim.eval.visualize import reconstruct, reconstruction_picture

__all__ = [
    "FeatureBank",
    "LinearProbe",
    "evaluation_mode",
    "extract_features",
    "knn_accuracy",
    "line_chart",
    "linear_probe",
    "pixel_features",
    "reconstruct",
    "reconstruction_picture",
]
