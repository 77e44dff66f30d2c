"""How real numbers become integers: grids, layouts, rounding, saturation. Arrays in, arrays out."""
