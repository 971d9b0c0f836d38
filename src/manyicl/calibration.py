"""Label scores corrected for what the model says before it has read the query, and scores in the other direction.

In: what `score_labels` takes. Out: log-scores in the same shape; they rank labels and are no log-probabilities any more (a
softmax makes them shares). s(y | x) is the log-probability of label y, its terminator included, after the prefix and query x.

    contextual (Zhao et al. 2021, arXiv 2102.09690, section 4)
        score(y) = s(y | x) - log mean_c softmax_y s(y | c)        over content-free inputs c: "N/A", "[MASK]", ""
    domain-context (Fei et al. 2023, arXiv 2305.19148, section 4)
        the same, over inputs c made of random words of the demonstrations
    pointwise mutual information (Holtzman et al. 2021, arXiv 2104.08315, section 3, PMI_DC)
        score(y) = s(y | x) - s(y | nothing but the answer part)
    channel (Min et al. 2022, arXiv 2108.04106, section 3)
        score(y) = s(x | y), with a prefix of its own in which demonstrations are flipped: label first, input as the answer

Cost: contextual and mutual information score a few more queries for each label set; channel scores every query's tokens once a
label, and its prefix must be prefilled apart.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numpy.random import default_rng
from transformers import PreTrainedModel

from manyicl.errors import BudgetError
from manyicl.label_trie import TokenIds
from manyicl.prefix import Prefix
from manyicl.scoring import score_labels
from manyicl.tasks.task import Example

CONTENT_FREE_INPUTS = ("N/A", "[MASK]", "")
CHANNEL_TRIE_TOKENS = 512

Scores = npt.NDArray[np.float64]


def score_contextual(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    labels: Sequence[Sequence[TokenIds]],
    *,
    contexts: Sequence[TokenIds],
    normalise: bool = False,
) -> list[Scores]:
    """Scores less the log of the mean label shares over `contexts`; see `score_labels` for the other arguments.

    Args:
        contexts: Encoded inputs that say nothing of the answer: `CONTENT_FREE_INPUTS`, or those of `draw_domain_inputs`.

    Raises:
        BudgetError: there is no context, or a query or context does not fit behind the prefix.
    """
    if not contexts:
        raise BudgetError("calibration was given 0 contexts. Give at least one content-free or in-domain input.")
    scores = score_labels(model, prefix, queries, labels, normalise=normalise)
    sets = {id(own): own for own in labels}
    repeated = [own for own in sets.values() for _ in contexts]
    found = score_labels(model, prefix, list(contexts) * len(sets), repeated, normalise=normalise)
    priors = {
        key: log_mean_shares(np.stack(found[place * len(contexts) : (place + 1) * len(contexts)]))
        for place, key in enumerate(sets)
    }
    return [own - priors[id(options)] for own, options in zip(scores, labels, strict=True)]


def score_mutual_information(
    model: PreTrainedModel,
    prefix: Prefix,
    queries: Sequence[TokenIds],
    labels: Sequence[Sequence[TokenIds]],
    *,
    bare_query: TokenIds,
    normalise: bool = False,
) -> list[Scores]:
    """Scores less those of the same labels after `bare_query`; see `score_labels` for the other arguments.

    Args:
        bare_query: The answer part alone, which is an empty input encoded: `encoder.encode_query("")`.

    Raises:
        BudgetError: a query does not fit behind the prefix.
    """
    scores = score_labels(model, prefix, queries, labels, normalise=normalise)
    sets = {id(own): own for own in labels}
    found = score_labels(model, prefix, [bare_query] * len(sets), list(sets.values()), normalise=normalise)
    priors = dict(zip(sets, found, strict=True))
    return [own - priors[id(options)] for own, options in zip(scores, labels, strict=True)]


def score_channel(
    model: PreTrainedModel,
    flipped_prefix: Prefix,
    inputs_as_answers: Sequence[TokenIds],
    labels_as_queries: Sequence[TokenIds],
    *,
    normalise: bool = False,
) -> list[Scores]:
    """Log-probability of each query's input after each label, one array [labels] a query.

    Args:
        flipped_prefix: Prefilled from `flip_examples` of the demonstrations.
        inputs_as_answers: Each query's input, encoded by `encoder.encode_answer`.
        labels_as_queries: Each label, encoded by `encoder.encode_query`.
        normalise: Divide by the tokens of the input; changes no ranking of labels.

    Raises:
        BudgetError: a label and an input do not fit behind the prefix.
    """
    scores = np.empty((len(inputs_as_answers), len(labels_as_queries)))
    group: list[int] = []
    num_tokens = 0
    for place, tokens in enumerate(inputs_as_answers):
        group.append(place)
        num_tokens += len(tokens)
        if num_tokens >= CHANNEL_TRIE_TOKENS or place + 1 == len(inputs_as_answers):
            # One label is the query here, and the inputs of the group are its trie.
            own = [inputs_as_answers[member] for member in group]
            found = score_labels(model, flipped_prefix, labels_as_queries, [own] * len(labels_as_queries), normalise=normalise)
            scores[group] = np.stack(found, axis=1)
            group, num_tokens = [], 0
    return list(scores)


def flip_examples(examples: Sequence[Example]) -> list[Example]:
    """The examples with input and answer exchanged, for the prefix of `score_channel`."""
    return [Example(example.answer, example.input, source=example.source) for example in examples]


def draw_domain_inputs(demonstrations: Sequence[Example], *, num_inputs: int = 20, seed: int) -> list[str]:
    """Inputs of random words of the demonstrations, as long (in words) as their inputs are on average.

    Raises:
        BudgetError: the demonstrations hold no word.
    """
    words = [word for example in demonstrations for word in example.input.split()]
    if not words:
        raise BudgetError(f"{len(demonstrations)} demonstrations hold no word to draw from. Use CONTENT_FREE_INPUTS instead.")
    length = max(1, round(len(words) / len(demonstrations)))
    generator = default_rng([seed, len(words)])
    return [" ".join(generator.choice(words, size=length)) for _ in range(num_inputs)]


def log_mean_shares(scores: Scores) -> Scores:
    """The log of the mean over rows of each row's softmax: [C, Y] to [Y]."""
    shares = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    return np.asarray(np.logaddexp.reduce(shares, axis=0) - np.log(len(scores)), dtype=np.float64)
