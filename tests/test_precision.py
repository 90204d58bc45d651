"""The type that products are taken in."""

from __future__ import annotations

import pytest
import torch

from retrieve_or_generate.precision import native

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("instructions", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_cpu_multiplies_bfloat16_only_where_it_has_instructions(
    monkeypatch: pytest.MonkeyPatch, instructions: bool, wanted: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": instructions})
    assert native("bfloat16", CPU) == wanted


def test_any_other_type_is_the_one_asked_for() -> None:
    assert native("float32", CPU) == torch.float32
    assert (native("bfloat16", GPU), native("float16", GPU)) == (torch.bfloat16, torch.float16)
