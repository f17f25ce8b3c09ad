import sys

from bapo.cli import main

sys.exit(main())
