"""The app: settings → engine and jobs → page → launch."""

import argparse
import sys
from dataclasses import replace

from bapo.errors import BapoError
from bapo.inference.engine import LocalEngine
from bapo.jobs.runner import Runner
from bapo.jobs.service import Jobs
from bapo.settings import Settings
from bapo.ui.interface import build_interface, launch


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="a preset, a hub id or a folder (default: BAPO_BASE, else by the machine)")
    args = parser.parse_args()
    try:
        settings = Settings.from_environment()
        if args.base:
            settings = replace(settings, base=args.base)
        print("Loading the base; the first start fetches it and takes a minute.", file=sys.stderr)
        engine = LocalEngine.load(settings)
        jobs = Jobs(settings, engine.store)
        page = build_interface(engine, jobs)
    except BapoError as error:
        print(f"bapo: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"bapo: {error}. Free space there, or point BAPO_CACHE elsewhere.", file=sys.stderr)
        return 2
    runner = Runner(jobs.store, settings)
    runner.start()
    try:
        launch(page, settings)
    except OSError as error:
        print(f"bapo: {error} Set BAPO_PORT to a free port.", file=sys.stderr)
        return 2
    finally:
        runner.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
