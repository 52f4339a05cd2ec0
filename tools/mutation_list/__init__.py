"""The mutations, by the project's rooms. Each is a defect that a user would notice, or a promise of the docs broken."""

from tools.mutation import Mutation
from tools.mutation_list import (
    comparison,
    data,
    evaluation,
    generation,
    kernels,
    losses,
    mirror,
    models,
    pages,
    popi,
    tree,
)

_ROOMS = (losses, kernels, tree, data, models, generation, evaluation, popi, mirror, comparison, pages)
MUTATIONS: tuple[Mutation, ...] = tuple(each for room in _ROOMS for each in room.MUTATIONS)
