"""Rewriting of ONNX models that somebody else exported: their attentions become `SocketAttention` on paged caches.

`rewrite_file` and `rewrite_model` are the interface.  `opset23` and `group_query` hold one pattern each, `mask` reads the
sliding window out of attention masks, `packed` replaces, `rewriter` puts it together.
"""

from socket_trt.onnx.rewrite.files import rewrite_file, weights_outside
from socket_trt.onnx.rewrite.rewriter import ReplacedAttention, RewriteReport, rewrite_model

__all__ = ["ReplacedAttention", "RewriteReport", "rewrite_file", "rewrite_model", "weights_outside"]
