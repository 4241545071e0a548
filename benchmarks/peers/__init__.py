"""fastmim's training step and what it is compared with.

A peer is a :class:`StepProgram` in ``PEERS``. It does the same mathematics as fastmim from the same
weights, written as well as its library allows; ``match`` holds it to that. One that cannot run here
says why in ``missing``.
"""

from peers.base import Batch, Case, StepProgram
from peers.libraries import HuggingFace, HuggingFaceCompiled, Lightly, Timm
from peers.official import Official
from peers.own import OWN, FastMIM
from peers.parts import Parts
from peers.plain import Compiled, CompiledMaxAutotune, Plain
from peers.swapped import Apex, FlashAttention, Liger, XFormers

__all__ = ["OWN", "PEERS", "PROGRAMS", "Batch", "Case", "FastMIM", "Parts", "StepProgram"]

PEERS: dict[str, type[StepProgram]] = {
    program.name: program
    for program in (
        Official,
        Plain,
        Compiled,
        CompiledMaxAutotune,
        HuggingFace,
        HuggingFaceCompiled,
        Lightly,
        Timm,
        FlashAttention,
        XFormers,
        Liger,
        Apex,
    )
}
PROGRAMS: dict[str, type[StepProgram]] = {**OWN, **PEERS}
