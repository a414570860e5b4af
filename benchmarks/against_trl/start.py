"""One job in this interpreter, as one JSON line: python -m benchmarks.against_trl.start JOB_AS_JSON

It imports what its own system needs and nothing else, so that its start-up time is its own.
"""

import json
import os
import sys

from benchmarks.against_trl.job import Job
from dpo_dist.run.topology import Topology


def main() -> None:
    job = Job(**json.loads(sys.argv[1]))
    os.environ.update(Topology(0, 1, 0, 1, "127.0.0.1", 29531).environment())
    if job.system == "trl":
        from benchmarks.against_trl.theirs import measure
    else:
        from benchmarks.against_trl.ours import measure
    print(json.dumps(measure(job)), flush=True)
    os._exit(0)  # DeepSpeed may abort at exit, after all its work


if __name__ == "__main__":
    main()
