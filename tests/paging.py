"""Rows of a cache on pages that lie out of order, as sequences that share a pool leave them."""

import torch
from torch import Tensor

from dsv2_local.kernels.format import PAGE, pages_of


def paged(rows: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Rows [S, …] to (pages [n, PAGE, …], the sequence of which `length` positions come before the next step).

    One page more than is needed, and what follows the rows, hold no numbers.
    """
    count = pages_of(len(rows))
    order = torch.arange(count + 1).roll(1).flip(0)[:count]
    pages = torch.empty(count + 1, PAGE, *rows.shape[1:], dtype=rows.dtype)
    pages.fill_(0xFF if rows.dtype == torch.uint8 else float("nan"))  # as 8-bit rows, 0xFF makes scales NaN
    for position, page in enumerate(order.tolist()):
        part = rows[position * PAGE : (position + 1) * PAGE]
        pages[page, : len(part)] = part
    return pages, torch.cat((torch.tensor([length]), order))


def unpaged(pages: Tensor, sequence: Tensor, count: int) -> Tensor:
    """The first `count` rows of a sequence."""
    return pages[sequence[1 : 1 + pages_of(count)]].flatten(0, 1)[:count]
