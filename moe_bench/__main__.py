"""`python -m moe_bench VERB`."""

from moe_bench.cli.main import main

main()
