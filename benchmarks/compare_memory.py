"""Peak memory of comparing with the base and four adapters, against the base alone. Run by hand:

    python -m benchmarks.compare_memory

Each side is a process of its own that answers the same prompt with the same code; what is printed is
its highest resident set, in MB.
"""

import json
import resource
import subprocess
import sys
from dataclasses import replace

PROMPT = "Why do leaves change colour in autumn?"
TOKENS = 64


def peak(preferences: list[str]) -> None:
    """Answer once per preference (once with the base alone if there is none), then print the peak."""
    from bapo.comparison import compare
    from bapo.inference.base import EMBEDDED
    from bapo.inference.decoding import Sampling
    from bapo.inference.engine import LocalEngine
    from bapo.settings import Settings

    engine = LocalEngine.load(replace(Settings.from_environment(), base=EMBEDDED))
    sampling = Sampling(max_new_tokens=TOKENS)
    if not preferences:
        for _ in engine.decode(PROMPT, [None], [None], sampling):
            pass
    for preference in preferences:
        for _ in compare(engine, PROMPT, preference, sampling):
            pass
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"megabytes": kilobytes / 1000, "adapters": engine.resident_adapters}))


def measure(*preferences: str) -> dict:
    """Run `peak` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.compare_memory", "--side", *preferences]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    base, compared = measure(), measure("P2A", "literature")
    bound = 1.2 * base["megabytes"] + 150
    print(f"base alone                {base['megabytes']:7.0f} MB")
    print(f"base and {len(compared['adapters'])} adapters       {compared['megabytes']:7.0f} MB")
    print(f"ratio                     {compared['megabytes'] / base['megabytes']:7.2f}")
    print(f"1.2 × base + 150 MB       {bound:7.0f} MB: {'kept' if compared['megabytes'] <= bound else 'missed'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--side"]:
        peak(sys.argv[2:])
    else:
        main()
