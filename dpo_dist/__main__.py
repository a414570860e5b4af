"""python -m dpo_dist"""

from dpo_dist.cli import main

main()
