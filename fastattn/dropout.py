"""Which elements dropout keeps: the draw that every backend makes alike, in plain PyTorch.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011), keyed by the seed. One call gives 8 draws of
16 bits: of key j the word (j >> 3) & 3 of counter (j >> 5) * 4 + ((j >> 1) & 3), its low half if j is even, else its high half.
So a call holds what one thread of a tensor core's fragment holds of a row, and 4 calls make the 32 keys of a word of bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastattn.lowering import pack_bits

MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
WEYL = 0x9E3779B9, 0xBB67AE85
ROUNDS = 10
LOW = 0xFFFFFFFF
LINEAR, FFN_HIDDEN, LAYER_NORM, RMS_NORM = 1, 2, 3, 4  # tags: which op of two dimensions draws


def threshold(p: float) -> int:
    """An element is kept iff its 16 bits are at least this: the rate is p to 2^-17."""
    return math.floor(p * 65536 + 0.5)


def check_rate(p: float, name: str = "dropout") -> None:
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
        raise ValueError(f"{name} must be a probability from 0 to 1, got {p!r}")


def rescale(p: float) -> float:
    """What kept elements are multiplied by; of p = 1 nothing is kept."""
    return 0.0 if p == 1 else 1 / (1 - p)


def draw_seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    """The seed as a one-element int64 tensor on `device`; None draws it from the device's default generator.

    Raises TypeError or ValueError for anything but None, an int of 64 bits or a one-element int64 tensor on that device.
    """
    if seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device:
            given = f"{seed.dtype} of shape {tuple(seed.shape)} on {seed.device}"
            raise ValueError(f"seed must be an int or a one-element int64 tensor on {device}, got {given}")
        return seed.reshape(1)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be None, an int or a one-element int64 tensor, got {type(seed).__name__}")
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed must fit 64 bits, got {seed}")
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((1,), signed, dtype=torch.int64, device=device)  # no copy from the host, which no CUDA graph captures


def seed_for(p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """What an op with dropout p draws by, None where p is 0: then nothing is drawn, and a wrong seed is refused all the same."""
    check_rate(p)
    drawn = draw_seed(seed, device) if p or seed is not None else None
    return drawn if p else None


def philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four output words of Philox-4x32-10 as int64 in [0, 2^32), for counters of that kind; shapes broadcast."""
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(ROUNDS):
        first, second = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # int64 wraps: its 64 bits are those of the product
        c0, c1, c2, c3 = (second >> 32) & LOW ^ c1 ^ k0, second & LOW, (first >> 32) & LOW ^ c3 ^ k1, first & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return c0, c1, c2, c3


def kept(seed: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, N: int, p: float) -> Tensor:
    """Bool (..., N): which of N columns are kept in rows with counters c1, c2, c3 (...)."""
    words = -(-N // 32)
    c0 = torch.arange(words * 4, device=seed.device)
    rows = (c[..., None] for c in torch.broadcast_tensors(c1, c2, c3))
    drawn = torch.stack(philox(seed, c0, *rows), -2)  # (..., 4 words of a call, calls)
    halves = torch.stack([drawn & 0xFFFF, drawn >> 16], -1).unflatten(-2, (words, 4))  # (..., 4, words of keys, 4 calls, 2)
    return halves.transpose(-4, -3).flatten(-4)[..., :N] >= threshold(p)


def dropout_mask(seed: int | Tensor, B: int, H: int, M: int, N: int, p: float) -> Tensor:
    """Which weights `attention(..., dropout=p, seed=seed)` keeps: bool (B, H, M, N), True = kept, on a seed tensor's device.

    For packed sequences b is the sequence, and the query and the key count from 0 in it.

    >>> kept = fastattn.dropout_mask(7, 1, 1, 2, 8, p=0.5)
    >>> kept[0, 0].long()
    tensor([[0, 1, 1, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 1, 1, 1, 0]])
    """
    check_rate(p, "p")
    device = seed.device if isinstance(seed, Tensor) else torch.device("cpu")
    b, h, i = (torch.arange(size, device=device) for size in (B, H, M))
    return kept(draw_seed(seed, device), i, h[:, None], b[:, None, None], N, p)


def kept_bits(seed: Tensor, B: int, H: int, M: int, N: int, p: float) -> Tensor:
    """`dropout_mask` as bits, int32 (B, H, M, ceil(N / 32)): key j is bit j % 32 of word j // 32."""
    return _packed_in_words(dropout_mask(seed, B, H, M, N, p))


def packed_kept_bits(seed: Tensor, starts: Tensor, rows: int, H: int, N: int, p: float) -> Tensor:
    """The same of packed sequences, by rank: int32 (H, rows, ceil(N / 32)), where sequence b has rows starts[b] up to
    starts[b + 1], and N is the most keys of one. Rows of no sequence hold anything."""
    row, h = torch.arange(rows, device=seed.device), torch.arange(H, device=seed.device)
    b = (torch.searchsorted(starts, row, right=True) - 1).clamp(0, max(starts.shape[0] - 2, 0))
    return _packed_in_words(kept(seed, (row - starts[b]).clamp(min=0), h[:, None], b, N, p))


def _packed_in_words(kept: Tensor) -> Tensor:
    return pack_bits(torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 32)))


def kept_elements(seed: Tensor, rows: int, columns: int, p: float, tag: int) -> Tensor:
    """Which elements an op of two dimensions keeps: bool (rows, columns); `tag` says which op."""
    row = torch.arange(rows, device=seed.device)
    return kept(seed, row & LOW, row >> 32, torch.full_like(row, 0x80000000 | tag), columns, p)
