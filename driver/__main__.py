"""`python -m driver ...`: the command line where no `saccade` script is installed, as in a submitted Ray job."""

from driver.cli import main

main()
