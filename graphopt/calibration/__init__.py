"""What the tensors of a step are like on real batches, and how much the loss minds rounding them.

`calibrate` runs the captured step and keeps a `Calibration`, which passes that choose formats read.
It knows nothing of those passes.
"""

from graphopt.calibration.record import FORMATS, Calibration, Range, Sensitivity
from graphopt.calibration.run import calibrate

__all__ = ["FORMATS", "Calibration", "Range", "Sensitivity", "calibrate"]
