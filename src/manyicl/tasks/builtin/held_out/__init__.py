"""Grammars of the built-in tasks that are neither trained on nor choose anything."""

from manyicl.tasks.builtin.held_out.arithmetic import GRAMMARS as ARITHMETIC
from manyicl.tasks.builtin.held_out.classification import GRAMMARS as CLASSIFICATION
from manyicl.tasks.builtin.held_out.large_label_sets import GRAMMARS as LARGE_LABEL_SETS
from manyicl.tasks.builtin.held_out.nli import GRAMMARS as NLI
from manyicl.tasks.builtin.held_out.qa import GRAMMARS as QA
from manyicl.tasks.builtin.held_out.summarization import GRAMMARS as SUMMARIZATION

GRAMMARS = (*CLASSIFICATION, *LARGE_LABEL_SETS, *NLI, *QA, *SUMMARIZATION, *ARITHMETIC)
