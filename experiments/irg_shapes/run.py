"""IRG's ablation ladder (arXiv 2509.06945 section 4.3) at the scale of `shapes`: good pictures only, trajectories, six modes in two stages;
rounds 1 to 4, a sweep of the guidance scales, GRPO on top with its random control, and pictures by texts that are told.

    python experiments/irg_shapes/run.py                 # everything that is not done yet, then table.md, figure.png and strips.png
    python experiments/irg_shapes/run.py --arms long long_told_world long_told_another long_contexts    # with a GPU: larger batches, more data
    python experiments/irg_shapes/run.py --only-table

Jobs live in outputs/irg_shapes/<arm>/seed_<n>; two run side by side, each on one thread. A killed one goes on where it stopped.
"""

import argparse

from arms import LADDER, LONGER, done, run_all
from report import write_figure, write_strips, write_table

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only-table", action="store_true", help="rebuild tables and pictures from finished jobs")
    parser.add_argument(
        "--arms", nargs="+", choices=(*LADDER, *LONGER), default=LADDER, metavar="ARM", help="those alone: %(choices)s"
    )
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side, one thread each")
    options = parser.parse_args()
    if not options.only_table:
        run_all(options.arms, options.workers)
    if not done("good", "six"):
        raise SystemExit("no table yet: it begins with the arms good and six, which are not done")
    write_table()
    write_figure()
    write_strips()
