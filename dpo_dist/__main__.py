"""python -m dpo_dist"""

from dpo_dist.cli.app import main

main()
