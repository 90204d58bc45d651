"""The type that products are taken in."""

from __future__ import annotations

import pytest
import torch

from retrieve_or_generate.precision import native, one_thread

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"avx2": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True}, torch.bfloat16),
        ({"avx2": True, "avx512_bf16": False}, torch.float32),
    ],
)
def test_a_cpu_multiplies_bfloat16_only_where_it_has_instructions(
    monkeypatch: pytest.MonkeyPatch, known: dict[str, bool], wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known)
    assert native("bfloat16", CPU) == wanted


def test_any_other_type_is_the_one_asked_for() -> None:
    assert native("float32", CPU) == torch.float32
    assert (native("bfloat16", GPU), native("float16", GPU)) == (torch.bfloat16, torch.float16)


def test_one_thread_and_then_as_many_as_before() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
