"""Times whole networks, ours and stock's: ``python -m bench.networks``.

* chains: multi-layer perceptrons, forward, and forward with the gradients of every parameter. The same for an
  ``nn.Sequential`` of our layers, for stock's model after ``fuse``, and for the products alone, into existing buffers.
* training: whole steps (zero_grad, forward, loss, backward, fused Adam) over tensors in memory. The loss is the cross
  entropy of ten classes, else the mean squared error. On CPU also the step in one call, ``dlkernels.training_step``.
* ensembles: several multi-layer perceptrons of the same sizes. Forward and gradients by ``torch.func.vmap`` over their
  stacked parameters; the training step of all in one call beside one step after another of stock's.
* residuals: a step that differentiates twice, of a physics-informed network: the squared residual of the heat equation
  u_t = u_xx over points (x, t), and the gradients of every parameter.
* gated: ``down(silu(gate(x)) * up(x))``, Llama's feed-forward block, forward, and forward with the gradients of the
  input and every parameter. Stock also with gate and up as one packed weight. Llama's own class also after ``fuse``.
* blocks: ``down(gelu(up(x)))`` without biases, by ``functional.mlp``, with the gradients of the input and the weights.
* heads: ``cross_entropy(linear(x, weight), target)`` and its gradients for many classes. From torch 2.13 on
  ``F.linear_cross_entropy`` too, by its reference path (all logits at once) and by its chunked path (with ``options``).
* On a GPU blocks and heads also by the other libraries of ``bench/peers.py`` that can be imported; for the others, and
  for those whose results are wrong, the reason is printed.
* With ``--compile`` chains, ensembles, blocks and gated networks also by ``torch.compile`` of stock. Of a training step
  two forms: the compiled network in an eager step; and forward with its loss and the optimizer, Adam, compiled too.
* With ``--device cuda`` each is also timed as a CUDA graph, with the share of a chain's floor (``bench/floors.py``).

The operations of a row are those of the matrix products in stock's call, as ``torch.utils.flop_counter`` counts them.

Every contender of ours is compared with float64 before it is timed. It is refused if its error is more than twice
stock's.
"""
