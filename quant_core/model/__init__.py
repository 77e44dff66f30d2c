"""What an ONNX model is made of, how it is read, run, cut, tidied and written. Knows nothing of quantization."""
