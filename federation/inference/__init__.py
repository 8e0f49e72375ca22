"""What a saved model is used for: predictions for new samples, and ONNX."""
