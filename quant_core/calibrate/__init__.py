"""What the samples tell: ranges, channel means, Gram matrices, and how channels and outliers are treated."""
