"""Method `fresh`: a model of the same family at other sizes, its weights cut out evenly spaced, or random."""

from potstill.student.anatomy import dissect
from potstill.student.making import Made, Original
from potstill.student.prune import copy_blocks, described, stated_sizes
from potstill.student.width import cut, evenly_spaced, new_model

__all__ = ["fresh"]


def fresh(original: Original) -> Made:
    """A model of the stated sizes that nothing was measured for."""
    settings, blocks = original.settings, copy_blocks(original)
    anatomy = dissect(blocks.model)
    sizes = stated_sizes(original, anatomy)
    if settings.weights == "random":
        seed = original.context.derive_seed("weights")
        student = new_model(blocks.model, anatomy, sizes, seed=seed)
        return Made(student, f"random weights; {described(sizes, anatomy)}", counts=blocks.counts)
    if sizes == anatomy.sizes:
        return blocks
    student = cut(blocks.model, anatomy, evenly_spaced(anatomy.sizes, sizes))
    said = f"{blocks.said}; evenly spaced, {described(sizes, anatomy)}"
    return Made(student, said, counts=blocks.counts, metrics=blocks.metrics)
