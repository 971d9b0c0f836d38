r"""The fixed text around inputs and answers: one example as segments.

    plain:  <opening><instruction>\n\n | input | \nAnswer: |  answer | <terminator> | \n\n | input | …
                                        └──── input part ────┘└─ answer part, trained ─┘  gap

A `Layout` is all that a format is. The chat format is the tokenizer's own template cut into the same pieces (see
`encoding.chat_layout`), so that everything after this file sees one kind of thing.
"""

from dataclasses import dataclass
from typing import Literal

Role = Literal["opening", "input", "answer", "terminator", "gap"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Fixed text around the parts of a sequence; each part is tokenised on its own.

    Attributes:
        opening: Stands once before everything, when there is no instruction.
        before_instruction: Stands before an instruction, in place of `opening`; None where instructions have no place.
        after_instruction: Stands between an instruction and the first input.
        before_input: Stands before each input.
        after_input: Stands between an input and its answer.
        answer_lead: Belongs to the answer and is a target: the space before it, in plain text.
        gap: Stands between a terminator and the next input.
        is_markup: Whether the fixed text holds special tokens to be read as such (chat templates).
    """

    opening: str
    before_instruction: str | None
    after_instruction: str
    before_input: str
    after_input: str
    answer_lead: str
    gap: str
    is_markup: bool


PLAIN = Layout(
    opening="",
    before_instruction="",
    after_instruction="\n\n",
    before_input="",
    after_input="\nAnswer:",
    answer_lead=" ",
    gap="\n\n",
    is_markup=False,
)
