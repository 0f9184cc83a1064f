"""Linear maps of the fast path: forward and backward by hand, with adapters folded into the products.

A projection is one linear layer, or several that read the same input (CLIP's queries, keys and values). Each may carry
a LoRA adapter: ``y = x W^T + b + s (x A^T) B^T``. Where W is held as it is, the adapter costs hardly more than its own
gradients: the columns of ``s B`` stand beside W's, and ``x A^T`` beside x in the same buffer, so that one product gives
``[x | x A^T] [W | s B]^T``, and its backward product gives the gradients of x and of ``x A^T`` together.

Measured on one H200, gate_up_proj of the published size, 15,072 rows, rank 64: 2.13 ms for the joint product, 2.09 ms
for W alone, 2.56 ms for W and then ``addmm``.

``projection`` is the whole, over ``held_weights`` (W, b and ``[W | s B]``), ``adapters`` (A and B), ``dora``
(magnitudes), ``products`` and ``float8`` (how products are formed) and ``working_copies`` (what is made from weights).
"""
