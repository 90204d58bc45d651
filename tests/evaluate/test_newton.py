"""Parts of the regression's Newton steps: the preconditioner and the line search."""

from __future__ import annotations

import torch

from retrieve_or_generate.evaluate.newton import Blocks, Problem


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


def problem(dtype: torch.dtype, values: list[float]) -> tuple[Problem, torch.Tensor]:
    """Of forty rows and three classes, and where all θ are 0."""
    draw = torch.Generator().manual_seed(3)
    rows = torch.cat([torch.randn(40, 5, generator=draw), torch.ones(40, 1)], 1)
    given = Problem.of(rows, torch.randint(0, 3, (40,), generator=draw), 3, dtype, dtype)
    return given.at(values), torch.zeros(6, len(values), 3, dtype=dtype)


def test_a_step_that_is_too_long_is_halved_until_it_leads_down_each_problem_apart() -> None:
    two, theta = problem(torch.float64, [1.0, 1.0])
    logits = two._logits(theta)
    value = two._value(logits, theta)
    gradient = two._over_rows(torch.softmax(logits, -1) - two.one_hot, theta, two.rows)
    step = -gradient * torch.tensor([100.0, 1000.0])[:, None]
    slope = (gradient * step).sum((0, 2))
    length, there = two._line_search(logits, theta, two._logits(step), step, value, slope)
    assert 0 < length[1] < length[0] <= 0.25
    assert (there < value).all()
    for factor, down in ((1, True), (2, False)):
        longer = factor * length[:, None] * step
        reached = two._value(two._logits(longer), longer)
        assert (reached <= value + 1e-4 * factor * length * slope).tolist() == [down, down]


def test_a_step_that_moves_nothing_but_rounding_is_taken() -> None:
    """All intercepts alike: the objective is the same, but for its last bits."""
    one, theta = problem(torch.float32, [1.0])
    logits = one._logits(theta)
    value = one._value(logits, theta)
    for size in torch.linspace(0.1, 5, 50):
        step = torch.zeros_like(theta)
        step[-1] = size
        length, _ = one._line_search(logits, theta, one._logits(step), step, value, torch.zeros(1))
        assert length == 1
