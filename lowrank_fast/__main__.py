"""`python -m lowrank_fast` is the command `lowrank-fast`."""

from .cli import main

raise SystemExit(main())
