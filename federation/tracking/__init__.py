"""Sends what a run writes down to TensorBoard, MLflow or Weights & Biases."""
