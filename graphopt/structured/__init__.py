"""Matrices in fewer numbers: flat low rank, tiles, halves of halves, and diagonals.

A form says how a weight [rows, cols] is made of factors and multiplies with them in a handful of
batched products, all plain differentiable torch. `graphopt.ops.structured` has them as operators,
`StructuredWeight` puts one in the place of a parameter.
"""

from graphopt.structured.form import Form
from graphopt.structured.forms import FORMS, form_of, form_of_shapes
from graphopt.structured.weight import StructuredWeight

__all__ = ["FORMS", "Form", "StructuredWeight", "form_of", "form_of_shapes"]
