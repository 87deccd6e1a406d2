"""Everything that can be measured, the most valuable first."""

from bench import accelerate, blocks, machine, models, nfa, operations, training, tree
from bench.subject import Subject

SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        machine.SUBJECT,
        blocks.SUBJECT,
        training.SUBJECT,
        models.SUBJECT,
        accelerate.SUBJECT,
        operations.COUPLING,
        operations.LU_CONV,
        operations.RESIDUAL,
        operations.SCORE,
        tree.SUBJECT,
        nfa.SUBJECT,
    )
}
