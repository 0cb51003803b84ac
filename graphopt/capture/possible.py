"""What rules a graph out before anything is captured: such calls run the model's own forward."""

from __future__ import annotations

from torch import nn
from torch.nn.modules import module as of_all_modules
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter


def runs_plain() -> bool:
    """Whether now no call can run as a graph; cheap enough to ask at each call.

    Backward hooks on all modules would need each module as a node of autograd.
    """
    return bool(of_all_modules._global_backward_hooks or of_all_modules._global_backward_pre_hooks)


def is_uninitialised(model: nn.Module) -> bool:
    """Whether a lazy module of the model waits for its first call, which draws its parameters.

    That call has to run as the model's own: then it draws the numbers that eager draws. To be asked
    before a capture only.
    """
    tensors = (*model.parameters(), *model.buffers())
    return any(
        isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in tensors
    )
