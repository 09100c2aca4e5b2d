from __future__ import annotations

import pytest

from tests.inference.gpu import needs_compiler, needs_gpu, needs_interpreter, needs_triton

DEVICES = [
    pytest.param("cpu", marks=[needs_triton, needs_interpreter]),
    pytest.param("cuda", marks=[pytest.mark.gpu, needs_triton, needs_gpu, needs_compiler]),
]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """A CPU with Triton's interpreter, or else a GPU."""
    return str(request.param)
