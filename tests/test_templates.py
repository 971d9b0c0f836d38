from manyicl.templates import PLAIN


def test_the_plain_format_is_this_and_nothing_else() -> None:
    """Trained models depend on every character of it: a change here makes them worse without a word."""
    assert (PLAIN.opening, PLAIN.before_instruction, PLAIN.after_instruction) == ("", "", "\n\n")
    assert (PLAIN.before_input, PLAIN.after_input, PLAIN.answer_lead, PLAIN.gap) == ("", "\nAnswer:", " ", "\n\n")
    assert not PLAIN.is_markup
