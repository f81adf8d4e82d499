"""clipfast.kernels: the fused ops under the model, one home (folder) each.

One legend for every shape in this package:

    N  rows of a contrastive batch over all ranks      C  channels (width of a tower)
    n  rows of it on this rank                         H  heads
    D  embedding width                                 K  width of a head, C / H
    B  batch                                           T  packed tokens, the sum of the B lengths
    L  tokens of one sequence                          F  hidden width of an MLP

The ops:

    attention         softmax(QKᵀ/√K)·V from one packed QKV projection; dense, causal, packed lengths
    batch_norm        batch norm in training, with residual addition and ReLU
    bmm               a batch of products of matrices, where the vendor's is slow
    contrastive       both log-sum-exps of CLIP's similarity matrix and their gradients, the matrix never formed
    convolution       3 × 3 and 1 × 1, of few channels
    encoder           residual attention blocks for inference, in one parallel region
    fused_mlp         mlp's two Linears with the activation, and its derivative, in the epilogue of a product
    int8_linear       x·Wᵀ + b and an activation, weights and activations rounded to 8 bits, for inference
    layer_norm        layer norm, with the residual addition before it in the same pass
    linear            x·Wᵀ + b by the faster of the machine's two libraries
    mlp               Linear, QuickGELU or GELU, Linear; the activation in one pass with the bias
    pairwise_sigmoid  SigLIP's loss over all pairs and its gradients in one sweep, the matrix never formed
    pooling           attention of one query per sequence, with K and V never formed
"""

if __name__ == "kernels":
    raise ImportError(
        "import clipfast.kernels, not kernels: this folder would shadow the PyPI package of that name. "
        "Run Python from another folder, or install clipfast (pip install -e . --no-build-isolation)"
    )

from clipfast.kernels import dispatch
from clipfast.kernels.attention import attention
from clipfast.kernels.batch_norm import batch_norm
from clipfast.kernels.bmm import bmm
from clipfast.kernels.contrastive import contrastive
from clipfast.kernels.convolution import convolution
from clipfast.kernels.dispatch import use
from clipfast.kernels.encoder import encoder
from clipfast.kernels.fused_mlp import fused_mlp
from clipfast.kernels.int8_linear import int8_linear
from clipfast.kernels.layer_norm import layer_norm
from clipfast.kernels.linear import linear
from clipfast.kernels.mlp import mlp
from clipfast.kernels.op import OPS
from clipfast.kernels.pairwise_sigmoid import pairwise_sigmoid
from clipfast.kernels.pooling import pooling

__all__ = [
    "OPS", "attention", "batch_norm", "bmm", "contrastive", "convolution", "dispatch", "encoder", "fused_mlp", "int8_linear",
    "layer_norm", "linear", "mlp", "pairwise_sigmoid", "pooling", "use",
]  # fmt: skip
