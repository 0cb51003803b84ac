"""Engines: what runs the halves of a step behind autograd.

An engine takes the step's inputs as one flat list, in the order of the plan's signature, and
returns the model's outputs. It writes mutations back, gives absent gradients for absent tangents
as eager does, and frees saved values as soon as the backward has taken them.
"""
