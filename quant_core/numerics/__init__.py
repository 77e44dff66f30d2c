"""How real numbers become integers: grids, layouts, rounding, saturation. Arrays in, arrays out.

affine              scales and zero points: real = (integer - zero_point) * scale
granularity, layout, levels
                    what shares a scale; which axes of a weight are rows; sixteen uneven integers
integer_weight      a rounded weight
weight_methods      the table of methods, each made of the files below
round_nearest, both_axes, standard_weight
                    rounding to nearest
gptq, sweep, descent, column_bounds
                    rounding that makes up for errors: columns in turn, then one by one again
saturation          pairs of weights whose sums overflow on x86 without VNNI
float16             which numbers float16 holds
sqnr, output_noise  noise in dB; noise that a rounded weight makes in a layer's output
"""
