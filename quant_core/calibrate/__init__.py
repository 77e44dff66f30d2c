"""What samples show of a float model, before anything is rounded.

Statistics of tensors (stats, observe), the ranges that follow from them (ranges), Gram matrices of
the inputs of weights (gram), and how channels and outliers are scaled so that integers suit them
(equalize, outliers). It reads plans and runs float models; it never writes a quantized one.
"""
