"""Model and inputs to `Graph`: the only folder that touches torch's capture APIs.

Dynamo captures the bound ``forward`` as one torch-level graph, with its guards and with generated
bytecode that flattens the call's inputs and rebuilds its outputs. AOTAutograd derives from it the
joint forward and backward graph, without decompositions. These APIs are semi-private;
`graphopt.supported` names the torch releases they were checked on.
"""

from graphopt.capture.capture import Capture, capture, capture_forward
from graphopt.capture.possible import is_uninitialised, runs_plain

__all__ = ["Capture", "capture", "capture_forward", "is_uninitialised", "runs_plain"]
