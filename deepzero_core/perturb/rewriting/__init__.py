"""What is done to a traced graph before it is evaluated: it computes the same in fewer and larger operators."""

from torch.fx import GraphModule

from deepzero_core.perturb.rewriting.attention import fuse_attention
from deepzero_core.perturb.rewriting.feed_forward import fuse_feed_forward
from deepzero_core.perturb.rewriting.head import fuse_head
from deepzero_core.perturb.rewriting.narrowing import narrow


def rewrite(graph: GraphModule) -> None:
    """Rewrite a graph of ATen operators in place."""
    fuse_attention(graph)
    fuse_feed_forward(graph)
    fuse_head(graph)
    narrow(graph)
    graph.recompile()


__all__ = ["rewrite"]
