"""The PyTorch reference: the specification of SOCKET attention, written to be read beside the paper.

`hashing` (codes and bucket probabilities), `selection` (scores and the attended set), `operator` (the whole operator
on packed tokens and a paged cache).  Every other implementation is tested against this one.
"""

from socket_trt.reference.hashing import bucket_probabilities, key_codes, pack_codes, unpack_codes
from socket_trt.reference.operator import OperatorOutputs, attend, gather_sequence, socket_attention
from socket_trt.reference.selection import attended_set, collision_scores, decode_set

__all__ = [
    "OperatorOutputs",
    "attend",
    "attended_set",
    "bucket_probabilities",
    "collision_scores",
    "decode_set",
    "gather_sequence",
    "key_codes",
    "pack_codes",
    "socket_attention",
    "unpack_codes",
]
