"""Everything that can be measured."""

from bench import nfa, tree
from bench.subject import Subject

SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in (tree.SUBJECT, nfa.SUBJECT)}
