"""`python -m saccade ...`: the command line where no `saccade` script is installed, as in a submitted Ray job."""

from saccade.cli import main

main()
