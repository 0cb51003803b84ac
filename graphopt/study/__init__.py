"""What delay does to training, in one process: no ranks, no queues, the same numbers.

`ConstantDelay` applies every gradient D updates late, as asynchronous data parallelism does.
`PipelinedBackpropagation` trains stages with the delays of a pipeline that is never drained.
"""

from graphopt.study.constant_delay import ConstantDelay
from graphopt.study.pipelined import PipelinedBackpropagation

__all__ = ["ConstantDelay", "PipelinedBackpropagation"]
