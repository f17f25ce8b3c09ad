"""What the shipped domain adapters make of strangers' domain texts: reward accuracy and drift. Run by hand:

    python -m benchmarks.domain_transfer FILE

FILE has JSON lines with a prompt and `responses`, a text per domain and a `normal` one, as DSP's test set. For each
domain its own text is chosen and each of the four others rejected. `PROMPTS` of them, from all over the file.
"""

import argparse
from pathlib import Path

from tqdm import tqdm

from bapo.adapters import AdapterStore
from bapo.comparison import METHODS
from bapo.evaluation import BASE, PairLogps, mean_drift, reward_accuracy
from bapo.inference.base import load_base
from bapo.inference.base_responses import base_responses
from bapo.inference.policies import Policies
from bapo.inference.scoring import policy_logps
from bapo.preferences import CATALOGUE
from bapo.settings import Settings
from benchmarks.preparation import spread

PROMPTS = 48
TOKENS = 512  # of a response, at most
DOMAINS = [preference.id for preference in CATALOGUE.values() if preference.family == "domain"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    settings = Settings.from_environment()
    base = load_base(settings)
    store = AdapterStore(settings.adapters, base.name, base.fingerprint)
    names = [f"{domain}-{method}" for domain in DOMAINS for method in METHODS]
    chosen = [None, *map(store.named, names)]
    items = spread(file, PROMPTS)
    answers = base_responses(base, [item["prompt"] for item in items], settings.cache)
    policies = Policies(base, settings.adapter_memory_mb * 10**6, settings.cache, exact=True)
    pairs: dict[str, dict[str, list[PairLogps]]] = {domain: {} for domain in DOMAINS}
    for item in tqdm(items, leave=False):
        prompt, answer = item["prompt"], answers[item["prompt"]].token_ids
        texts = [base.encode_response(prompt, text)[:TOKENS] for text in item["responses"].values()]
        table = policy_logps(policies, chosen, base.encode_prompt(prompt), [*texts, answer]).T.tolist()
        *scored, base_response = (dict(zip([BASE, *names], row, strict=True)) for row in table)
        logps = dict(zip(item["responses"], scored, strict=True))
        for domain, by_other in pairs.items():
            for other in logps.keys() - {domain}:
                pair = PairLogps(prompt, logps[domain], logps[other], base_response, len(answer))
                by_other.setdefault(other, []).append(pair)
    print(f"{len(items)} prompts; reward accuracy over each other text, over all, drift in nats a prompt")
    for domain, by_other in pairs.items():
        for method in METHODS:
            policy = f"{domain}-{method}"
            apart = "  ".join(f"{other} {reward_accuracy(own, policy):.2f}" for other, own in sorted(by_other.items()))
            every = [pair for own in by_other.values() for pair in own]
            print(f"{policy:19} {apart}  all {reward_accuracy(every, policy):.3f}", end="  ")
            print(f"drift {mean_drift(every, policy).nats:+.2f}", flush=True)


if __name__ == "__main__":
    main()
