"""What ``dgx-music doctor`` says about memory: what a model takes, and what is free."""

from __future__ import annotations

from dgx_music.cli.output import size
from dgx_music.inference.musicgen.inventory import MemoryPlan
from dgx_music.inference.trouble import MEMORY_REMEDY


def describe(name: str, plan: MemoryPlan) -> str:
    """Return in words what the model takes and what is free."""
    slots = "1 slot" if plan.slot_count == 1 else f"{plan.slot_count} slots"
    free = "how much is free is not known here"
    if plan.free_bytes is not None:
        free = f"{size(plan.free_bytes)} free"
    return (
        f"{name} on {plan.device}: {size(plan.total_bytes)} = {size(plan.weights_bytes)} weights "
        f"+ {size(plan.steps_bytes)} steps + {size(plan.codec_bytes)} codec "
        f"+ {slots} of {size(plan.slot_bytes)}; {free}"
    )


def find_shortage(plan: MemoryPlan) -> str | None:
    """Return what is too little in a part of a sentence, or ``None`` if all fits."""
    if plan.free_bytes is None or plan.total_bytes <= plan.free_bytes:
        return None
    if plan.has_room:
        return "there will be fewer slots"
    return f"too little for one slot; {MEMORY_REMEDY}"
