"""How an ONNX model is read, normalized, prepared, run, cut and written.

Code about models that would be the same without quantization lives here.
"""
