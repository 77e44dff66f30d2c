"""A batch: every model of a manifest made, judged, timed and reported."""
