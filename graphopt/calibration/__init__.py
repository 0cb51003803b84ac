"""What the tensors of a step are like on real batches, and how much the loss minds rounding them.

`graphopt.calibration.run.calibrate` runs the captured step and keeps a
`graphopt.calibration.record.Calibration`, which passes that choose formats read. It knows nothing
of those passes.
"""
