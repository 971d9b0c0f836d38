"""What tuned models forgot: the change in bits per byte of plain text, and of zero-shot chat questions, against the base."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from manyicl.metrics import bootstrap_interval
from manyicl.results.contrasts import Cells, estimate, terms_at
from manyicl.results.files import BASE, CorpusFacts, StudyResults

CHAT = "chat"


def forgetting_card(results: StudyResults, cells: Cells, finals: Mapping[str, str]) -> dict[str, Any] | None:
    """One entry per tuned model and snapshot, and ours against each other tuned method at equal tokens."""
    texts = {(facts.model, facts.corpus): facts for facts in results.corpora}
    corpora = sorted({corpus for _, corpus in texts})
    base = {corpus: texts.get((BASE, corpus)) for corpus in corpora}
    if not corpora or not all(base.values()):
        return None
    entries = []
    for facts in results.models:
        changes = {
            corpus: change_of_bits(texts[facts.model, corpus], texts[BASE, corpus])
            for corpus in corpora
            if (facts.model, corpus) in texts
        }
        if changes:
            entries.append(
                facts.model_dump(include={"model", "method", "updates", "tokens", "target_answers", "training_seed", "is_final"})
                | {"bits_per_byte_change": changes, "chat_change": chat_change(cells, facts.model)}
            )
    ours = finals.get("all_answers")
    against = {
        method: {corpus: change_of_bits(texts[ours, corpus], texts[model, corpus]) for corpus in corpora}
        for method, model in finals.items()
        if ours and model not in (BASE, ours) and all((one, corpus) in texts for one in (ours, model) for corpus in corpora)
    }
    return {
        "base_bits_per_byte": {corpus: round(texts[BASE, corpus].bits_per_byte, 5) for corpus in corpora},
        "models": entries,
        "ours_less_other": against,
        "verdicts": {method: _verdict(changes) for method, changes in against.items()},
    }


def change_of_bits(left: CorpusFacts, right: CorpusFacts) -> dict[str, float]:
    """Bits per byte under `left` less those under `right`, with an interval over windows of the text; above zero is worse."""
    differences = np.asarray(left.window_bits) - np.asarray(right.window_bits)
    scale = len(differences) / left.num_bytes
    low, high = bootstrap_interval(differences, draw=np.random.default_rng(0))
    return {"value": round(float(differences.mean() * scale), 6), "low": round(low * scale, 6), "high": round(high * scale, 6)}


def _verdict(changes: Mapping[str, Mapping[str, float]]) -> str:
    """Whether ours forgot less on every text: `holds`, `fails` (more on every one), or `not shown`."""
    if all(change["high"] < 0 for change in changes.values()):
        return "holds"
    return "fails" if all(change["low"] > 0 for change in changes.values()) else "not shown"


def chat_change(cells: Cells, model: str) -> dict[str, float | int | None] | None:
    """Points gained (or lost) by tuning on questions in the chat format without demonstrations, with an interval.

    None while not evaluated.
    """
    tasks = cells.tasks_of("builtin") + cells.tasks_of("builtin", math=True)
    terms = terms_at(cells, tasks, [(1.0, model, 0), (-1.0, BASE, 0)], condition=CHAT)
    return estimate(terms).as_json() if terms else None
