"""A decode step with the kernels in Triton and without: the same tokens."""

from __future__ import annotations

import pytest
import torch

from dgx_music.inference.musicgen import products
from dgx_music.inference.musicgen.decoder import Decoder
from dgx_music.inference.musicgen.slots import Slots
from dgx_music.inference.musicgen.tiny import build_tiny
from tests.inference.gpu import IS_INTERPRETED
from tests.inference.test_conditions import NEGATIVE, make_codes, make_negative
from tests.inference.test_slots import GREEDY, MAX_STEPS, PROMPTS, decode, make_row


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes as long for a small block as for a large one."""
    if IS_INTERPRETED:
        large = {"block_out": 64, "block_in": 64, "num_warps": 1}
        monkeypatch.setattr(products, "_few_sizes", lambda *_: large)


@pytest.mark.parametrize("is_in_fp8", [False, True], ids=["full", "fp8"])
def test_a_decoders_tokens_are_the_same_through_the_kernels(
    device: str, is_in_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_in_fp8 and IS_INTERPRETED:
        pytest.skip("the interpreter rounds to fp8 in another way than torch and GPUs do")
    codes = []
    for has_kernel in (False, True):
        model, _ = build_tiny()
        model.to(device)
        decoder = Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)
        if is_in_fp8:
            decoder.shrink_cache()
        monkeypatch.setattr(decoder.attention, "has_kernel", has_kernel)
        rows = [make_row(frames=frames, **GREEDY) for frames in (3, 6)]
        codes.append(decode(rows, slots=Slots(decoder, 2, MAX_STEPS)))
    for plain, by_kernel in zip(*codes, strict=True):
        assert torch.equal(plain, by_kernel)


def test_rows_of_all_kinds_have_the_same_tokens_through_the_kernels(device: str) -> None:
    """The last one gets the slot of one that ended; each has a text of another length."""
    codes = []
    for has_kernel in (False, True):
        model, _ = build_tiny()
        model.to(device)
        decoder = Decoder(model.decoder, model.enc_to_dec_proj, MAX_STEPS + 1)
        decoder.attention.has_kernel = has_kernel
        rows = [
            make_row(PROMPTS[0], 2, seed=1, top_k=0, top_p=0.9),
            make_row(PROMPTS[1], 7, seed=2, negative=make_negative(NEGATIVE), given=make_codes(2)),
            make_row(PROMPTS[2], 3, seed=3, guidance_scale=1.0),
        ]
        codes.append(decode(rows, slots=Slots(decoder, 2, MAX_STEPS)))
    for plain, by_kernel in zip(*codes, strict=True):
        assert torch.equal(plain, by_kernel)
