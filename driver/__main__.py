"""`python -m driver train CONFIG`: the command line without an installed `saccade` script, as in a submitted Ray job."""

from driver.cli import main

main()
