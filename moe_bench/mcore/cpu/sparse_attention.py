"""What Megatron's sparse attention (DSA) takes from a CUDA package: the Hadamard rotation of the indexer's queries and keys."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def rotate_activation(x: torch.Tensor) -> torch.Tensor:
    """Queries or keys [..., head] times the Hadamard matrix over sqrt(head), in their own dtype, summed in fp32.

    As `fast_hadamard_transform` does: heads that are no power of two are padded with zeros and cut back
    (https://github.com/Dao-AILab/fast-hadamard-transform, README: scipy.linalg.hadamard). Megatron's own takes bf16 alone.
    """
    head = x.size(-1)
    matrix = _hadamard(1 << (head - 1).bit_length(), x.device)[:head, :head]
    return (F.linear(x.float(), matrix) * head**-0.5).to(x.dtype)


def _hadamard(size: int, device: torch.device) -> torch.Tensor:
    """Sylvester's Hadamard matrix of a power of two, [size, size], 1 and -1."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device=device)
    matrix = torch.ones(1, 1, device=device)
    while matrix.size(0) < size:
        matrix = torch.kron(pair, matrix)
    return matrix
