"""The preconditioner of the regression's Newton steps."""

from __future__ import annotations

import torch

from retrieve_or_generate.evaluate.newton import Blocks


def test_blocks_solve_what_their_written_out_matrices_would() -> None:
    draw = torch.Generator().manual_seed(3)
    x, w = torch.randn(40, 5, generator=draw).double() + 2, torch.rand(40, 2, 3, generator=draw).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    penalty = torch.tensor([0.1] * 5 + [0.0]).double()[:, None, None].expand(-1, 2, 1)
    weight = w.mean(0)
    mean = torch.einsum("nd,nbk->dbk", x, w) / 40 / weight
    square = torch.einsum("nd,nbk->dbk", x**2, w) / 40
    right = torch.randn(6, 2, 3, generator=draw).double()
    solved = Blocks.of(weight, mean, square, penalty).solve(right)
    for b in range(2):
        for k in range(3):
            variance = (square[:, b, k] - weight[b, k] * mean[:, b, k] ** 2).clamp_min(1e-3 * square[:, b, k])
            block = torch.diag(variance + penalty[:, b, 0]) + weight[b, k] * torch.outer(mean[:, b, k], mean[:, b, k])
            torch.testing.assert_close(block @ solved[:, b, k], right[:, b, k])


def test_blocks_of_rows_without_curvature_are_the_penalty_alone() -> None:
    nothing = torch.zeros(4, 1, 2)
    blocks = Blocks.of(nothing[0], nothing, nothing, torch.tensor([0.5, 0.5, 0.5, 0.0])[:, None, None])
    solved = blocks.solve(torch.ones(4, 1, 2))
    assert solved[:3].eq(2).all()
    assert solved.isfinite().all()
