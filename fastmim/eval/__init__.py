"""What a model has learnt: features, nearest neighbours, reconstructions, curves."""

from fastmim.eval.chart import line_chart
from fastmim.eval.features import FeatureBank, evaluation_mode, extract_features, pixel_features
from fastmim.eval.knn import knn_accuracy
from fastmim.eval.visualize import reconstruct, reconstruction_picture

__all__ = [
    "FeatureBank",
    "evaluation_mode",
    "extract_features",
    "knn_accuracy",
    "line_chart",
    "pixel_features",
    "reconstruct",
    "reconstruction_picture",
]
