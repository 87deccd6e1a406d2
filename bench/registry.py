"""Everything that can be measured, the most valuable first."""

from bench import blocks, machine, nfa, tree
from bench.subject import Subject

SUBJECTS: dict[str, Subject] = {
    subject.name: subject for subject in (machine.SUBJECT, blocks.SUBJECT, tree.SUBJECT, nfa.SUBJECT)
}
