"""What to try where a call cannot be captured."""

from __future__ import annotations

import re

from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

ZEROS = (
    "add zeros that require a gradient to the value: their gradient is the one of the value, and "
    "they can be hooked"
)
_PAD = "pad the sequences, and mask what is padded"

_DRAWS = (
    r"`?Random\.|generator of one's own|RandomState|default_rng|_numpy\.random|method random"
    r"|\bnumpy\.random|of class `Generator`"
)

_HINTS = (
    (
        _DRAWS,
        "draw by torch, which a graph does at every call: torch.rand(()); or draw outside of the "
        "model and pass what was drawn",
    ),
    (
        r"nested tensors of a padded batch",
        "make the encoder with enable_nested_tensor=False, or call "
        "torch.backends.mha.set_fastpath_enabled(False): eager then does the same",
    ),
    (r"one_hot` with data-dependent", "pass num_classes"),
    (
        r"how often a tensor was changed",
        "count the changes yourself, in an attribute of the model, or keep what depends on them "
        "outside of the model",
    ),
    (
        r"Prints what is not known",
        "print numbers, strings and tensors, before they are changed and without file=",
    ),
    (r"operand type\(s\) for %: 'str'", "write an f-string: f'{x:.4f}'"),
    (r"Logger method", "log by its methods debug, info, warning and error"),
    (r"`?checkpoint_sequential", "checkpoint each segment of it by torch.utils.checkpoint"),
    (
        r"creation function with requires_grad=True|nn\.Parameter\(\)",
        "make it in __init__, or pass it to the model",
    ),
    (
        r"requires_grad_\(\)|Tensor\.requires_grad",
        "call requires_grad_ outside of forward, or on a detach() that forward does not return; "
        "detach() what shall get no gradient",
    ),
    (
        r"tp_iternext",
        "take the next value outside of the model and pass it, or keep a list and an index",
    ),
    (r"SimpleNamespace|non-function __getattr__", "use a small class of your own for it"),
    (r"setattr\(\) on unsupported", "keep it in an attribute of the model"),
    (
        r"no meta kernel",
        "compute it by other operators (a least-squares solution by torch.linalg.qr or solve), or "
        "outside of the model",
    ),
    (
        r"trunc_normal_",
        "draw outside of the model and pass what was drawn, or torch.randn(…).clamp(-2, 2)",
    ),
    (
        r"(?i)data-dependent",
        "choose by torch.where or torch.cond instead of by Python on tensor values",
    ),
    (
        r"manual_seed|rng_state|fork_rng|\(Generator\)|torch\.Generator|\._C\.Generator"
        r"|torch\.random",
        "draw outside of the model and pass what was drawn",
    ),
    (r"retain_grad", ZEROS),
    (
        r"Non-nullified side effect|Higher Order Operator: torch\.utils\.checkpoint",
        "keep what is counted or recorded outside of what is checkpointed",
    ),
    (r"Unsafe side effect", "return what is recorded, instead of keeping it from inside of a hook"),
    (r"consumed", "pass create_graph=True or retain_graph=True to autograd.grad"),
    (r"autograd\.grad|backward\(\)", "differentiate by torch.func.grad or torch.autograd.grad"),
    (r"tp_iter", "pass a list or a tuple"),
    (r"(?i)pack_(padded_)?sequence|PackedSequence", _PAD),
    (r"(?i)sparse tensor|nested.tensor", "compute with dense tensors, or outside of the model"),
    (r"context manager|`lock\.", "enter it around the call of the model"),
    (r"numpy function", "compute it by torch"),
    (
        r"making fake tensor call",
        "look at the shapes and dtypes of the inputs; PyTorch alone refuses them, too",
    ),
    (r"inplace view", "give the view another name: y = x.t()"),
)


# What forward does, where Dynamo's first line speaks of itself.
_SAYS = (
    (
        r"manual_seed|rng_state|fork_rng",
        "forward seeds random numbers or puts them back, and a graph draws from the default "
        "generator only",
    ),
    (
        _DRAWS,
        "forward draws from Python's random numbers or NumPy's, or seeds them, and what is drawn "
        "would be frozen into the graph",
    ),
    (
        r"\(Generator\)|torch\.Generator|\._C\.Generator",
        "forward draws from a torch.Generator of its own, and a graph draws from the default one "
        "only",
    ),
    (
        r"(?i)could not (guard on|extract) .*data-dependent",
        "what forward does next is data-dependent: it asks for a value or a size that depends on "
        "data, and a graph has one way",
    ),
    (
        r"Unsupported context manager",
        "forward enters a context manager that torch cannot capture",
    ),
    (
        r"retain_grad\(\) with",
        "forward calls retain_grad(), and the gradient is inside of the graph, on no tensor",
    ),
    (
        r"(?i)pack_(padded_)?sequence|PackedSequence",
        "forward packs sequences, and how a recurrent network runs on them depends on data",
    ),
    (
        r"no meta kernel",
        "forward calls an operator whose results have sizes that torch cannot tell",
    ),
)


def says(message: str) -> str:
    """What forward does that cannot be captured; empty where Dynamo says it best."""
    if error := re.search(
        r"with fake tensors: .*: got \w+\((['\"])(.*)\1\)$", message, re.MULTILINE
    ):
        return f"an operator of forward refuses what it is given: {error[2].rstrip('.')}"
    return next((said for pattern, said in _SAYS if re.search(pattern, message)), "")


_OF_DYNAMO = (
    *("torch._dynamo", "file an issue", "Dynamo tracing", "graph break", "docs.google"),
    *("compiled region", "Dynamo bug", "running in eager"),
)


def hint(message: str, given: object = None, where: str = "") -> str:
    """One thing to try: ours where the reason is known, otherwise the first of Dynamo's.

    Args:
        message: of Dynamo.
        given: the arguments of the call.
        where: the user's line.
    """
    if "layerdrop" in where:
        return "train with layerdrop=0, an option of the model's configuration"
    if re.search("data-dependent", message) and _has_packed(given):
        return _PAD
    for pattern, found in _HINTS:
        if re.search(pattern, message):
            return found
    hints = (ln.split("Hint:", 1)[1] for ln in message.splitlines() if "Hint:" in ln)
    first = next((h.split(". ")[0].strip().rstrip(".") for h in hints), "")
    # Dynamo's settings and bug tracker are nothing for a user of graphopt.
    useless = any(words in first for words in _OF_DYNAMO)
    own = "rewrite this line, or keep what it does outside of the model"
    return own if useless or not first else first


def _has_packed(given: object) -> bool:
    """Whether there is a packed sequence among the arguments, also in containers of them."""
    leaves = pytree.tree_leaves(given, is_leaf=lambda value: isinstance(value, PackedSequence))
    return any(isinstance(leaf, PackedSequence) for leaf in leaves)
