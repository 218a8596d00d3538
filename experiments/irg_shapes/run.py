"""IRG's ablation ladder (arXiv 2509.06945 section 4.3) on `shapes`: good pictures alone, trajectories, six modes.

Also rounds 1 to 4, a sweep of the guidance scales, GRPO on top with its random control, and pictures by texts that are
told.

    python experiments/irg_shapes/run.py                 # what is not done yet, then table.md and the pictures
    python experiments/irg_shapes/run.py --only-table
    python experiments/irg_shapes/run.py --arms long long_told_world long_told_another long_contexts    # on a GPU

Jobs live in outputs/irg_shapes/<arm>/seed_<n>; two run side by side, each on one thread. A killed one goes on where it
stopped.
"""

from arms import LADDER, LONGER, jobs
from figures import write_figure, write_strips
from report import write_table

from t2i_rl.study.queue import run_jobs
from t2i_rl.study.report import in_one_line, study_parser


def main() -> None:
    parser = study_parser(__doc__)
    arms = (*LADDER, *LONGER)
    parser.add_argument(
        "--arms", nargs="+", choices=arms, default=LADDER, metavar="ARM", help="those alone: %(choices)s"
    )
    options = parser.parse_args()
    if not options.only_table:
        run_jobs(jobs(options.arms), options.workers)
    write_table()
    write_figure()
    write_strips()


if __name__ == "__main__":
    in_one_line(main)
