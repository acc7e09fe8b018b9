"""Compiles a model with every recipe at several widths, and writes its leaderboard page.

    python -m tools.leaderboard                              all recipes on the digits at all widths, 32 images
    python -m tools.leaderboard --recipe gptq --width w4a8   one row
    python -m tools.leaderboard --model unet.onnx --scheduler cosine:60 --name mine     docs/leaderboard-mine.md
    python -m tools.leaderboard --write-only                 the page again, from the rows that are there

The leaderboards of docs/ are experiments (tools/experiments/leaderboard-NAME.yaml, run by tools/experiment.py).

Each row is a file in the working folder (out/leaderboard, or out/leaderboard-NAME), written when it is done: a run that
was stopped goes on where it stopped. The rows of a page are also in docs/leaderboard-NAME.json, from which a new folder
starts. A row counts as done when it was measured on the same model with the same passes, width, sampler and numbers of
images; the page lists only such rows. --again measures them anew after a change of the code. Calibration is measured
once for all recipes that share it. Speeds come last, from the bundles that are kept beside the rows: --no-speed leaves
them to a run on a machine that is quiet. --iterations cuts the recipes that train for longer, and their rows say so; a
row that trained for more iterations than were asked for counts as done. --cluster measures rows on the workers of Ray.
"""

from __future__ import annotations

import sys

from mezzotint.runtime.errors import MezzotintError
from tools.leaderboard_board import Board
from tools.leaderboard_options import parsed
from tools.leaderboard_run import fill_boards, write_page


def main(argv: list[str] | None = None) -> int:
    options, how = parsed(argv, __doc__)
    try:
        board = Board(options)
        if not how.write_only:
            fill_boards([board], how.cluster, again=how.again)
            if how.speed:
                board.add_speeds()
    except MezzotintError as error:
        print(error, file=sys.stderr)
        return 2
    write_page(board)
    return 0


if __name__ == "__main__":
    sys.exit(main())
