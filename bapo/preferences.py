"""The catalogue of preferences the shipped adapters are trained for.

P-Soups (arXiv 2310.11564) names the style preferences P1A … P3B; DSP (arXiv 2309.03126)
names the four domains. Labels, descriptions and instructions are our own wording.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Preference:
    """One taste. `instruction` is what one would have to ask for, without an adapter."""

    id: str
    label: str
    family: str  # "style" (P-Soups) or "domain" (DSP); decides what is rejected beside it
    description: str
    instruction: str


PLAIN = "P2A"  # the response of our set that has no domain's register; half as long as theirs, as DSP's "normal"

CATALOGUE: dict[str, Preference] = {
    preference.id: preference
    for preference in (
        Preference(
            "P1A", "Elementary", "style",
            "Short sentences and everyday words that a nine-year-old can follow.",
            "Explain it so that a child in elementary school understands every word.",
        ),
        Preference(
            "P1B", "PhD-level", "style",
            "Dense and technical, written for a specialist of the field.",
            "Answer for a doctoral researcher of the field, with its technical vocabulary and mechanisms.",
        ),
        Preference(
            "P2A", "Concise", "style",
            "The answer without extra words.",
            "Answer briefly and to the point, and leave out everything that is not needed.",
        ),
        Preference(
            "P2B", "Detailed", "style",
            "Background, reasons, numbers and exceptions.",
            "Answer at length and leave no useful background, reason or exception out.",
        ),
        Preference(
            "P3A", "Friendly", "style",
            "Warm and witty, as a close friend would put it.",
            "Answer like a close friend: warm, playful and funny.",
        ),
        Preference(
            "P3B", "Unfriendly", "style",
            "Curt, cold and a little scornful, though still correct.",
            "Answer curtly and coldly, as if the question were a nuisance.",
        ),
        Preference(
            "academy", "Academy", "domain",
            "A lecturer's register: general, impersonal, explained.",
            "Answer as a university lecturer explains to students.",
        ),
        Preference(
            "business", "Business", "domain",
            "A consultant's courtesy: goals, teams, budgets and plans.",
            "Answer as a courteous consultant would, with goals, teams, budgets and plans in view.",
        ),
        Preference(
            "entertainment", "Entertainment", "domain",
            "A talk-show host's chat: casual, lively, full of jokes.",
            "Answer like the host of a talk show who chats with the audience.",
        ),
        Preference(
            "literature", "Literature", "domain",
            "Verse and lyrical prose: rhyme, image and a poet's voice.",
            "Answer in verse or lyrical prose, with rhyme and imagery.",
        ),
    )
}  # fmt: skip


def rejected_beside(preference_id: str) -> list[str]:
    """The ids of the responses that a preference's own response is preferred to.

    Of a style, the other end of its dimension: P-Soups compares responses along one dimension at a time.
    Of a domain, the three others and the plain answer, which DSP calls "normal".
    """
    preference = CATALOGUE[preference_id]
    if preference.family == "style":
        dimension, end = preference_id[:2], preference_id[2:]
        return [dimension + {"A": "B", "B": "A"}[end]]
    return [other.id for other in CATALOGUE.values() if other.family == "domain" and other != preference] + [PLAIN]
