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

MUTATIONS: tuple[Mutation, ...] = (
    *losses.MUTATIONS,
    *kernels.MUTATIONS,
    *tree.MUTATIONS,
    *data.MUTATIONS,
    *models.MUTATIONS,
    *generation.MUTATIONS,
    *evaluation.MUTATIONS,
    *popi.MUTATIONS,
    *mirror.MUTATIONS,
    *comparison.MUTATIONS,
    *pages.MUTATIONS,
)
